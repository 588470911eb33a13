"""The driver of the GPU run: steps that hang, break or lose the device, all of it rehearsed on a CPU, and the
table of its rows."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rows as stage
import run
import table
from git_helpers import git
from image_helpers import class_folders

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_revision")
# What may come back from the machine: few files, not deep, with plain names.
PLAIN = re.compile(r"([A-Za-z0-9._-]+/){0,2}[A-Za-z0-9._-]+")


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
    assert "frist" in capsys.readouterr().err
    assert run.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(listed, key=run.STAGES.index)
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
    (file,) = out.glob("gpu-*.jsonl")
    kinds = {json.loads(line)["kind"] for line in file.read_text().splitlines()}
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
    errors = {"out": 1e-3, "dx": 2e-3}
    right = {"kind": "check", "what": "solve R=64", "errors": errors, "bound": 2e-2, "right": True}
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
