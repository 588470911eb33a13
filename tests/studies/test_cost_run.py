"""lion-fast bench: rows on the disk, runs that go on where another stopped, the command."""

import json

import pytest

from lion_fast.commands import bench as command
from lion_fast.commands.main import main
from lion_fast.studies.cost import compare, measure, plan, run, timing
from lion_fast.studies.cost.setting import Contender, Setting, keys
from lion_fast.studies.rows import Store, read_rows

TINY = "vit_tiny_patch16_224"
# The setting of commands that a test can wait for.
SMALL = ["--backbones", TINY, "--img-size", "32", "--batch-sizes", "1"]


def small_command(out, *more):
    """The command of a plan that a test can wait for: three contenders beside the floor of a ViT-Ti."""
    options = [*SMALL, "--rounds", "2", "--lengths", "2", "--methods", "probe", "vpt", *more]
    return ["bench", *options, "--rows-only", "--device", "cpu", "--no-progress", "--out", str(out)]


def bare_rows(setting, contenders, where):
    """What `measure` might give, without a time."""
    return [{"key": key, "status": "ok", "reason": None, **where} for key in keys(setting, contenders)]


def append(folder, rows):
    with Store(folder) as store:
        store.add(*rows)


def test_a_run_skips_what_is_there_and_measures_what_is_not(tmp_path, monkeypatch):
    asked = []

    def fake(setting, contenders, *, device, rounds, where, say):
        asked.append((setting.mode, [c.label() for c in contenders]))
        return bare_rows(setting, contenders, where)

    def told(*plan, **options):
        with Store(tmp_path) as store:
            return run.run(list(plan), store, **options)

    monkeypatch.setattr(run, "measure", fake)
    a, b = Contender("lion", form="residual"), Contender("probe")
    one, two = Setting(TINY, "train", 2), Setting(TINY, "infer", 2)
    counts = {"settings": 1, "measured": 2, "held": 0, "left": 0, "lost": None}
    assert told((one, [a])) == counts
    assert told((one, [a, b]), (two, [a])) == counts | {"settings": 2, "measured": 4, "held": 1}
    assert asked == [("train", ["lion:residual"]), ("train", ["probe"]), ("infer", ["lion:residual"])]
    assert told((one, [a, b])) == counts | {"measured": 0, "held": 2}
    assert told((one, [a, b]), again=True)["measured"] == 3
    assert told((one, [a]), (two, [a, b]), minutes=0)["left"] == 1
    # another revision, or a failure: measured anew
    append(tmp_path, [{**row, "git_code": "another"} for row in read_rows(tmp_path)])
    assert told((two, [a]))["measured"] == 2
    append(tmp_path, [{**read_rows(tmp_path)[-1], "status": "failed"}])
    assert told((two, [a]))["measured"] == 2
    assert len(read_rows(tmp_path)) == 5


def test_rows_of_the_older_file_are_held(tmp_path, monkeypatch):
    """As released versions wrote them, all in one rows.json; it stays as it is."""
    setting, probe = Setting(TINY, "infer", 2), Contender("probe")
    old = bare_rows(setting, [probe], run.context(run.torch.device("cpu")))
    text = json.dumps({"format": 1, "written": "2026-01-01T00:00:00Z", "rows": old})
    (tmp_path / "rows.json").write_text(text)
    monkeypatch.setattr(run, "measure", lambda *args, **options: pytest.fail("they are there"))
    with Store(tmp_path) as store:
        assert run.run([(setting, [probe])], store)["held"] == 1
    assert (tmp_path / "rows.json").read_text() == text and read_rows(tmp_path / "rows.json") == old


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
    assert "goes on from there" in capsys.readouterr().err
    assert [row["mode"] for row in read_rows(tmp_path)] == ["infer"] * 2
    assert (tmp_path / "report.md").exists()
    assert main(argv) == 0
    assert len(calls) == 3 and len(read_rows(tmp_path)) == 4


def test_the_command_and_a_comparison(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    options = [*SMALL, "--methods", "probe", "lion", "--rounds", "1", "--modes", "train"]
    assert main(["bench", *options, "--out", str(old), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"] == 4 and told["failed"] == [] and told["regressions"] == []
    assert "x floor" in (old / "report.md").read_text()
    # the same rows, but a million times as fast, on whatever machine: everything regressed
    names = ("seconds", "seconds_q20", "seconds_q80")
    append(old, [row | {name: row[name] / 1e6 for name in names} for row in read_rows(old)])
    again = ["bench", *options, "--out", str(new), "--compare", str(old / "rows.jsonl")]
    assert main(again) == 1
    assert capsys.readouterr().out.count("regression: ") == 4
    assert main([*again, "--threshold", "1e9"]) == 0
    assert "no regressions" in capsys.readouterr().out


def test_wrong_options_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "never")]
    for argv, words in (
        (["--modes", "sleep"], "infer, train; got 'sleep'"),
        (["--methods", "magic"], "method"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--dtypes", "int4"], "fp32, bf16, fp8"),
        (["--engines", "magic"], "eager, compile, graphs"),
        (["--rounds", "0"], "--rounds"),
        (["--full", "--methods", "lion"], "leave out --methods"),
        (["--plan", "first", "--lengths", "5"], "leave out --lengths"),
        (["--plan", "first", "--device", "cpu"], "needs a CUDA device"),
        (["--device", "nowhere"], "'nowhere'"),
        (["--dtypes", "fp8", "--device", "cpu"], "needs a CUDA device"),
    ):
        assert main(["bench", *argv, *out]) == 2, argv
        assert words in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "missing.json"), *out]) == 1
    assert main(["bench", "--report-only", *out]) == 1
    assert main(["bench", "--backbones", "vit_of_nobody", *out]) == 1
    assert "'vit_of_nobody'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_rows_only_and_a_report_of_them_later(tmp_path, monkeypatch, capsys):
    """All of one setting is on the disk before the next begins, and nothing but rows."""
    real, seen = run.measure, []

    def look(setting, *args, **kwargs):
        seen.append((len(read_rows(tmp_path)), [p.name for p in tmp_path.iterdir()]))
        return real(setting, *args, **kwargs)

    monkeypatch.setattr(run, "measure", look)
    assert main(small_command(tmp_path)) == 0
    assert seen == [(0, ["rows.jsonl"]), (5, ["rows.jsonl"])]
    before = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(before + before[:99])  # killed while it wrote the next
    assert main(["bench", "--report-only", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.md")
    text, table = (tmp_path / "report.md").read_text(), (tmp_path / "rows.csv").read_text()
    found = read_rows(tmp_path)
    assert len(found) == 10 and len(seen) == 2
    assert all(f"`{row['label']}`" in text and row["key"] in table for row in found)
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
    found = {row["label"]: row for row in read_rows(tmp_path)}
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
        found = bare_rows(setting, contenders, where)
        bad = [i for i, c in enumerate(contenders, 1) if c.form == "naive"]
        if bad:
            row = {**found[bad[0]], "status": "failed", "reason": "CUDA error: an illegal memory access"}
            raise measure.DeviceLost(row["key"], [row])
        return found

    monkeypatch.setattr(run, "measure", fake)

    def again(*more):
        asked.clear()
        return main([*small_command(tmp_path, "--modes", "infer", "train"), *more]), list(asked)

    others, everything = ["probe", "exact", "vpt"], ["probe", "exact", "naive", "vpt"]
    assert again() == (command.EXIT_LOST, [("infer", everything)])
    assert f"{TINY}@32/infer/b1/fp32/eager/vpt(length=2):naive" in capsys.readouterr().err
    assert again() == (4, [("infer", others), ("train", everything)])
    # what lost it comes last, by itself, and is left alone when it did so twice
    assert again() == (4, [("train", others), ("infer", ["naive"])])
    assert again() == (4, [("train", ["naive"])])
    assert again() == (1, [])
    found = read_rows(tmp_path)
    assert [row["losses"] for row in found if row["status"] == "failed"] == [2, 2]
    assert sum(row["status"] == "ok" for row in found) == 2 * 4
    assert again("--again")[1] == [("infer", everything)]


def test_the_help_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for words in (plan.MODES, plan.DTYPES, plan.ENGINES):
        assert ", ".join(words) in text
    assert command.DEFAULT_OUT in text and f"[{compare.THRESHOLD}]" in text
