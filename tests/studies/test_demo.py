"""The demonstration on a tiny backbone and small images: every file, every number from its source."""

import struct
from pathlib import Path

import pytest
import torch
from training_helpers import TINY, tiny_backbone, write_images

import lion_fast
from lion_fast.commands.main import main
from lion_fast.data import load_data, transforms
from lion_fast.errors import OptionError
from lion_fast.studies import demo, experiment, work
from lion_fast.studies.rows import read_rows
from lion_fast.studies.statistics import wilson
from lion_fast.training import TrainingError, evaluate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    images = write_images(out / "images")
    grids = [
        tiny(demo.strokes(), "noise", images, 32),
        tiny(demo.colour("furniture", ""), "more", images, 48),
    ]
    told = demo.run(out / "run", grids=grids, quiet=True)
    return out / "run", told, grids, load_data(images, seed=0)


def tiny(grid, name, images, img_size):
    backbone = {"name": "vit_tiny_patch16_224", "img_size": img_size, "random": True} | TINY
    methods = {
        label: spec | {"train": spec["train"] | {"epochs": 2, "batch_size": 8}}
        for label, spec in grid["methods"].items()
    }
    return grid | {
        "backbones": {"tiny": backbone},
        "sets": {name: {"source": str(images)}},
        "train": grid["train"] | {"log_every": 1, "device": "cpu"},
        "methods": methods,
    }


def test_every_method_has_a_row_that_its_adapter_confirms(ran):
    out, told, grids, splits = ran
    opened = [work.open_backbone(grid["backbones"]["tiny"]) for grid in grids]
    backbones = dict(zip(("noise", "more"), opened, strict=True))
    rows = [row for row in read_rows(out) if row["stage"] == "final"]
    assert rows == told["rows"] and [row["method"] for row in rows] == 2 * ["probe", "vpt", "lion"]
    assert [row["set"] for row in rows] == 3 * ["noise"] + 3 * ["more"]
    for row in rows:
        backbone, place = backbones[row["set"]], out / row["set"] / row["method"]
        model = lion_fast.load_adapter(place / "adapter", backbone=backbone)
        metrics = evaluate(model, splits.test.with_transform(transforms(backbone)))
        assert row["test"]["accuracy"] == metrics.accuracy
        assert row["test"]["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy, abs=1e-12)
        assert row["parameters"]["with_head"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        # so small a model may fit into memory that the process holds free
        assert row["peak_memory_bytes"] >= 0 and row["memory_measured"].startswith("rise of the resident")
        assert row["milliseconds_per_image"] > 0 and row["train"]["keep"] == "best"
        assert row["data"]["fingerprint"] == splits.description["fingerprint"]
        assert all(epoch["val_accuracy"] for epoch in demo._csv(place / "metrics.csv"))
    # two blocks of ten prompts, D = 32; a head of 32 x 3 + 3; what LION reads is its own choice
    assert [row["parameters"]["method"] for row in rows if row["method"] != "lion"] == 2 * [0, 2 * 10 * 32]
    assert rows[0]["parameters"]["with_head"] == 99


def test_plots_are_pictures_and_the_report_shows_them(ran):
    out = ran[0]
    report = (out / "report.md").read_text()
    for name in demo.PLOTS:
        data = (out / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 500
        assert f"({name})" in report
    assert all(
        f"| {name} | {label} |" in report for name in ("noise", "more") for label in ("VPT-deep", "LION")
    )
    assert "{" not in report.split("## Settings")[0]


def test_a_second_demo_replaces_the_first(ran):
    out, told, grids, _ = ran
    (out / "lion").mkdir()  # where earlier versions had the only set's
    again = demo.run(out, grids=grids, quiet=True)
    # the draw of images, which is one, and a row a method and set
    assert len(read_rows(out)) == 1 + 6 and not (out / "lion").exists()
    for ours, theirs in zip(again["rows"], told["rows"], strict=True):
        assert ours["test"] == theirs["test"]


def test_a_training_that_diverges_is_told(ran, tmp_path, monkeypatch):
    def diverges(*args, **more):
        raise TrainingError("the loss is nan at step 1; the last checkpoint is there")

    monkeypatch.setattr(work, "fit", diverges)
    with pytest.raises(TrainingError, match="LION: the loss is nan"):
        demo.run(tmp_path, grids=ran[2], quiet=True)


def test_the_table_of_the_readme_is_that_of_the_committed_rows():
    rows = [row for row in read_rows(ROOT / "bench/results/demo") if row["stage"] == "final"]
    readme = (ROOT / "README.md").read_text()
    assert {row["label"] for row in rows} == set(demo.strokes()["methods"])
    for line in demo.table(rows)[2:]:
        _, _, accuracy, _, *rest = line.split(" | ")
        assert " | ".join([accuracy, *rest]) in readme


def test_without_network_and_cache_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lion-fast demo: error: ") and "LION_FAST_OFFLINE" in error


@pytest.mark.parametrize(
    "arguments, told", [([], "images: mnist-5k;"), (["--data", "photos"], "images: mnist-5k, pictures;")]
)
def test_without_a_checkout_it_shows_digits_alone_or_your_own_pictures(
    tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.setattr(demo, "FURNITURE", tmp_path / "nowhere/furniture.csv")
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and ("--data FOLDER" in error) == (not arguments)


def test_an_unwritable_output_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run", lambda *a, **k: pytest.fail("fetched"))
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file/run")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [None, '{"stage": "final", "label": "other", "key": "a"}'])
def test_a_folder_of_other_runs_is_not_replaced(ran, tmp_path, rows):
    """lion-fast demo --out runs beside a run called runs/vpt."""
    (tmp_path / "vpt").mkdir()
    (tmp_path / "vpt" / "config.yaml").write_text("a run")
    if rows:
        (tmp_path / "rows.jsonl").write_text(f"{rows}\n")
    with pytest.raises(OptionError, match="other runs"):
        demo.run(tmp_path, grids=ran[2], quiet=True)
    assert (tmp_path / "vpt" / "config.yaml").read_text() == "a run"


def test_wilson_is_the_root_of_its_definition():
    """The ends of the interval are the shares p with |seen - p| = 1.96 sqrt(p (1 - p) / n)."""
    for share, n in ((0.8, 50), (0.5, 1000), (0.02, 200)):
        for p in wilson(share, n):
            assert abs(share - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=1e-9)
    assert wilson(1.0, 10)[1] == 1.0 and wilson(0.0, 10)[0] == 0.0


def test_time_per_image_leaves_the_model_as_it_computes():
    model = lion_fast.create(tiny_backbone(), "lion", num_classes=3, seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = demo.time_per_image([model, model], batch=2, repeats=3)
    assert 0 < first < 1 and 0 < second < 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
