"""The stages of the GPU run on a CPU: each one dry, its clock run out in the middle, its rows, its CUDA calls
on stand-ins."""

import contextlib
import dataclasses
import functools
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import check
import contenders
import dense
import measure
import problems
import pytest
import rows as stage
import run
import sparse
import timing
import torch
from git_helpers import git

from lion_fast.studies import measuring

pytestmark = pytest.mark.usefixtures("one_revision")
STAGES = {"check": check, "dense": dense, "sparse": sparse}


def read(folder: Path) -> list[dict]:
    (file,) = folder.glob("gpu-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def dry(name: str, folder: Path, *words: str) -> int:
    seconds = () if name == "check" else ("--seconds", "0.001")
    return STAGES[name].main(["--dry-run", "--device", "cpu", "--out", str(folder), *seconds, *words])


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """The rows of every stage, each taken in three calls: two whose clock runs out, and one that goes on."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LION_FAST_REVISION", "test")
        # Not every machine has a C++ compiler, or one that torch's compiler gets along with.
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        for name in STAGES:
            before = read(folder) if any(folder.iterdir()) else []
            for _ in range(2):
                assert dry(name, folder, "--new-rows", "1") == 0
                cut = read(folder)
                assert cut[: len(before)] == before and len(cut) > len(before), name
                before = cut
            assert dry(name, folder) == 0
            assert read(folder)[: len(before)] == before and len(read(folder)) > len(before), name
    return folder, read(folder)


@pytest.mark.slow
def test_a_stage_whose_clock_ran_out_goes_on_and_leaves_nothing_else(taken, monkeypatch):
    folder, rows = taken
    assert [path.name for path in folder.iterdir()] == ["gpu-cpu-bf16.jsonl"]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("check") == 3 and kinds.count("ceilings") == 1
    assert all(row["device"] == "cpu" and row["dry_run"] and row["revision"] == "test" for row in rows)
    # A whole run more measures nothing.
    monkeypatch.setattr(problems, "build", lambda *a: pytest.fail("everything is known"))
    monkeypatch.setattr(sparse, "build", lambda *a: pytest.fail("everything is known"))
    for name in STAGES:
        assert dry(name, folder) == 0
    assert read(folder) == rows


@pytest.mark.slow
def test_the_checks_hold_every_result(taken):
    checks = [row for row in taken[1] if row["kind"] == "check"]
    assert all(row["right"] for row in checks)
    integers, *others = checks
    assert set(integers["errors"].values()) == {0.0} and integers["bound"] == 0
    for row in others:
        assert list(row["errors"]) == ["out", "p", "dx", "dA", "dW", "db", "dV", "dc"]
        assert 0 < row["errors"]["out"] < row["bound"] == 2e-2


@pytest.mark.slow
def test_every_contender_is_measured(taken):
    timed = [row for row in taken[1] if row["kind"] == "time"]
    names = {row["contender"] for row in timed}
    assert names == {c.name for c in contenders.ALL} - {"torch D-space, compiled"}
    assert [row for row in timed if "failed" in row] == []
    for row in timed:
        if "skipped" in row:
            assert row["contender"].startswith("torchdeq"), row
            continue
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"] and row["how"] == "eager"
        assert row["host_us"] > 0 and row["eager_us"] > 0
        assert row["error_out"] < 3e-2 and row["bytes"] > 0 and row["operations"] > 0
        assert (row["saved_bytes"] is None) == (row["mode"] == "forward")
        assert {"torch", "triton", "revision", "dtype", "when", "run", "copy_percent"} <= set(row)
    applications = {row["problem"]: row.get("applications", 0) for row in timed if "us" in row}
    assert applications["easy"] < 8 < 18 < applications["hard"]


@pytest.mark.slow
def test_sparse_forms_are_measured_beside_dense(taken):
    rows = [row for row in taken[1] if row["kind"] == "sparse"]
    found = {(row["granularity"], row["block"]) for row in rows}
    blocks = {("block", size) for size in (16, 32, 64)}
    assert found == {*blocks, ("unit", None), ("element", None), ("2:4", None)}
    assert [row for row in rows if "failed" in row] == []
    for row in rows:
        if row["contender"] in ("dense fused", "dense loop", "block-sparse fused", "compacted"):
            assert 0 < row["us_20"] <= row["us"] <= row["us_80"], row
            assert row["error_out"] < 3e-2 and {"peak_bytes", "saved_bytes", "revision"} <= set(row)
            assert (row["error_dx"] is None) == (row["mode"] == "forward")
        elif row["granularity"] == "2:4":
            assert "CUDA" in row["skipped"] and row["mode"] == "forward"
        else:
            assert row["contender"] in ("BSR loop", "CSR loop")
            assert "no sparse product" in row["skipped"]
    dead = {row["granularity"]: row["dead"] for row in rows if row["block"] in (None, 16)}
    assert dead == {"block": 0.5, "unit": 0.5, "element": 0.5, "2:4": 0.5}


# -- rows


def made_rows(folder, earlier=(), **more) -> stage.Rows:
    common = {"device": "A device", "dtype": "bf16", "torch": "2", "cuda": "13", "triton": "3", "run": "1"}
    return stage.Rows(folder, {**common, "revision": "abc", **more}, earlier)


def test_rows_of_the_same_code_are_known_wherever_they_lie(tmp_path):
    first = made_rows(tmp_path / "committed")
    first.add({"kind": "time", "contender": "a", "us": 1.0})
    first.add({"kind": "time", "contender": "b", "failed": "CUDA error"})
    assert first.known(contender="b")["failed"] == "CUDA error", "in its own run it is not tried again"
    assert first.path.name == "gpu-a-device-bf16.jsonl"
    again = made_rows(tmp_path / "new", (tmp_path / "committed",), run="2")
    assert again.known(contender="a")["us"] == 1.0 and again.known(contender="b") is None
    again.store.close()
    assert made_rows(tmp_path / "new", (tmp_path / "committed",), run="2", revision="abd").rows == []


def test_what_a_process_died_of_is_left_alone_by_the_next_of_its_run(tmp_path):
    key = {"mode": "both", "contender": "a"}
    rows = made_rows(tmp_path)
    rows.store.close()
    with contextlib.suppress(KeyboardInterrupt), rows.attempt(key):
        raise KeyboardInterrupt  # out of time
    assert made_rows(tmp_path).rows == [] and list(tmp_path.iterdir()) == [rows.path]
    died = [rows.attempt(key, {**key, "contender": "b"}) for _ in range(2)]
    died[0].__enter__()
    assert made_rows(tmp_path, run="2").rows == [], "another run tries it again"
    died[1].__enter__()
    again = made_rows(tmp_path)
    assert [row["contender"] for row in again.rows] == ["a", "b"]
    assert again.known(**key)["failed"] == "the process died of it"
    assert list(tmp_path.iterdir()) == [rows.path]


def test_the_revision_is_short_and_without_history_a_digest(tmp_path, monkeypatch):
    monkeypatch.delenv("LION_FAST_REVISION")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    source = tmp_path / "kernels" / "a.py"
    source.parent.mkdir()
    digests = []
    for text in ("1", "1", "2"):
        source.write_text(text)
        digests.append(stage.revision())
        (tmp_path / "rows.jsonl").write_text(text)
    assert re.fullmatch("files-[0-9a-f]{12}", digests[0]) and digests[0] == digests[1] != digests[2]
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "code")
    code = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert stage.revision() == code
    source.write_text("3")
    assert stage.revision() == f"{code}-changed"
    monkeypatch.setenv("LION_FAST_REVISION", "given")
    assert stage.revision() == "given"


@pytest.mark.parametrize("main", [run.main, dense.main])
@pytest.mark.parametrize("words", [["--dry-run", "--out", str(stage.RESULTS / "x")], []])
def test_a_dry_run_cannot_write_results_and_a_cpu_gives_none(capsys, main, words):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *words])
    assert stopped.value.code == 2 and "results" in capsys.readouterr().err


# -- gates


def small_problem(dtype=torch.float32):
    return problems.build(problems.Shape(1, 16, 8, "easy", tokens=5), dtype, "cpu", 1000)


def test_a_wrong_contender_is_not_timed_and_the_next_one_is(tmp_path):
    problem = small_problem()
    ours, good = contenders.ALL[:2]

    def wrong(problem):
        ready = good.make(problem)
        return contenders.Ready(lambda x: 1.2 * ready.call(x), ready.parameters)

    def broken(problem):
        raise RuntimeError("no kernel image")

    bad = dataclasses.replace(good, name="wrong", make=wrong)
    worse = dataclasses.replace(good, name="broken", make=broken)
    rows = made_rows(tmp_path)
    bench = timing.Bench(rows, "cpu", 1e-3)
    bench.time({"mode": "both"}, [ours, bad, worse, good], lambda: problem, lambda c, p: {})
    found = {row["contender"]: row for row in rows.rows}
    assert found["wrong"]["failed"] == "wrong result, not timed" and found["wrong"]["error_out"] > 0.1
    assert found["broken"]["failed"] == "RuntimeError: no kernel image"
    assert {name for name, row in found.items() if "us" in row} == {ours.name, good.name}
    # What is missing is timed beside ours again.
    late = dataclasses.replace(good, name="late")
    bench.time({"mode": "both"}, [ours, late], lambda: problem, lambda c, p: {})
    assert [row["contender"] for row in rows.rows[-2:]] == [ours.name, "late"]


def test_a_wrong_kernel_makes_the_check_red(monkeypatch, tmp_path, capsys):
    true = check.ops.solve
    monkeypatch.setattr(
        check.ops, "solve", lambda *a: tuple(t * 1.1 if t.is_floating_point() else t for t in true(*a))
    )
    assert dry("check", tmp_path) == 1
    assert all(row["failed"].startswith("off: out") for row in read(tmp_path))
    assert "wrong" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("LION_FAST_REVISION", "test")
    time.sleep(1.1)  # a run of its own has a name of its own, by the second
    assert dry("check", tmp_path) == 0, "failed checks are made again"


def test_a_lost_device_ends_the_process_only_where_it_is_lost(monkeypatch):
    left = []
    monkeypatch.setattr(stage.os, "_exit", left.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stage.leave_if_lost("cpu"), stage.leave_if_lost("cuda")
    assert left == []

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    stage.leave_if_lost("cpu")
    assert left == []
    stage.leave_if_lost("cuda")
    assert left == [stage.LOST_DEVICE]


# -- CUDA calls on stand-ins


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as the measuring needs it, on a CPU: what it was asked for is kept."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self):
            calls.append("replay")

        def pool(self):
            return "its pool"

    def graph(captured, pool=None):
        calls.append(f"capture, pool={pool}")
        return contextlib.nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: calls.append("wait"))
    stand_ins = {
        "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda *device: None, "reset_peak_memory_stats": lambda: calls.append("reset"),
        "memory_allocated": lambda: 1000, "max_memory_allocated": lambda: 5000,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return calls


@pytest.mark.parametrize("mode", measure.MODES)
def test_a_captured_contender_is_replayed(mode, fake_cuda):
    problem = small_problem()
    subject, told = timing.prepare(contenders.ALL[1], problem, mode, "cuda")
    assert told["how"] == "graph" and told["peak_bytes"] == 4000 and told["host_us"] > 0
    captures = [call for call in fake_cuda if call.startswith("capture")]
    if mode == "backward":
        assert captures == ["capture, pool=None", "capture, pool=its pool"]
    else:
        assert captures == ["capture, pool=None"]
    # One graph has a run on every set of tokens, each with a result of its own.
    assert told["sets"] == len(problem.x) == len(subject.graph[1]) > 1
    fake_cuda.clear()
    assert subject.sample(3 * told["sets"]) > 0 and fake_cuda == ["replay"] * 3
    for x, got, upstream in zip(problem.x, subject.graph[1], problem.upstream, strict=True):
        given = x.clone().requires_grad_(mode != "forward")
        out = subject.call(given)
        if mode != "forward":
            got, out = got[0], torch.autograd.grad(out, given, upstream)[0]
        assert torch.equal(got, out)
    (samples,) = measure.interleaved([subject], 1e-3, 3)
    assert len(samples) == 3
    fake_cuda.clear()
    assert subject.sample(2, eager=True) > 0 and fake_cuda == []


def test_a_contender_that_looks_at_the_device_is_not_captured(fake_cuda):
    (looks,) = (c for c in contenders.ALL if c.name == "reference free")
    subject, told = timing.prepare(looks, small_problem(), "both", "cuda")
    assert told["how"] == "eager" and not any(call.startswith("capture") for call in fake_cuda)


def test_a_graph_that_gives_another_result_is_not_timed(fake_cuda, monkeypatch):
    another = (torch.cuda.CUDAGraph(), [torch.zeros(5, 16)], None)
    monkeypatch.setattr(measure.Subject, "_capture", lambda self: another)
    subject, told = timing.prepare(contenders.ALL[1], small_problem(), "forward", "cuda")
    assert subject is None and "another result" in told["failed"]


def test_a_capture_that_breaks_off_ends_the_process_and_the_next_one_does_without(
    fake_cuda, monkeypatch, tmp_path
):
    ours, good = contenders.ALL[:2]
    todo = [ours, dataclasses.replace(good, name="breaks"), dataclasses.replace(good, name="last")]
    capture, captured = measure.Subject._capture, []

    def broken(self):
        if captured:
            raise measure.NotCaptured("RuntimeError: operation not permitted when stream is capturing")
        captured.append(self)
        return capture(self)

    monkeypatch.setattr(measure.Subject, "_capture", broken)
    monkeypatch.setattr(stage.os, "_exit", sys.exit)

    def go_on(batch: int):
        known = {"mode": "forward", "batch": batch}
        rows = made_rows(tmp_path)
        with contextlib.closing(rows.store):
            timing.Bench(rows, "cuda", 1e-3).time(known, todo, small_problem, lambda c, p: {})
        return {row["contender"]: row for row in rows.matching(**known)}

    with pytest.raises(SystemExit) as ended:
        go_on(1)
    assert ended.value.code == stage.LOST_DEVICE
    (row,) = made_rows(tmp_path).rows
    assert row["contender"] == "breaks" and row["uncaptured"] and "not permitted" in row["failed"]
    monkeypatch.setattr(measure.Subject, "_capture", capture)
    for batch in (1, 2):
        told = {name: row["how"] for name, row in go_on(batch).items() if "us" in row}
        assert told == {ours.name: "graph", "breaks": "eager", "last": "graph"}


def test_a_compiled_contender_is_timed_backward_alone(monkeypatch):
    """With the forward's results kept, as a captured backward needs them, and the eager gradients."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compiler(call, backend="aot_eager", fullgraph=True))
    problem = small_problem()
    for contender in (c for c in contenders.ALL if c.compiled):
        ready = contender.make(problem)
        subject = measure.Subject(ready, problem, "backward", True, False, "cpu")
        x, out = subject._forward(0, True)
        twice = [subject._backward(0, x, out, keep=True) for _ in range(2)]
        x = problem.x[0].clone().requires_grad_()
        out = ready.call(x)
        eager = torch.autograd.grad(out, [x, *ready.parameters], problem.upstream[0])
        for again in twice:
            assert max(map(measuring.distance, again, eager)) < 1e-5
    torch._dynamo.reset()


def test_slow_contenders_take_fewer_turns():
    class Counted:
        def __init__(self, seconds):
            self.seconds, self.calls = seconds, 0

        def sample(self, calls):
            self.calls += calls
            return self.seconds

    quick, slow = Counted(1e-4), Counted(0.3)
    found = measure.interleaved([quick, slow], 0.12, 11)
    assert len(found[0]) == 11 and measure.LEAST_SAMPLES <= len(found[1]) <= 6
    assert quick.calls == 2 + 11 * 100 and slow.calls == 2 + len(found[1])
