"""lion-fast bench: rows on the disk, runs that go on where another stopped, the command."""

import csv
import json

import pytest

from lion_fast.commands import bench as command
from lion_fast.commands.main import main
from lion_fast.errors import DataError
from lion_fast.studies.cost import measure, plan, report, rows, run, timing
from lion_fast.studies.cost.rows import Store
from lion_fast.studies.cost.setting import Contender, Setting, keys

TINY = "vit_tiny_patch16_224"
SMALL = ["--backbones", TINY, "--img-size", "32", "--batch-sizes", "1"]


def test_rows_come_back_from_their_files(tmp_path, measured):
    store = Store(tmp_path)
    store.add(measured)
    assert Store(tmp_path).rows == json.loads(json.dumps(measured)) == rows.read(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    rows.write_csv(store.rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(measured)
    lion = next(line for line in table if line["label"] == "lion:residual" and line["mode"] == "train")
    assert (
        int(lion["activation_bytes.backbone"])
        == row_of(measured, "lion:residual")["activation_bytes"]["backbone"]
    )
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(DataError, match="holds no measurement rows"):
        Store(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        rows.read(tmp_path / "nothing.json")


def test_a_run_skips_what_is_there_and_measures_what_is_not(tmp_path, monkeypatch):
    asked = []

    def fake(setting, contenders, *, device, rounds, where, say):
        asked.append((setting.mode, [c.label() for c in contenders]))
        bare = {"status": "ok", "reason": None}
        return [{"key": key, **bare, **where} for key in keys(setting, contenders)]

    monkeypatch.setattr(run, "measure", fake)
    a, b = Contender("lion", form="residual"), Contender("probe")
    one, two = Setting(TINY, "train", 2), Setting(TINY, "infer", 2)
    counts = {"settings": 1, "measured": 2, "held": 0, "left": 0, "lost": None}
    assert run.run([(one, [a])], Store(tmp_path)) == counts
    told = run.run([(one, [a, b]), (two, [a])], Store(tmp_path))
    assert told == counts | {"settings": 2, "measured": 4, "held": 1}
    assert asked == [("train", ["lion:residual"]), ("train", ["probe"]), ("infer", ["lion:residual"])]
    assert run.run([(one, [a, b])], Store(tmp_path))["measured"] == 0
    assert run.run([(one, [a, b])], Store(tmp_path), again=True)["measured"] == 3
    assert run.run([(one, [a]), (two, [a, b])], Store(tmp_path), minutes=0)["left"] == 1
    # another revision, or a failure: measured anew
    store = Store(tmp_path)
    for row in store.rows:
        row["git_code"] = "another"
    store.write()
    assert run.run([(two, [a])], Store(tmp_path))["measured"] == 2
    store = Store(tmp_path)
    store.add([{**store.rows[-1], "status": "failed"}])
    assert run.run([(two, [a])], Store(tmp_path))["measured"] == 2
    assert len(Store(tmp_path).rows) == 5


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real, calls = run.measure, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "measure", stop_at_second)
    options = [*SMALL, "--methods", "probe", "--rounds", "1"]
    argv = ["bench", *options, "--out", str(tmp_path), "--no-progress"]
    assert main(argv) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert [row["mode"] for row in rows.read(tmp_path)] == ["infer"] * 2
    assert (tmp_path / "report.md").exists()
    assert main(argv) == 0
    assert len(calls) == 3 and len(rows.read(tmp_path)) == 4


def test_the_command(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    options = [*SMALL, "--methods", "probe", "lion"]
    options += ["--rounds", "1", "--modes", "train"]
    assert main(["bench", *options, "--out", str(old), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"] == 4 and told["failed"] == [] and told["regressions"] == []
    assert "x floor" in (old / "report.md").read_text()
    # the same rows, but a million times as fast, on whatever machine: everything regressed
    body = json.loads((old / "rows.json").read_text())
    for row in body["rows"]:
        for name in ("seconds", "seconds_q20", "seconds_q80"):
            row[name] /= 1e6
    (old / "rows.json").write_text(json.dumps(body))
    again = ["bench", *options, "--out", str(new), "--compare", str(old / "rows.json")]
    assert main(again) == 1
    assert capsys.readouterr().out.count("regression: ") == 4
    assert main([*again, "--threshold", "1e9"]) == 0
    assert "no regressions" in capsys.readouterr().out


def test_wrong_options_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "never")]
    for argv, words in (
        (["--modes", "sleep"], "mode must be one of infer, train; got 'sleep'"),
        (["--methods", "magic"], "method must be one of"),
        (["--batch-sizes", "0"], "every batch size must be at least 1"),
        (["--dtypes", "int4"], "dtype must be one of fp32, bf16, fp8"),
        (["--engines", "magic"], "engine must be one of eager, compile, graphs"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--full", "--methods", "lion"], "--plan full is a plan of its own; leave out --methods"),
        (["--plan", "first", "--lengths", "5"], "--plan first is a plan of its own; leave out --lengths"),
        (["--plan", "first", "--device", "cpu"], "needs a CUDA device"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--dtypes", "fp8", "--device", "cpu"], "needs a CUDA device"),
    ):
        assert main(["bench", *argv, *out]) == 2, argv
        assert words in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "missing.json"), *out]) == 1
    assert main(["bench", "--report-only", *out]) == 1
    assert main(["bench", "--backbones", "vit_of_nobody", *out]) == 1
    assert "no backbone named 'vit_of_nobody'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def small_command(out, *more):
    """The command of a plan that a test can wait for: three contenders beside the floor of a ViT-Ti."""
    options = [*SMALL, "--rounds", "2", "--lengths", "2"]
    options += ["--methods", "probe", "vpt", *more]
    return ["bench", *options, "--rows-only", "--device", "cpu", "--no-progress", "--out", str(out)]


def test_rows_only_and_a_report_of_them_later(tmp_path, monkeypatch, capsys):
    """All of one setting is on the disk before the next begins, and nothing but rows."""
    real, seen = run.measure, []

    def look(setting, *args, **kwargs):
        seen.append([p.name for p in tmp_path.iterdir()])
        return real(setting, *args, **kwargs)

    monkeypatch.setattr(run, "measure", look)
    assert main(small_command(tmp_path)) == 0
    assert seen == [[], ["rows.json"]]
    before = (tmp_path / "rows.json").read_bytes()
    (tmp_path / "rows.json.new").write_bytes(before[: len(before) // 2])  # killed while it wrote the next
    assert main(["bench", "--report-only", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.md")
    assert (tmp_path / "rows.json").read_bytes() == before and len(seen) == 2
    text, table = (tmp_path / "report.md").read_text(), (tmp_path / "rows.csv").read_text()
    assert all(f"`{row['label']}`" in text and row["key"] in table for row in rows.read(tmp_path))
    assert list(tmp_path.glob("throughput-*.png"))


def test_a_contender_that_breaks_while_it_is_timed_costs_nobody_else(tmp_path, monkeypatch, capsys):
    times = []
    timed = timing.timed

    def fail(step, repeats):
        times.append(step.contender.label())
        if times[-1] == "vpt(length=2):naive" and times.count(times[-1]) == 3:  # two to warm up
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return timed(step, repeats)

    monkeypatch.setattr(timing, "timed", fail)
    assert main(small_command(tmp_path, "--modes", "infer")) == 1
    assert "CUDA out of memory" in capsys.readouterr().out
    found = {row["label"]: row for row in rows.read(tmp_path)}
    bad = found.pop("vpt(length=2):naive")
    assert bad["status"] == "failed" and "seconds" not in bad
    assert len(found) == 4 and all(r["status"] == "ok" and r["rounds"] == 2 for r in found.values())
    times.clear()
    assert main(small_command(tmp_path, "--modes", "infer")) == 1  # tried again, beside the floor alone
    assert set(times) == {"floor", "vpt(length=2):naive"}


def test_a_new_process_goes_on_behind_what_lost_the_device(tmp_path, monkeypatch, capsys):
    asked = []

    def fake(setting, contenders, *, where, **_):
        asked.append((setting.mode, [c.form or c.method for c in contenders]))
        found = [{"key": k, "status": "ok", "reason": None, **where} for k in keys(setting, contenders)]
        bad = [i for i, c in enumerate(contenders, 1) if c.form == "naive"]
        if bad:
            row = {**found[bad[0]], "status": "failed", "reason": str(STICKY)}
            raise measure.DeviceLost(row["key"], [row]) from STICKY
        return found

    monkeypatch.setattr(run, "measure", fake)

    def run(*more):
        asked.clear()
        return main([*small_command(tmp_path, "--modes", "infer", "train"), *more]), list(asked)

    others, everything = ["probe", "exact", "vpt"], ["probe", "exact", "naive", "vpt"]
    assert run() == (command.EXIT_LOST, [("infer", everything)])
    assert (
        f"the device failed in {TINY}@32/infer/b1/fp32/eager/vpt(length=2):naive" in capsys.readouterr().err
    )
    assert run() == (4, [("infer", others), ("train", everything)])
    # what lost it comes last, by itself, and is left alone when it did so twice
    assert run() == (4, [("train", others), ("infer", ["naive"])])
    assert run() == (4, [("train", ["naive"])])
    assert run() == (1, [])
    found = rows.read(tmp_path)
    assert [row["losses"] for row in found if row["status"] == "failed"] == [2, 2]
    assert sum(row["status"] == "ok" for row in found) == 2 * 4
    assert run("--again")[1] == [("infer", everything)]


def test_the_help_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for words in (plan.MODES, plan.DTYPES, plan.ENGINES):
        assert ", ".join(words) in text
    assert command.DEFAULT_OUT in text and f"[{report.THRESHOLD}]" in text
