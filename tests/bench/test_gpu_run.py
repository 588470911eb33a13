"""The GPU run, rehearsed on a CPU: every stage dry, its clock run out in the middle, its CUDA calls on
stand-ins; what the driver does with steps that hang, break or lose the device; and the table of its rows."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from image_helpers import class_folders

from lion_fast.studies import measuring

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench")]
import check  # noqa: E402
import contenders  # noqa: E402
import dense  # noqa: E402
import measure  # noqa: E402
import problems  # noqa: E402
import rows as stage  # noqa: E402
import run  # noqa: E402
import sparse  # noqa: E402
import table  # noqa: E402
import timing  # noqa: E402

# What may come back from the machine: few files, not deep, with plain names.
PLAIN = re.compile(r"([A-Za-z0-9._-]+/){0,2}[A-Za-z0-9._-]+")
STAGES = {"check": check, "dense": dense, "sparse": sparse}


@pytest.fixture(autouse=True)
def _one_revision(monkeypatch):
    """A commit between two runs of a test would make them different runs."""
    monkeypatch.setenv("LION_FAST_REVISION", "test")
    monkeypatch.delenv("LION_FAST_RUN", raising=False)


def read(folder: Path) -> list[dict]:
    (file,) = folder.glob("gpu-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


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
    for wanted, count in ((("check",), 3), (("ceilings",), 1)):
        assert sum(row["kind"] in wanted for row in rows) == count
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
            assert (
                row["skipped"] == "A: 2:4 products need a CUDA device, not cpu" and row["mode"] == "forward"
            )
        else:
            assert row["contender"] in ("BSR loop", "CSR loop")
            assert "on a CPU has no sparse product" in row["skipped"]
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


def test_half_a_line_does_not_swallow_the_next(tmp_path):
    rows = made_rows(tmp_path)
    rows.add({"contender": "a"})
    rows.store.close()
    with rows.path.open("a") as file:
        file.write('{"contender": "b", "us')
    rows = made_rows(tmp_path)
    assert [row["contender"] for row in rows.rows] == ["a"]
    rows.add({"contender": "c"})
    assert [row["contender"] for row in read(tmp_path)] == ["a", "c"]


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


def test_the_revision_is_that_of_the_code_and_without_history_a_digest(tmp_path, monkeypatch):
    monkeypatch.delenv("LION_FAST_REVISION")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    source = tmp_path / "kernels" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    first = stage.revision()
    (tmp_path / "rows.jsonl").write_text("{}")
    assert re.fullmatch("files-[0-9a-f]{12}", first) and stage.revision() == first
    source.write_text("2")
    assert stage.revision() != first
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "kernels")
    git(tmp_path, "commit", "-qm", "code")
    code = stage.revision()
    assert code == git(tmp_path, "rev-parse", "HEAD")[:12]
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "rows")
    assert stage.revision() == code
    source.write_text("3")
    assert stage.revision() == f"{code}-changed"
    monkeypatch.setenv("LION_FAST_REVISION", "given")
    assert stage.revision() == "given"


def test_a_dry_run_cannot_write_results_and_a_cpu_gives_none(capsys):
    for main in (run.main, dense.main):
        for words, message in (
            (
                ["--dry-run", "--device", "cpu", "--out", str(stage.RESULTS / "x")],
                "does not write to bench/results",
            ),
            (["--device", "cpu"], "a CPU's times are no results"),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(words)
            assert stopped.value.code == 2 and message in capsys.readouterr().err


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

        def synchronize(self):
            pass

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
        got, right = (
            (got, out) if mode == "forward" else (got[0], torch.autograd.grad(out, given, upstream)[0])
        )
        assert torch.equal(got, right)
    (samples,) = measure.interleaved([subject], 1e-3, 3)
    assert len(samples) == 3
    fake_cuda.clear()
    assert subject.sample(2, eager=True) > 0 and fake_cuda == []


def test_a_contender_that_looks_at_the_device_is_not_captured(fake_cuda):
    found = {c.name: c for c in contenders.ALL}
    assert found["lion-fast"].captured and not found["reference free"].captured
    subject, told = timing.prepare(found["reference free"], small_problem(), "both", "cuda")
    assert told["how"] == "eager" and not any(call.startswith("capture") for call in fake_cuda)


def test_a_graph_that_gives_another_result_is_not_timed(fake_cuda, monkeypatch):
    monkeypatch.setattr(
        measure.Subject, "_capture", lambda self: (torch.cuda.CUDAGraph(), [torch.zeros(5, 16)], None)
    )
    subject, told = timing.prepare(contenders.ALL[1], small_problem(), "forward", "cuda")
    assert subject is None and "another result" in told["failed"]


def test_a_capture_that_breaks_off_ends_the_process_and_the_next_one_does_without(
    fake_cuda, monkeypatch, tmp_path
):
    ours, good = contenders.ALL[:2]
    todo = [ours, dataclasses.replace(good, name="breaks"), dataclasses.replace(good, name="last")]
    capture = measure.Subject._capture
    left = []

    def broken(self):
        if broken.at == 1:
            raise measure.NotCaptured("RuntimeError: operation not permitted when stream is capturing")
        broken.at += 1
        return capture(self)

    def ends(status):
        left.append(status)
        raise SystemExit

    monkeypatch.setattr(measure.Subject, "_capture", broken)
    monkeypatch.setattr(stage.os, "_exit", ends)

    def go_on(batch: int):
        known = {"mode": "forward", "batch": batch}
        rows = made_rows(tmp_path)
        with contextlib.closing(rows.store):
            timing.Bench(rows, "cuda", 1e-3).time(known, todo, small_problem, lambda c, p: {})
        return {row["contender"]: row for row in rows.matching(**known)}

    broken.at = 0
    with pytest.raises(SystemExit):
        go_on(1)
    assert left == [stage.LOST_DEVICE]
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


# -- problems


def test_shapes_come_in_order_of_importance_and_cover_the_plan():
    found = problems.shapes()
    assert found[: len(problems.FIRST_SHAPES)] == problems.FIRST_SHAPES
    assert [(s.state, s.batch) for s in found[:6:2]] == [(64, 256), (64, 64), (64, 1)]
    assert len(found) == len(set(found)) == 3 * 6 * 5 * 2
    first = dense.passes(rest=False, dry=False)
    assert {c.name for _, chosen in first for c in chosen} == set(dense.FIRST)
    assert sum(any(c.compiled for c in chosen) for _, chosen in first) == 2


def test_counted_bytes_and_operations():
    counted = problems.counts(problems.Shape(2, 10, 4, "easy", tokens=3), torch.bfloat16, 5.0)
    assert counted["forward"] == ((2 * 6 * 10 + 96) * 2, 4 * 6 * 10 * 4 + 2 * 6 * 16 * 4)
    assert counted["backward"][0] == (3 * 6 * 10 + 6 * 4 + 96) * 2 + 96 * 4
    # Only where a gradient is to come is the pre-activation written.
    size, operations = map(sum, zip(counted["forward"], counted["backward"], strict=True))
    assert counted["both"] == (size + 6 * 4 * 2, operations)


def test_the_first_checks_are_those_of_the_timed_kernels():
    found = list(check.cases(rest=False))
    assert {c.rows for c in found} >= {131, 12608}
    assert {c.state for c in found if not c.wide and not c.block} >= {64, 16, 128, 32}
    assert any(c.wide for c in found) and {c.block for c in found} >= {64, 32}
    assert set(map(str, found)) < set(map(str, check.cases(rest=True)))
    assert max(c.rows for c in check.cases(False, small=True)) < 200


def test_sparse_cases_begin_with_the_target():
    found = sparse.cases()
    first = found[0]
    assert (first.width, first.state, first.form, first.sparsity) == (768, 768, "block 64", 0.75)
    assert len(found) == len(set(found)) == 6 * (6 * 5 + 1)
    assert {c.sparsity for c in found if c.state == 64} == {0, 0.25, 0.5, 0.75, 0.9, 0.95}


def made_case(granularity, block=None, state=64, width=64, sparsity=0.5):
    case = sparse.Case(width, state, granularity, sparsity, block)
    shape = problems.Shape(2, width, state, "sparse", tokens=7)
    return sparse.build(case, shape, problems.draw_tokens(shape, torch.float32, "cpu", 1000))


def test_masks_drop_whole_groups():
    for sparsity, kept in ((0.0, 16), (0.75, 4), (0.95, 1), (1.0, 1)):
        masks = made_case("block", 16, sparsity=sparsity).masks
        for mask in masks.values():
            tiles = mask.view(4, 16, 4, 16).float().mean((1, 3))
            assert set(tiles.unique().tolist()) <= {0.0, 1.0} and tiles.sum() == kept
    units = made_case("unit", sparsity=0.75).masks
    assert units["W"].sum() == 16**2 and (units["A"].any(1) == units["V"].any(0)).all()
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in made_case("2:4").masks.values())
    problem = made_case("element", sparsity=0.9)
    assert abs(problem.masks["W"].float().mean() - 0.1) < 1e-3
    assert (problem.free[1] != 0).sum() <= problem.masks["W"].sum()
    assert 3 < problem.steps["free"] < 50


@pytest.mark.parametrize(
    ("granularity", "block", "state", "width"),
    [("block", 16, 64, 96), ("block", 32, 72, 40), ("unit", None, 40, 24), ("element", None, 48, 40)],
)
def test_every_sparse_contender_equals_dense_with_zeros(granularity, block, state, width):
    problem = made_case(granularity, block, state, width, 0.75)
    names, expected = set(), {}
    for contender in sparse.chosen(problem.case):
        subject, told = timing.prepare(contender, problem, "backward", "cpu")
        if contender.name == "BSR loop" and state % block:
            assert told == {"skipped": f"torch's BSR needs multiples of {block}, not {state} x {width}"}
            continue
        assert subject is not None, (contender.name, told)
        assert told["error_out"] < 2e-3 and told["error_dx"] < 2e-3, (contender.name, told)
        names.add(contender.name)
        gradients = dict(zip("xAWbVc", subject.gradients(), strict=True))
        expected = expected or gradients
        for name, got in gradients.items():
            target = expected[name]
            if contender.name == "block-sparse fused" and name in "AWV":
                target = sparse.find_pattern(problem.masks[name], block).gather(target)
            elif contender.name == "compacted" and name in "AWbV":
                kept = problem.masks["V"].any(0)
                target = target[:, kept] if name == "V" else target[kept]
                target = target[:, kept] if name == "W" else target
            assert measuring.distance(got, target) < 5e-3, (contender.name, name)
    assert len(names) >= 3


def test_the_two_of_four_contenders_equal_dense_with_zeros(monkeypatch):
    monkeypatch.setattr(sparse.two_of_four, "why_not", lambda *a: None)
    monkeypatch.setattr(sparse.two_of_four, "compress", lambda matrix: matrix)
    problem = made_case("2:4")
    for contender in sparse.chosen(problem.case):
        subject, told = timing.prepare(contender, problem, "forward", "cpu")
        assert subject is not None and told["error_out"] < 2e-3, (contender.name, told)


# -- the driver


def step(code: str, name: str = "a step", minutes: float = 0.5, **more) -> run.Step:
    return run.Step("first", name, ("-c", code), minutes, told=False, **more)


def test_a_step_out_of_time_leaves_its_rows_and_nothing_running(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("a row", flush=True)
time.sleep(600)
"""
    begin = time.monotonic()
    steps = [step(code, "hangs", 4 / 60), step("print('next')", "next")]
    assert run.run_all(steps, tmp_path, 100) == 0, "no time is no error"
    assert time.monotonic() - begin < 60
    told = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["state"]) for row in told] == [("hangs", "out of time"), ("next", "ok")]
    text = (tmp_path / "log.txt").read_text()
    assert "a row" in text and "next" in text
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the step outlived it")


def test_a_step_that_loses_the_device_is_started_again(tmp_path):
    count = tmp_path / "count"
    code = f"""
import pathlib, sys
at = pathlib.Path({str(count)!r})
n = int(at.read_text()) + 1 if at.exists() else 1
at.write_text(str(n))
sys.exit({stage.LOST_DEVICE} if n < 3 else 0)
"""
    assert run.run_all([step(code)], tmp_path, 100) == 0
    assert count.read_text() == "3"
    always = step(f"import sys; sys.exit({stage.LOST_DEVICE})")
    assert run.run_all([always], tmp_path, 100) == 1, "not for ever"


def test_what_makes_a_run_red(tmp_path):
    wrong = "import sys; print('wrong'); sys.exit(1)"
    assert run.run_all([step(wrong), step("print('after')")], tmp_path, 100) == 1
    assert "after" in (tmp_path / "log.txt").read_text(), "the next step runs all the same"
    assert run.run_all([step(wrong, gates=False)], tmp_path, 100) == 0
    missing = step(wrong, missing="no such tool")
    assert run.run_all([missing, step("", "late")], tmp_path, 5) == 0
    states = [json.loads(line)["state"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()[-2:]]
    assert states == ["left out: no such tool", "left out"]


def test_a_run_on_another_machine_goes_on_behind_committed_rows(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    for name in run.ROW_FILES:
        (results / name).parent.mkdir(parents=True)
        (results / name).write_text("earlier")
    (out / run.ROW_FILES[1]).parent.mkdir(parents=True)
    (out / run.ROW_FILES[1]).write_text("newer")
    run.bring_earlier_rows(results, out)
    assert [(out / name).read_text() for name in run.ROW_FILES] == ["earlier", "newer"]
    run.bring_earlier_rows(results, results)


def test_an_unknown_stage_and_the_list(capsys):
    with pytest.raises(SystemExit):
        run.main(["frist"])
    assert "no stage frist; there are warm, first, tests, rest, accuracy" in capsys.readouterr().err
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        (line.split()[0] for line in listed), key=run.STAGES.index
    )
    options = SimpleNamespace(
        out=Path("o"), device="cuda", dry_run=False, new_rows=None, grid=run.GRID, pack=run.PACK, stages=[]
    )
    minutes = {name: sum(s.minutes for s in run.steps(options) if s.stage == name) for name in run.STAGES}
    # every test of a GPU is in a folder that the step looks into
    (words,) = (s.words for s in run.steps(options) if s.name == "tests")
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()]
    assert {p.parent.relative_to(ROOT).as_posix() for p in marked} <= {*words, "tests/bench"}
    # One command takes ten minutes at most, and what matters is known after seven and the compiler.
    assert minutes["warm"] + minutes["first"] <= 9 and minutes["tests"] <= 7 and minutes["accuracy"] <= 7


@pytest.fixture
def tiny_grid(tmp_path):
    """An experiment of seconds, on images that it makes itself."""
    photos = class_folders(tmp_path / "photos", {"cat": 8, "dog": 8})
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"""
name: tiny
backbones: {{vit: {{name: vit_tiny_patch16_224, img_size: 32, pretrained: false}}}}
sets: {{photos: {{source: {photos}, n_per_class: 2, n_val: 4, n_test: 4, epochs: 1}}}}
seeds: [1]
tuning_seeds: [0]
methods:
  probe: {{grid: {{train.lr: [1.0e-3]}}}}
reference: probe
""")
    return grid


@pytest.mark.slow
def test_one_press_rehearsed(tmp_path, tiny_grid):
    out = tmp_path / "out"
    command = [sys.executable, "bench/gpu/run.py", "--dry-run", "--device", "cpu", "--out", str(out)]
    command += ["--new-rows", "2", "--grid", str(tiny_grid), "--pack", str(tmp_path), "--minutes", "15"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    told = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [row["state"] for row in told] == ["ok"] * len(told), told
    assert {row["stage"] for row in told} == set(run.STAGES)
    kinds = {row["kind"] for row in read(out)}
    assert kinds == {"check", "ceilings", "time", "sparse", "sanitized"}
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8, files
    assert all(PLAIN.fullmatch(path.relative_to(out).as_posix()) for path in files), files
    assert all(path.stat().st_size < 16 << 20 for path in files)


# -- the table


def test_the_table_holds_committed_rows_only(tmp_path):
    row = {
        "kind": "time", "contender": "lion-fast", "mode": "forward", "batch": 64, "width": 768, "state": 32,
        "problem": "easy", "applications": 5.0, "us": 2.0, "us_20": 1.0, "us_80": 3.0, "copy_percent": 50.0,
        "matrix_percent": 5.0, "peak_bytes": 10**6, "saved_bytes": None, "device": "A device",
        "dtype": "bf16", "revision": "abc", "torch": "2", "triton": "3", "how": "graph", "host_us": 7.0,
        "eager_us": 8.0,
    }  # fmt: skip
    peer = {**row, "contender": "peer", "us": 9.0}
    common = {"device": "A device", "dtype": "bf16", "revision": "abc"}
    roof = {"kind": "ceilings", "copy": 4e12, "bf16": 7e14, "tf32": 3e14, **common}
    right = {
        "kind": "check",
        "what": "solve R=64",
        "errors": {"out": 1e-3, "dx": 2e-3},
        "bound": 2e-2,
        "right": True,
    }
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)

    def write(name, *rows):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    git(tmp_path, "init", "-q")
    write(
        "a.jsonl", roof, {**row, "us": 5.0}, row, peer, {**right, **common},
        {**row, "contender": "dry", "dry_run": True}, {**row, "device": "cpu"},
    )  # fmt: skip
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "rows")
    write("b.jsonl", {**row, "contender": "not committed"})
    write("a.jsonl", {**row, "contender": "changed since"})
    rows = table.committed_rows(tmp_path)
    assert len(rows) == 5
    text = table.markdown(rows)
    line = "| 768 | 32 | 64 | easy | forward | peer | 5.0 | 9.0 (1.0, 3.0) | 50 | 5 | graph | 8.0 | 7.0 | 1 |"
    assert f"{line}  | 4.5 |" in text and "5.0 (1.0" not in text
    assert "| A device, bf16, abc | solve R=64 | 2.0e-03 | dx | 0.02 |" in text
    assert "4.00 TB/s" in text and "committed" not in text and "changed" not in text
    assert table.markdown([]) == table.NOTHING
