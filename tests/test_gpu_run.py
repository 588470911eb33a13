"""The GPU run, dry: every line of it but the CUDA calls, on a CPU; and the table of its rows."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ROOT / "bench" / "gpu" / "run.py"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    "OMP_NUM_THREADS": "1",
    # A commit between two runs of a test would make them different runs.
    "LION_FAST_REVISION": "test",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
}


def load(name: str):
    """A module of bench/gpu, which is no package."""
    sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench")]
    try:
        spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "bench" / "gpu" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    return module


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    words = ["--dry-run", "--device", "cpu", "--seconds", "0.001", "--out", str(folder)]
    result = subprocess.run(
        [sys.executable, str(RUN), *words], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = folder.glob("*.jsonl")
    return file, [json.loads(line) for line in file.read_text().splitlines()], result.stdout


def test_the_dry_run_measures_every_contender(dry):
    _, rows, printed = dry
    assert "correctness: green" in printed and "0 shapes left out" in printed
    timed = [r for r in rows if r["kind"] == "time"]
    assert all(r["device"] == "cpu" and r["dry_run"] for r in rows)
    names = {r["contender"] for r in timed}
    assert {"lion-fast", "reference free", "reference tied", "torch R-space, half"} <= names
    assert {"torch D-space, half", "torchdeq monitored", "torchdeq blind", "lion-fast, graph"} <= names
    assert [r for r in timed if "failed" in r] == []
    for row in timed:
        if "skipped" in row:
            assert row["contender"].startswith("torchdeq") or "graph" in row["contender"], row
            continue
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        assert row["error_out"] < 3e-2 and row["bytes"] > 0 and row["operations"] > 0
        assert (row["saved_bytes"] is None) == (row["mode"] == "forward")
        assert {"torch", "triton", "revision", "dtype", "when", "copy_percent"} <= set(row)
    applications = {r["problem"]: r["applications"] for r in timed if r["recurrence"] == "free"}
    assert applications["easy"] < 8 < 18 < applications["hard"]


def test_an_interrupted_run_goes_on_where_it_stopped(dry, tmp_path, monkeypatch):
    file, rows, _ = dry
    lost = {("torch R-space, half", "both"), ("torch D-space, half", "both")}
    kept = [row for row in rows if (row.get("contender"), row.get("mode")) not in lost]
    text = "\n".join(map(json.dumps, kept))
    (tmp_path / file.name).write_text(text + '\n{"kind": "time", "conten')
    monkeypatch.setenv("LION_FAST_REVISION", "test")
    run = load("run")
    built = []
    build = run.problems.build
    monkeypatch.setattr(run.problems, "build", lambda *a: built.append(a) or build(*a))
    assert run.main(["--dry-run", "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    again = [json.loads(line) for line in (tmp_path / file.name).read_text().splitlines()]
    assert len(again) == len(rows) == len(kept) + 2 and again[: len(kept)] == kept
    assert {(row["contender"], row["mode"]) for row in again[-2:]} == lost
    assert len(built) == 1 and built[0][0].batch == 2


def test_a_dry_run_cannot_write_results_and_a_cpu_gives_none(capsys):
    run = load("run")
    for words, message in (
        (
            ["--dry-run", "--device", "cpu", "--out", str(run.RESULTS / "x")],
            "does not write to bench/results",
        ),
        (["--device", "cpu"], "a CPU's times are no results"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_red_results_stop_the_run(monkeypatch, tmp_path):
    run = load("run")
    monkeypatch.setattr(run, "quick_check", lambda device, dtype: ["D=1: out is off by 1e+00"])
    monkeypatch.setattr(run, "measure_shape", lambda *a: pytest.fail("nothing may be timed"))
    assert run.main(["--dry-run", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_contender_is_not_timed(monkeypatch):
    run = load("run")
    shape = run.problems.Shape(1, 16, 8, "easy", tokens=5)
    problem = run.problems.build(shape, run.torch.float32, "cpu", 1000)
    good = run.contenders.ALL[1]
    assert run.prepare(good, problem, "both", "cpu")[0] is not None

    def wrong(problem):
        ready = good.make(problem)
        return run.contenders.Ready(lambda x: 1.2 * ready.call(x), ready.parameters)

    subject, told = run.prepare(run.dataclasses.replace(good, make=wrong), problem, "both", "cpu")
    assert subject is None and told["failed"] == "wrong result, not timed" and told["error_out"] > 0.1


def test_shapes_come_in_order_of_importance_and_cover_the_plan():
    problems = load("problems")
    found = problems.shapes()
    assert all(s.width == 768 and s.state in (32, 64) and s.batch in (64, 256) for s in found[:8])
    assert len(found) == len(set(found)) == 3 * 6 * 5 * 2


def test_counted_bytes_and_operations():
    problems = load("problems")
    import torch

    counted = problems.counts(problems.Shape(2, 10, 4, "easy", tokens=3), torch.bfloat16, 5.0)
    assert counted["forward"] == ((2 * 6 * 10 + 6 * 4 + 96) * 2, 4 * 6 * 10 * 4 + 2 * 6 * 16 * 4)
    assert counted["both"] == tuple(map(sum, zip(counted["forward"], counted["backward"], strict=True)))


def test_the_table_holds_committed_rows_only(tmp_path):
    table = load("table")
    row = {
        "kind": "time", "contender": "lion-fast", "mode": "forward", "batch": 64, "width": 768, "state": 32,
        "problem": "easy", "applications": 5.0, "us": 2.0, "us_20": 1.0, "us_80": 3.0, "copy_percent": 50.0,
        "matrix_percent": 5.0, "peak_bytes": 10**6, "saved_bytes": None, "device": "A device",
        "dtype": "bf16", "revision": "abc", "torch": "2", "triton": "3",
    }  # fmt: skip
    peer = {**row, "contender": "peer", "us": 9.0}
    roof = {
        "kind": "ceilings",
        "copy": 4e12,
        "bf16": 7e14,
        "tf32": 3e14,
        "device": "A device",
        "revision": "abc",
    }
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)

    def git(*words):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def write(name, *rows):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    git("init", "-q")
    write("a.jsonl", roof, row, peer, {**row, "contender": "dry", "dry_run": True}, {**row, "device": "cpu"})
    git("add", "."), git("commit", "-qm", "rows")
    write("b.jsonl", {**row, "contender": "not committed"})
    write("a.jsonl", {**row, "contender": "changed since"})
    rows = table.committed_rows(tmp_path)
    assert len(rows) == 3
    text = table.markdown(rows)
    assert "| 768 | 32 | 64 | easy | forward | peer | 5.0 | 9.0 (1.0, 3.0) | 50 | 5 | 1 |  | 4.5 |" in text
    assert "4.00 TB/s" in text and "committed" not in text and "changed" not in text
    assert table.markdown([]) == table.NOTHING


def test_the_dry_run_measures_sparse_forms_beside_dense(dry):
    _, rows, printed = dry
    rows = [r for r in rows if r["kind"] == "sparse"]
    assert "0 sparse cases left out" in printed
    found = {(r["granularity"], r["block"]) for r in rows}
    assert found == {
        ("block", 16),
        ("block", 32),
        ("block", 64),
        ("unit", None),
        ("element", None),
        ("2:4", None),
    }
    assert [r for r in rows if "failed" in r] == []
    for row in rows:
        reason = row.get("skipped")
        if row["contender"] in ("dense fused", "dense loop", "block-sparse fused", "compacted"):
            assert 0 < row["us_20"] <= row["us"] <= row["us_80"], row
            assert row["error_out"] < 3e-2 and {"peak_bytes", "saved_bytes", "revision"} <= set(row)
            assert (row["error_dx"] is None) == (row["mode"] == "forward")
        elif row["granularity"] == "2:4" and row["mode"] == "backward":
            assert reason == "2:4 is for inference here"
        elif row["granularity"] == "2:4":
            assert reason == "A: 2:4 products need a CUDA device, not cpu"
        else:
            assert row["contender"] in ("BSR loop", "CSR loop") and "on a CPU has no sparse product" in reason
    modes = {(r["contender"], r["mode"]) for r in rows if "us" in r}
    assert {
        ("block-sparse fused", "backward"),
        ("compacted", "backward"),
        ("dense fused", "forward"),
    } <= modes
    dead = {r["granularity"]: r["dead"] for r in rows if r["block"] in (None, 16)}
    assert dead == {"block": 0.5, "unit": 0.5, "element": 0.5, "2:4": 0.5}


def test_sparse_cases_begin_with_the_target():
    sparse = load("sparse")
    found = sparse.cases()
    first = found[0]
    assert (first.width, first.state, first.form, first.sparsity) == (768, 768, "block 64", 0.75)
    assert len(found) == len(set(found)) == 6 * (6 * 5 + 1)
    assert {c.sparsity for c in found if c.state == 64} == {0, 0.25, 0.5, 0.75, 0.9, 0.95}


def made_case(sparse, granularity, block=None, state=64, width=64, sparsity=0.5):
    import torch

    case = sparse.Case(width, state, granularity, sparsity, block)
    shape = sparse.problems.Shape(2, width, state, "sparse", tokens=7)
    return sparse.build(case, shape, sparse.draw_tokens(shape, torch.float32, "cpu", 1000))


def test_masks_drop_whole_groups():
    sparse = load("sparse")
    for sparsity, kept in ((0.0, 16), (0.75, 4), (0.95, 1), (1.0, 1)):
        masks = made_case(sparse, "block", 16, sparsity=sparsity).masks
        for mask in masks.values():
            tiles = mask.view(4, 16, 4, 16).float().mean((1, 3))
            assert set(tiles.unique().tolist()) <= {0.0, 1.0} and tiles.sum() == kept
    units = made_case(sparse, "unit", sparsity=0.75).masks
    assert units["W"].sum() == 16**2 and (units["A"].any(1) == units["V"].any(0)).all()
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in made_case(sparse, "2:4").masks.values())
    problem = made_case(sparse, "element", sparsity=0.9)
    assert abs(problem.masks["W"].float().mean() - 0.1) < 1e-3
    assert (problem.free[1] != 0).sum() <= problem.masks["W"].sum()
    assert 3 < problem.steps["free"] < 50


@pytest.mark.parametrize(
    ("granularity", "block", "state", "width"),
    [("block", 16, 64, 96), ("block", 32, 72, 40), ("unit", None, 40, 24), ("element", None, 48, 40)],
)
def test_every_sparse_contender_equals_dense_with_zeros(granularity, block, state, width):
    run = load("run")
    sparse = run.sparse
    problem = made_case(sparse, granularity, block, state, width, 0.75)
    names, expected = set(), {}
    for contender in sparse.chosen(problem.case):
        subject, told = run.prepare(contender, problem, "backward", "cpu")
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
            assert run.relative(got, target) < 5e-3, (contender.name, name)
    assert len(names) >= 3


def test_the_two_of_four_contenders_equal_dense_with_zeros(monkeypatch):
    run = load("run")
    sparse = run.sparse
    monkeypatch.setattr(sparse.two_of_four, "why_not", lambda *a: None)
    monkeypatch.setattr(sparse.two_of_four, "compress", lambda matrix: matrix)
    problem = made_case(sparse, "2:4")
    for contender in sparse.chosen(problem.case):
        subject, told = run.prepare(contender, problem, "forward", "cpu")
        assert subject is not None and told["error_out"] < 2e-3, (contender.name, told)
