"""The demonstration on a tiny backbone and small images: every file, every number from its source."""

import csv
import json
import struct

import pytest
import torch
from training_helpers import tiny_backbone, write_images

import lion_fast
from lion_fast.commands.main import main
from lion_fast.data import load_data, transforms
from lion_fast.studies import demo
from lion_fast.studies import figures as plots
from lion_fast.training import evaluate

COMMON = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "log_every": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    backbone = tiny_backbone()
    splits = load_data(write_images(out / "images"))
    told = demo.run(out / "run", common=COMMON, splits=splits, backbone=backbone, quiet=True)
    return out / "run", told, backbone, splits


def test_every_method_has_a_row_that_its_adapter_confirms(ran):
    out, told, backbone, splits = ran
    rows = list(csv.DictReader(open(out / "results.csv")))
    assert [row["method"] for row in rows] == ["probe", "vpt", "lion"]
    for row in rows:
        model = lion_fast.load_adapter(out / row["method"] / "adapter", backbone=backbone)
        metrics = evaluate(model, splits.test.with_transform(transforms(backbone)))
        assert float(row["accuracy"]) == metrics.accuracy
        assert float(row["balanced_accuracy"]) == metrics.balanced_accuracy
        assert int(row["parameters_with_head"]) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        # so small a model may fit into memory that the process holds free
        assert float(row["peak_memory_mb"]) >= 0 and row["memory_measured"].startswith("rise of the resident")
        assert float(row["milliseconds_per_image"]) > 0
        for name in (
            "weights_sha256",
            "mean",
            "std",
            "interpolation",
            "img_size",
            "dtype",
            "seed",
            "torch",
            "device",
        ):
            assert row[name] != "", name
    # R D + R^2 + R, D = 32, R = 32; two blocks of ten prompts; a head of 32 x 3 + 3
    assert [int(row["parameters"]) for row in rows] == [0, 2 * 10 * 32, 32 * 32 + 32 * 32 + 32]
    assert int(rows[0]["parameters_with_head"]) == 99
    assert [row["method"] for row in told["rows"]] == ["probe", "vpt", "lion"]


def test_all_methods_saw_the_same_split(ran):
    out, _, _, splits = ran
    assert json.loads((out / "splits.json").read_text())["fingerprint"] == splits.description["fingerprint"]
    rows = list(csv.DictReader(open(out / "epochs.csv")))
    assert {row["method"] for row in rows} == {"probe", "vpt", "lion"} and all(
        row["val_accuracy"] for row in rows
    )


def test_plots_are_pictures_and_the_report_shows_them(ran):
    out = ran[0]
    report = (out / "report.md").read_text()
    for name in ("accuracy_over_epochs", "accuracy_against_parameters", "solver"):
        data = (out / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 500
        assert f"({name}.png)" in report
    assert "| linear probe |" in report and "| LION " in report and "{" not in report.split("## Settings")[0]


def test_a_second_demo_replaces_the_first(ran, tmp_path):
    out, told, backbone, splits = ran
    again = demo.run(out, common=COMMON, splits=splits, backbone=backbone, quiet=True)
    for ours, theirs in zip(again["rows"], told["rows"], strict=True):
        assert ours["accuracy"] == theirs["accuracy"] and ours["loss"] == theirs["loss"]


def test_without_network_and_cache_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lion-fast demo: error: ") and "LION_FAST_OFFLINE" in error


def test_an_unwritable_output_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_data", lambda *a, **k: pytest.fail("fetched"))
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file/run")]) == 1
    assert "cannot write to the output folder" in capsys.readouterr().err


def test_wilson_is_the_root_of_its_definition():
    """The ends of the interval are the shares p with |seen - p| = 1.96 sqrt(p (1 - p) / n)."""
    for share, n in ((0.8, 50), (0.5, 1000), (0.02, 200)):
        for p in plots.wilson(share, n):
            assert abs(share - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=1e-9)
    assert plots.wilson(1.0, 10)[1] == 1.0 and plots.wilson(0.0, 10)[0] == 0.0


def test_the_table_lines_up():
    row = {"method": "lion", "accuracy": 0.5, "balanced_accuracy": 0.4, "parameters": 51232, "n": 9}
    row |= {
        "parameters_with_head": 55000,
        "training_seconds": 3,
        "milliseconds_per_image": 1,
        "peak_memory_mb": 8,
    }
    lines = demo.format_table([row, row | {"method": "x"}], {"lion": "LION"}).splitlines()
    assert len({len(line) for line in lines}) == 1 and "51,232" in lines[2]


def test_time_per_image_leaves_the_model_as_it_computes():
    model = lion_fast.create(tiny_backbone(), "lion", num_classes=3, seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = demo.time_per_image([model, model], batch=2, repeats=3)
    assert 0 < first < 1 and 0 < second < 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
