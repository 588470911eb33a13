"""Accuracy against what is kept: the command on a tiny backbone, and the committed rows in its plan."""

import importlib.util
from pathlib import Path

import pytest
from training_helpers import tiny_backbone, write_images

from lion_fast.studies import pruning
from lion_fast.studies.rows import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("script", ROOT / "bench" / "pruning_accuracy.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


def test_the_command_measures_goes_on_and_draws(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pruning, "load_backbone", lambda name, img_size: tiny_backbone())
    monkeypatch.setattr(pruning, "READING", pruning.READING | {"at": 1})
    given = ["--data", str(write_images(tmp_path / "noise")), "--img-size", "32", "--state-dim", "8"]
    given += ["--n-train", "12", "--n-test", "12", "--epochs", "1", "--seeds", "1", "--keep", "0.5"]
    given += ["--granularity", "element", "--criterion", "magnitude", "--out", str(tmp_path / "rows.json")]
    assert main([*given, "--minutes", "0"]) == 3
    with pytest.raises(SystemExit):
        main([*given, "--plot", str(tmp_path / "none.png")])
    assert main(given) == 0
    dense, robust, once = read_rows(tmp_path / "rows.json")
    assert [row["how"] for row in (dense, robust, once)] == ["dense", "robust", "one shot"]
    assert {row["test_images"] for row in (dense, robust, once)} == {12} and dense["device"] == "cpu"
    for row in (robust, once):
        a, w = row["kept_shares"].values()
        assert a * 32 * 8 + w * 8 * 8 == pytest.approx(0.5 * (32 * 8 + 8 * 8), abs=1)
        assert row["parameters"]["kept"] < row["parameters"]["dense"] == dense["parameters"]["kept"]
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert main(given) == 0 and "0 settings to measure, 3 rows are there" in capsys.readouterr().out
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert main([*given, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_rows_are_of_the_plan():
    rows = read_rows(ROOT / "bench" / "results" / "pruning_accuracy.json")
    plan = pruning.plan(pruning.Settings())
    assert len(rows) == 198 and all(row["key"] in plan for row in rows)
