"""Experiments: runs that go on, test images that stay shut, intervals, the report."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from experiment_helpers import (
    ARCHITECTURE,
    LION,
    LION_CELL,
    PROBE,
    SIZES,
    TINY,
    TRAIN,
    grid_of,
    small_grid,
)  # fmt: skip
from training_helpers import write_images

import lion_fast
from lion_fast.backbones.weights import RECIPES
from lion_fast.commands import main as cli
from lion_fast.data import ImageSet, load_data
from lion_fast.errors import DataError
from lion_fast.studies import experiment, report, work
from lion_fast.studies.grid import Grid, same_options
from lion_fast.studies.rows import Store, read_rows, unpack_bits, unpack_integers
from lion_fast.studies.tables import Results
from lion_fast.training import TrainConfig, evaluate, features, fit


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise", classes=3, each=12)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> tuple[Grid, Path, list[dict]]:
    """A whole experiment: its grid, folder and rows."""
    grid, out = grid_of(images), tmp_path_factory.mktemp("whole")
    told = experiment.run(grid, out)
    assert (told.done, told.held, told.left, told.failed) == (8, 0, 0, 0)
    return grid, out, read_rows(out)


@pytest.fixture
def grid(whole) -> Grid:
    return whole[0]


@pytest.fixture
def rows(whole) -> list[dict]:
    """The rows of the whole experiment, to be changed at will."""
    return copy.deepcopy(whole[2])


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A folder of one's own with the rows of the whole experiment."""
    shutil.copy(whole[1] / "rows.jsonl", tmp_path)
    return tmp_path


def runs_of(rows: list[dict], stage: str | None = None, **wanted) -> list[dict]:
    found = [r for r in rows if r["stage"] != "draw" and stage in (None, r["stage"])]
    return [r for r in found if all(r[name] == value for name, value in wanted.items())]


def comparable(rows: list[dict]) -> dict[str, dict]:
    """Rows by key without what a clock or a memory counter says."""
    measured = {"seconds", "training_seconds", "peak_memory_bytes", "last_epoch"}
    return {row["key"]: {k: v for k, v in row.items() if k not in measured} for row in runs_of(rows)}


# -- the plan


def test_whole_plan_tunes_on_validation_and_tests_the_best(rows):
    tune, final = runs_of(rows, "tune"), runs_of(rows, "final")
    assert len(tune) == 4 and len(final) == 4
    assert all(r["test"] is None and "correct" not in r and r["seed"] == 0 for r in tune)
    assert {(r["label"], r["seed"]) for r in final} == set(itertools.product(("probe", "lion-8"), (1, 2)))
    for label in ("probe", "lion-8"):
        scores = {r["configuration"]["train.lr"]: r["val"]["accuracy"] for r in runs_of(tune, label=label)}
        best = max(scores, key=lambda lr: (scores[lr], -lr))  # the earlier of equals has the lower rate here
        assert {r["train"]["lr"] for r in runs_of(final, label=label)} == {best}
    for row in final:
        assert row["train"]["keep"] == "last" and row["epoch_kept"] == row["epochs"] == 1
        assert row["train"]["seed"] == row["seed"] and row["test"]["n"] == 12
        correct = unpack_bits(row["correct"], 12)
        assert correct.mean() == row["test"]["accuracy"]
        labels = unpack_integers(row["labels"])
        recalls = [correct[labels == k].mean() for k in np.unique(labels)]
        assert np.mean(recalls) == pytest.approx(row["test"]["balanced_accuracy"], abs=1e-12)
        # the class token, and 8 states of each of 16 cells
        width = 32 if row["label"] == "probe" else 32 + 16 * 8
        assert row["parameters"]["with_head"] == row["parameters"]["method"] + width * 3 + 3
        assert row["versions"]["torch"] == torch.__version__ and row["device"] == "cpu"
    assert len({r["data"]["fingerprint"] for r in final}) == 2  # a draw each seed, shared by the methods
    draws = [r for r in rows if r["stage"] == "draw"]
    assert [(r["for"], r["seed"]) for r in draws] == [("tune", 0), ("final", 1), ("final", 2)]
    # final runs: every method with the first seed before the second
    assert [r["seed"] for r in final] == [1, 1, 2, 2]


def test_a_row_is_what_training_by_hand_gives(images, rows, tmp_path):
    (row,) = runs_of(rows, "final", label="lion-8", seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = lion_fast.load_backbone(**ARCHITECTURE, pretrained=False)
    splits = load_data(images, seed=2, **SIZES)
    model = lion_fast.create(backbone, "lion", num_classes=3, seed=2, state_dim=8, reading="fixed")
    config = TrainConfig(**TRAIN, lr=row["train"]["lr"], seed=2, keep="last")
    fit(model, splits, config, tmp_path / "fit", progress=False)
    found = evaluate(model, splits.test, 8)
    assert found.accuracy == row["test"]["accuracy"]
    assert found.balanced_accuracy == pytest.approx(row["test"]["balanced_accuracy"], abs=1e-12)
    assert found.loss == pytest.approx(row["test"]["loss"], rel=1e-5)
    assert evaluate(model, splits.val, 8).accuracy == row["val"]["accuracy"]
    assert splits.description["fingerprint"] == row["data"]["fingerprint"]


def test_a_row_names_the_device_asked_for_and_no_unreadable_files_of_a_built_in_set(images, monkeypatch):
    home = work.Workshop(grid_of(images))
    del home.splits("final", "noise", 1).description["skipped"]  # as of a built-in set
    assert home.run(home.grid.item("final", *LION_CELL, 0, 1))["data"]["skipped"] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert home.circumstances("cpu")["device"] == "cpu"


def test_more_test_images_than_rows_may_be_kept(images, tmp_path, monkeypatch):
    """The training images' features fit into the limit, those of the test images do not."""
    grid = grid_of(images, sets={"noise": SIZES | {"n_train": 6}}, methods={"probe": {}})
    found = []
    for name in ("free", "limited"):
        experiment.run(grid, tmp_path / name)
        found.append(runs_of(read_rows(tmp_path / name), "final"))
        monkeypatch.setattr(features, "MEMORY_LIMIT", 4 * TINY["embed_dim"] * 6)
    for free, limited in zip(*found, strict=True):
        assert limited["cached_features"] and limited["correct"] == free["correct"]
        for part in ("val", "test"):
            assert limited[part]["loss"] == pytest.approx(free[part]["loss"], rel=1e-5)


def test_tuning_never_reads_a_test_image_and_a_final_run_reads_each_once(images, tmp_path, monkeypatch):
    grid = grid_of(images)
    read: list[str] = []
    real = ImageSet.image

    def image(self, i):
        read.append(self.names[i])
        return real(self, i)

    monkeypatch.setattr(ImageSet, "image", image)
    home = work.Workshop(grid)
    tested = set(home.splits("final", "noise", 0).test.names)
    experiment.run(grid, tmp_path, stage="tune")
    assert read and not tested & set(read)
    for seed in (1, 2):
        read.clear()
        home.run(grid.item("final", *LION_CELL, 0, seed))
        splits = home.splits("final", "noise", seed)
        for part in (splits.test, splits.val):  # none of them is read in an epoch, as none is chosen
            assert sorted(n for n in read if n in set(part.names)) == sorted(part.names)


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, 8),
        ({"methods": {"a": PROBE | {"method": "probe"}, "b": LION}, "reference": "a", "note": "words"}, 8),
        ({"backbones": {"other": TINY}, "sets": {"grains": SIZES}}, 8),
        ({"train": TRAIN | {"label_smoothing": 0.0, "num_workers": 0}}, 8),
        ({"first": [["tiny", "noise"]]}, 8),
        ({"train": TRAIN | {"label_smoothing": 0.1}}, 0),
        ({"train": TRAIN | {"epochs": 2}}, 0),
        ({"sets": {"noise": SIZES | {"n_test": 11}}}, 0),
        ({"backbones": {"tiny": TINY | {"num_heads": 1}}}, 0),
    ],
)
def test_runs_that_are_there_are_not_done_again_and_other_settings_are_other_runs(
    images, copied, change, held
):
    told = experiment.run(grid_of(images, **change), copied, minutes=0)
    assert (told.done, told.held, told.left) == (0, held, 8 - held)


@pytest.mark.parametrize(
    ("part", "name", "value", "remark"),
    [
        ("options", "gamma", 0.5, "other defaults"),
        ("train", "clip_norm", 1.0, "other defaults"),
        # None stands for what the method makes of it, and that may change: the block that LION reads, say
        ("options", "at", 7, "once made of an option"),
    ],
)
def test_rows_of_other_defaults_are_taken_again_and_not_shown(
    grid, rows, tmp_path, part, name, value, remark
):
    """What a grid leaves out is not in a run's key, but in its row."""
    old = copy.deepcopy(rows)
    for row in runs_of(old, label="lion-8"):
        row[part][name] = value
    with Store(tmp_path) as store:
        store.add(*old)
    half = Results(grid, [*old, *runs_of(rows, "final", label="lion-8", seed=1)])  # a run that was stopped
    assert half.cells[LION_CELL].tuned == 0 and not half.cells[LION_CELL].rows  # never a mean over both
    assert len(half.cells["tiny", "noise", "probe"].rows) == len(half.rows) == 2
    assert any(remark in told for told in half.remarks)
    told = experiment.run(grid, tmp_path)
    assert (told.done, told.held, told.left) == (4, 4, 0)
    assert comparable(read_rows(tmp_path)) == comparable(rows)
    assert len(Results(grid, read_rows(tmp_path)).cells[LION_CELL].rows) == 2


def test_an_option_without_a_meaning_for_a_model_tells_nothing_apart():
    """Residual rows say at=6 where today's say None: the same model."""
    assert same_options({"at": 6, "form": "residual"}, {"at": None, "form": "residual", "new": 1})
    assert not same_options({"at": 6}, {"at": 4})


# -- interrupted


def test_what_a_grid_names_first_is_whole_before_the_rest_begins(images, tmp_path):
    backbones = {"tiny": TINY, "other": TINY | {"depth": 2}}
    given = {"backbones": backbones, "seeds": [1], "methods": {"probe": PROBE}}
    experiment.run(grid_of(images, **given, first=[["other", "noise"]]), tmp_path)
    found = [(r["backbone"], r["stage"]) for r in runs_of(read_rows(tmp_path))]
    each = ["tune", "tune", "final"]
    assert found == [("other", stage) for stage in each] + [("tiny", stage) for stage in each]


@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_and_resumed_gives_the_same_rows(
    images, grid, rows, tmp_path, monkeypatch, after, capsys
):
    real, count = work.Workshop.run, itertools.count()

    def run(self, item):
        if next(count) == after:
            raise KeyboardInterrupt
        return real(self, item)

    monkeypatch.setattr(work.Workshop, "run", run)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small_grid(images)))
    assert cli.main(["experiment", str(tmp_path / "grid.yaml"), "--out", str(tmp_path)]) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert len(runs_of(read_rows(tmp_path))) == after
    with open(tmp_path / "rows.jsonl", "ab") as file:
        file.write(b'{"stage": "final", "key": "x')  # killed in the middle of a line
    told = experiment.run(grid, tmp_path)
    assert (told.done, told.held, told.left) == (8 - after, after, 0)
    assert "half written" in capsys.readouterr().err
    assert comparable(read_rows(tmp_path)) == comparable(rows)


def test_time_that_runs_out_is_exit_code_3_and_again_goes_on(images, tmp_path, monkeypatch, capsys):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(small_grid(images)))

    def command(*more: str) -> int:
        return cli.main(["experiment", str(grid), "--out", str(out), *more])

    assert command("--minutes", "0", "--rows-only") == 3
    assert [p.name for p in out.iterdir()] == ["rows.jsonl"]
    assert command("--minutes", "0") == 3
    assert "8 left" in capsys.readouterr().out
    assert "| probe | - | - |" in (out / "report.md").read_text()
    assert command("--only", "method=probe", "--stage", "tune") == 0
    assert {r["label"] for r in runs_of(read_rows(out))} == {"probe"}
    assert command("--stage", "final", "--json") == 3
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["left"] == 2  # lion is not tuned
    assert command() == 0
    assert len(runs_of(read_rows(out))) == 8
    assert command("--rows-only", "--report-only") == 2
    for only in ("method=lion", "colour=red", "method"):
        assert command("--only", only) == 2
    monkeypatch.setattr(experiment, "run", lambda *a, **k: pytest.fail("ran"))
    assert command("--report-only") == 0


def test_two_processes_write_the_rows_that_one_writes(grid, rows, tmp_path):
    told = experiment.run(grid, tmp_path, workers=2)
    assert (told.done, told.left) == (8, 0)
    one, two = comparable(rows), comparable(read_rows(tmp_path))
    for row in (*one.values(), *two.values()):
        del row["threads"]  # and sums in another order
        for part in ("val", "test"):
            if row[part]:
                row[part] = {k: round(v, 4) for k, v in row[part].items()}
    assert one == two


def test_a_run_that_diverges_is_a_row_and_the_worst_choice(images, tmp_path):
    probe = PROBE | {"grid": {"train.lr": [1e38, 1e-1]}}
    train = TRAIN | {"epochs": 2, "optimizer": "sgd", "warmup_epochs": 0.0}
    grid = grid_of(images, methods={"probe": probe, "lion-8": LION}, train=train)
    told = experiment.run(grid, tmp_path)
    assert (told.done, told.failed) == (8, 1)
    rows = read_rows(tmp_path)
    (failed,) = [r for r in runs_of(rows) if r["failed"]]
    assert "loss is" in failed["failed"] and "checkpoint" not in failed["failed"]  # its folder is gone
    assert failed["stage"] == "tune" and failed["train"]["lr"] == 1e38
    assert {r["configuration"]["train.lr"] for r in runs_of(rows, "final", label="probe")} == {1e-1}
    assert "2 (1 runs failed)" in report.markdown(Results(grid, rows))
    assert experiment.run(grid, tmp_path, minutes=0).held == 8


# -- the report


def test_the_report_says_what_the_rows_say(images, rows, copied):
    """Of two backbones, each section with its own plots."""
    backbones = {"tiny": TINY, "my-tiny": TINY}
    grid = grid_of(images, backbones=backbones, pairs=[["lion-8", "probe"]])
    text = report.write(grid, copied).read_text()
    text = text[: text.index("## my-tiny")]
    accuracies = {
        label: np.array([r["test"]["accuracy"] for r in runs_of(rows, "final", label=label)])
        for label in ("probe", "lion-8")
    }
    for label, found in accuracies.items():
        mean, spread = 100 * found.mean(), 100 * found.std(ddof=1)
        assert f"| {label} | {mean:.2f} ± {spread:.2f} | {mean:.2f} |" in text
    point = 100 * (accuracies["lion-8"] - accuracies["probe"]).mean()
    assert f"| lion-8 | {point:+.2f} [" in text and f"| lion-8 - probe | {point:+.2f} [" in text
    assert "of the test images were among the training or validation images" in text
    for name in ("accuracy-tiny.png", "differences-tiny.png"):
        assert (copied / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    assert (copied / "accuracy-my-tiny.png").exists() and "my-tiny.png" not in text
    assert "nan" not in text and "None" not in text


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.gives.caveat])
def test_the_report_says_what_must_be_said_of_the_weights(name, grid, rows):
    gives = RECIPES[name].gives
    assert gives.caveat not in report.markdown(Results(grid, rows))
    for row in runs_of(rows, "final"):
        row["backbone_settings"] = {**row["backbone_settings"], "weights_source": gives.source}
    assert report.markdown(Results(grid, rows)).count(gives.caveat) == 1


def test_missing_and_failed_cells_are_marked_and_not_hidden(grid, rows):
    (kept,) = runs_of(rows, "final", label="probe", seed=1)
    (absent,) = runs_of(rows, "final", label="probe", seed=2)
    (broken,) = runs_of(rows, "final", label="lion-8", seed=1)
    broken |= {"failed": "diverged", "test": None}
    text = report.markdown(Results(grid, [row for row in rows if row is not absent]))
    assert f"| probe | {100 * kept['test']['accuracy']:.2f} (1 of 2 seeds) | " in text
    assert "(1 of 2 seeds, 1 failed) |" in text and "(seeds missing)" in text
    assert "| lion-8 | - | - |" in text  # no seed that both have
    text = report.markdown(Results(grid, runs_of(rows, "tune", label="probe")))
    assert "tuning under way, 0 of 2 runs" in text and "No final runs yet." in text


def test_sets_are_resampled_independently_of_each_other(images, rows):
    results = Results(grid_of(images, sets={"one": SIZES, "same": SIZES}), rows)
    one, same = (results.difference("tiny", s, "lion-8", "probe")[0] for s in ("one", "same"))
    mean = results.mean_difference("tiny", "lion-8", "probe")
    assert one.point == same.point == mean.point
    assert abs(np.corrcoef(one.resampled, same.resampled)[0, 1]) < 0.05
    assert mean.resampled.std() == pytest.approx(one.resampled.std() / 2**0.5, rel=0.05)


def test_pairs_need_the_same_images(grid, rows):
    runs_of(rows, "final", label="probe", seed=1)[0]["data"]["fingerprint"] = "other"
    text = report.markdown(Results(grid, rows))
    assert "saw other images" in text and "(1 of 2 seeds)" in text


def test_labels_are_no_part_of_what_a_row_is(images, grid, rows):
    """A backbone and a set by other names: nothing that the report says is lost."""
    named = grid_of(images, backbones={"other": TINY}, sets={"grains": SIZES})
    assert Results(named, rows).shared_images("grains") == Results(grid, rows).shared_images("noise")
    old, new = (report.markdown(Results(g, rows)) for g in (grid, named))
    old = old.replace("noise", "grains").replace("tiny", "other").replace("vit_other", "vit_tiny")
    assert new.replace("noise", "grains") == old  # the folder of the images is called so too


def test_images_that_changed_are_not_mixed_with_those_of_the_rows(tmp_path):
    source, out = write_images(tmp_path / "noise", classes=2, each=12), tmp_path / "out"
    experiment.run(grid_of(source, sets={"noise": {}}), out)
    write_images(tmp_path / "more", classes=2, each=16)
    for kind in ("class0", "class1"):
        (tmp_path / "more" / kind / "015.png").rename(source / kind / "other.png")
    before = (out / "rows.jsonl").read_bytes()
    for seeds in ([1, 2], [1, 2, 3]):
        with pytest.raises(DataError, match="the set noise has other images by now"):
            experiment.run(grid_of(source, sets={"noise": {}}, seeds=seeds), out)
    assert (out / "rows.jsonl").read_bytes() == before


def test_rows_of_other_weights_are_other_runs_and_not_compared(grid, copied, monkeypatch):
    monkeypatch.setattr(work, "RANDOM_SEED", 5)
    told = experiment.run(grid, copied, only={"method": ["lion-8"]})
    assert (told.done, told.held) == (4, 0)
    results = Results(grid, read_rows(copied))
    assert len(results.cells[LION_CELL].rows) == 2
    assert not results.cells["tiny", "noise", "probe"].rows
    assert any("tiny: rows with other weights" in remark for remark in results.remarks)
