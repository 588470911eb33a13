"""Experiments: grids that are refused, runs that go on, test images that stay shut, intervals, the report."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from training_helpers import write_images

from lion_fast.commands import main as cli
from lion_fast.data import ImageSet
from lion_fast.errors import DataError, OptionError
from lion_fast.studies import experiment, report, work
from lion_fast.studies.grid import make_grid, read_grid, same_options
from lion_fast.studies.rows import (
    Store,
    read_rows,
    unpack_bits,
    unpack_integers,
)
from lion_fast.studies.statistics import accuracy, mean_over_sets, paired_difference
from lion_fast.studies.tables import Results
from lion_fast.training import TrainConfig, TrainingError, evaluate, features, fit

TINY = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "random": True,
}


def small_grid(source: Path, **changes) -> dict:
    return {
        "name": "small",
        "backbones": {"tiny": dict(TINY)},
        "sets": {"noise": {"source": str(source), "n_val": 9, "n_test": 12}},
        "seeds": [1, 2],
        "tuning_seeds": [0],
        "train": {"epochs": 1, "batch_size": 8, "device": "cpu"},
        "methods": {
            "probe": {"grid": {"train.lr": [1e-3, 1e-1]}},
            "lion-8": {"method": "lion", "options": {"state_dim": 8}, "grid": {"train.lr": [1e-3, 1e-2]}},
        },
        "reference": "probe",
    } | changes


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise", classes=3, each=12)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> tuple[dict, Path, list[dict]]:
    """A whole experiment: its grid, folder and rows."""
    out = tmp_path_factory.mktemp("whole")
    given = small_grid(images)
    told = experiment.run(make_grid(given), out)
    assert (told.done, told.held, told.left, told.failed) == (8, 0, 0, 0)
    return given, out, read_rows(out)


def runs_of(rows: list[dict], stage: str | None = None) -> list[dict]:
    return [r for r in rows if r["stage"] != "draw" and stage in (None, r["stage"])]


MEASURED = ("seconds", "training_seconds", "peak_memory_bytes", "last_epoch", "val", "test")


def comparable(rows: list[dict]) -> dict[str, dict]:
    """Rows by key without what a clock or a memory counter says."""
    found = {}
    for row in runs_of(rows):
        found[row["key"]] = {k: v for k, v in row.items() if k not in MEASURED}
        found[row["key"]] |= {k: row[k] for k in ("val", "test")}
    return found


# -- the plan


def test_whole_plan_tunes_on_validation_and_tests_the_best(whole):
    given, out, rows = whole
    tune, final = runs_of(rows, "tune"), runs_of(rows, "final")
    assert len(tune) == 4 and len(final) == 4
    assert all(r["test"] is None and "correct" not in r and r["seed"] == 0 for r in tune)
    assert {(r["label"], r["seed"]) for r in final} == set(itertools.product(("probe", "lion-8"), (1, 2)))
    for label in ("probe", "lion-8"):
        scores = {r["configuration"]["train.lr"]: r["val"]["accuracy"] for r in tune if r["label"] == label}
        best = max(scores, key=lambda lr: (scores[lr], -lr))  # the earlier of equals has the lower rate here
        assert {r["train"]["lr"] for r in final if r["label"] == label} == {best}
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


def test_a_row_is_what_training_by_hand_gives(whole, tmp_path):
    given, _, rows = whole
    import lion_fast
    from lion_fast.data import load_data

    row = next(r for r in runs_of(rows, "final") if r["label"] == "lion-8" and r["seed"] == 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = lion_fast.load_backbone(
            **{k: v for k, v in TINY.items() if k != "random"}, pretrained=False
        )
    splits = load_data(given["sets"]["noise"]["source"], seed=2, n_val=9, n_test=12)
    model = lion_fast.create(backbone, "lion", num_classes=3, seed=2, state_dim=8)
    config = TrainConfig(epochs=1, batch_size=8, lr=row["train"]["lr"], seed=2, keep="last", device="cpu")
    fit(model, splits, config, tmp_path / "fit", progress=False)
    found = evaluate(model, splits.test, 8)
    assert found.accuracy == row["test"]["accuracy"]
    assert found.balanced_accuracy == pytest.approx(row["test"]["balanced_accuracy"], abs=1e-12)
    assert found.loss == pytest.approx(row["test"]["loss"], rel=1e-5)
    assert evaluate(model, splits.val, 8).accuracy == row["val"]["accuracy"]
    assert splits.description["fingerprint"] == row["data"]["fingerprint"]


def test_a_set_that_names_no_unreadable_files_has_none(images):
    home = work.Workshop(grid := make_grid(small_grid(images)))
    del home.splits("final", "noise", 1).description["skipped"]  # as of a built-in set
    assert home.run(grid.item("final", "tiny", "noise", "probe", 0, 1))["data"]["skipped"] == 0


def test_a_row_says_the_device_that_was_asked_for(images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert work.Workshop(make_grid(small_grid(images))).circumstances("cpu")["device"] == "cpu"


def test_more_test_images_than_rows_may_be_kept(images, tmp_path, monkeypatch):
    """The training images' rows fit into the limit, those of the test images do not."""
    sets = {"noise": {"source": str(images), "n_train": 6, "n_val": 9, "n_test": 12}}
    grid = make_grid(small_grid(images, sets=sets, methods={"probe": {}}))
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
    grid = make_grid(small_grid(images))
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
        home.run(grid.item("final", "tiny", "noise", "lion-8", 0, seed))
        splits = home.splits("final", "noise", seed)
        assert sorted(n for n in read if n in set(splits.test.names)) == sorted(splits.test.names)
        # once to train, the validation images once to be told
        assert sorted(n for n in read if n in set(splits.val.names)) == sorted(splits.val.names)


def test_runs_that_are_there_are_not_done_again(whole, tmp_path, monkeypatch):
    given, out, rows = whole
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    monkeypatch.setattr(work.Workshop, "run", lambda *a: pytest.fail("done again"))
    told = experiment.run(make_grid(given), tmp_path)
    assert (told.done, told.held, told.left) == (0, 8, 0)
    renamed = copy.deepcopy(given)
    renamed["methods"] = {
        "a": given["methods"]["probe"] | {"method": "probe"},
        "b": given["methods"]["lion-8"],
    }
    renamed |= {"reference": "a", "note": "other words, the same runs"}
    assert experiment.run(make_grid(renamed), tmp_path).held == 8


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"epochs": 2, "batch_size": 8, "device": "cpu"}},
        {"sets": {"noise": {"source": "SOURCE", "n_val": 9, "n_test": 11}}},
        {"backbones": {"tiny": TINY | {"num_heads": 1}}},
    ],
)
def test_other_settings_are_other_runs(whole, images, tmp_path, change):
    given, out, _ = whole
    change = json.loads(json.dumps(change).replace("SOURCE", str(images)))
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    told = experiment.run(make_grid(given | change), tmp_path, minutes=0)
    assert (told.done, told.held, told.left) == (0, 0, 8)


def test_other_weights_are_other_runs(whole, tmp_path, monkeypatch):
    given, out, _ = whole
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    monkeypatch.setattr(work, "RANDOM_SEED", 5)
    assert experiment.run(make_grid(given), tmp_path, minutes=0).held == 0


def test_rows_of_what_a_method_made_of_an_option_once_are_taken_again(whole, tmp_path):
    """None stands for what the method makes of it, and that may change: the block that LION reads, say."""
    given, _, rows = whole
    grid, old = make_grid(given), copy.deepcopy(rows)
    for row in runs_of(old):
        if row["label"] == "lion-8":
            row["options"]["at"] = 7
    with Store(tmp_path) as file:
        for row in old:
            file.add(row)
    new = next(r for r in runs_of(rows, "final") if r["label"] == "lion-8" and r["seed"] == 1)
    half = Results(grid, [*old, new])  # a run that was stopped: never a mean over both
    assert half.cells["tiny", "noise", "lion-8"].tuned == 0 and len(half.rows) == 2
    assert any("once made of an option" in remark for remark in half.remarks)
    told = experiment.run(grid, tmp_path)
    assert (told.done, told.held) == (4, 4)
    found = Results(grid, read_rows(tmp_path)).cells["tiny", "noise", "lion-8"]
    assert [row["options"]["at"] for row in found.rows.values()] == [0, 0]


def test_an_option_without_a_meaning_for_a_model_tells_nothing_apart():
    """Residual rows say at=6 where today's say None: the same model."""
    assert same_options({"at": 6, "form": "residual"}, {"at": None, "form": "residual", "new": 1})
    assert not same_options({"at": 6}, {"at": 4})


@pytest.mark.parametrize("part,name,value", [("options", "gamma", 0.5), ("train", "clip_norm", 1.0)])
def test_rows_taken_with_other_defaults_are_taken_again_and_not_shown(whole, tmp_path, part, name, value):
    """What a grid leaves out is not in a run's key, but in its row."""
    given, out, rows = whole
    grid, old = make_grid(given), copy.deepcopy(rows)
    for row in runs_of(old):
        if row["label"] == "lion-8":
            row[part][name] = value
    with Store(tmp_path) as file:
        for row in old:
            file.add(row)
    results = Results(grid, old)
    assert not results.cells["tiny", "noise", "lion-8"].rows
    assert len(results.cells["tiny", "noise", "probe"].rows) == 2
    assert any("other defaults" in remark for remark in results.remarks)
    told = experiment.run(grid, tmp_path, minutes=0)
    assert (told.done, told.held, told.left) == (0, 4, 4)
    assert experiment.run(grid, tmp_path).done == 4
    assert comparable(read_rows(tmp_path)) == comparable(rows)
    assert len(Results(grid, read_rows(tmp_path)).cells["tiny", "noise", "lion-8"].rows) == 2


def test_a_training_option_spelt_out_at_its_default_is_the_same_run(images):
    plain = make_grid(small_grid(images))
    train = small_grid(images)["train"]
    told = make_grid(small_grid(images, train=train | {"label_smoothing": 0.0, "num_workers": 0}))
    named = ("tune", "tiny", "noise", "probe", 0, 0)
    assert plain.item(*named).run == told.item(*named).run
    other = make_grid(small_grid(images, train=train | {"label_smoothing": 0.1}))
    assert plain.item(*named).run != other.item(*named).run


# -- interrupted


def test_what_a_grid_names_first_is_whole_before_the_rest_begins(images, tmp_path):
    given = small_grid(images, backbones={"tiny": dict(TINY), "other": TINY | {"depth": 2}}, seeds=[1])
    given["methods"] = {"probe": given["methods"]["probe"]}
    experiment.run(make_grid(given | {"first": [["other", "noise"]]}), tmp_path / "first")
    found = [(r["backbone"], r["stage"]) for r in runs_of(read_rows(tmp_path / "first"))]
    each = ["tune", "tune", "final"]
    assert found == [("other", stage) for stage in each] + [("tiny", stage) for stage in each]
    # the order is no part of a run
    assert experiment.run(make_grid(given), tmp_path / "first", minutes=0).held == 6
    for first, words in (
        ([["other"]], r"first must be a list of \[backbone, set\]"),
        ([["nowhere", "noise"]], "first: backbone must be one of tiny, other; got 'nowhere'"),
        ([["other", "nothing"]], "first: set must be one of noise"),
    ):
        with pytest.raises(OptionError, match=words):
            make_grid(given | {"first": first})


@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_and_resumed_gives_the_same_rows(whole, tmp_path, monkeypatch, after, capsys):
    given, _, rows = whole
    grid, real, count = make_grid(given), work.Workshop.run, itertools.count()

    def run(self, item):
        if next(count) == after:
            raise KeyboardInterrupt
        return real(self, item)

    monkeypatch.setattr(work.Workshop, "run", run)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(grid, tmp_path)
    assert len(runs_of(read_rows(tmp_path))) == after
    with open(tmp_path / "rows.jsonl", "ab") as file:
        file.write(b'{"stage": "final", "key": "x')  # killed in the middle of a line
    told = experiment.run(make_grid(given), tmp_path)
    assert (told.done, told.held, told.left) == (8 - after, after, 0)
    assert "half written" in capsys.readouterr().err
    assert comparable(read_rows(tmp_path)) == comparable(rows)


def test_time_that_runs_out_is_exit_code_3_and_again_goes_on(images, tmp_path, monkeypatch, capsys):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(small_grid(images)))
    assert cli.main(["experiment", str(grid), "--out", str(out), "--minutes", "0", "--rows-only"]) == 3
    assert [p.name for p in out.iterdir()] == ["rows.jsonl"]
    assert cli.main(["experiment", str(grid), "--out", str(out), "--minutes", "0"]) == 3
    assert "8 left" in capsys.readouterr().out
    assert "| probe | - | - |" in (out / "report.md").read_text()
    arguments = ["experiment", str(grid), "--out", str(out), "--only", "method=probe"]
    assert cli.main([*arguments, "--stage", "tune"]) == 0
    assert {r["label"] for r in runs_of(read_rows(out))} == {"probe"}
    assert cli.main(["experiment", str(grid), "--out", str(out), "--stage", "final", "--json"]) == 3
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["left"] == 2  # lion is not tuned
    assert cli.main(["experiment", str(grid), "--out", str(out)]) == 0
    assert len(runs_of(read_rows(out))) == 8
    assert cli.main(["experiment", str(grid), "--out", str(out), "--rows-only", "--report-only"]) == 2
    for only in ("method=lion", "colour=red", "method"):
        assert cli.main([*arguments[:-1], only]) == 2
    monkeypatch.setattr(experiment, "run", lambda *a, **k: pytest.fail("ran"))
    assert cli.main(["experiment", str(grid), "--out", str(out), "--report-only"]) == 0


# -- processes


def test_two_processes_write_the_rows_that_one_writes(whole, tmp_path):
    given, _, rows = whole
    told = experiment.run(make_grid(given), tmp_path, workers=2)
    assert (told.done, told.left) == (8, 0)
    one, two = comparable(rows), comparable(read_rows(tmp_path))
    for row in (*one.values(), *two.values()):
        del row["threads"]  # and sums in another order
        for part in ("val", "test"):
            if row[part]:
                row[part] = {k: round(v, 4) for k, v in row[part].items()}
    assert one == two


def test_ctrl_c_ends_the_workers_and_keeps_the_rows(images, tmp_path):
    given = small_grid(images, seeds=list(range(1, 60)))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(given))
    rows = tmp_path / "out" / "rows.jsonl"
    command = [sys.executable, "-m", "lion_fast", "experiment", str(tmp_path / "grid.yaml")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--workers", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not rows.exists() or rows.read_bytes().count(b"\n") < 6):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, told.decode()
    assert b"goes on from there" in told and b"Traceback" not in told
    deadline = time.monotonic() + 60  # Python's own resource tracker ends after its parent
    while (left := _alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "processes of the group are left"
    done = len(runs_of(read_rows(tmp_path / "out")))
    assert done >= 3
    assert experiment.run(read_grid(tmp_path / "grid.yaml"), tmp_path / "out", minutes=0).held == done


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# -- failures


def test_a_run_that_diverges_is_a_row_and_the_worst_choice(images, tmp_path, monkeypatch):
    grid = make_grid(small_grid(images))
    real = work.fit

    def diverges(model, splits, config, *rest, **more):
        if config.lr == 1e-3:
            raise TrainingError("the loss is nan at step 1; the last good checkpoint is /nowhere")
        return real(model, splits, config, *rest, **more)

    monkeypatch.setattr(work, "fit", diverges)
    told = experiment.run(grid, tmp_path)
    assert (told.done, told.failed) == (8, 2)
    rows = read_rows(tmp_path)
    failed = [r for r in runs_of(rows) if r["failed"]]
    assert [r["failed"] for r in failed] == ["the loss is nan at step 1"] * 2
    assert all(r["stage"] == "tune" and r["train"]["lr"] == 1e-3 for r in failed)
    assert {r["configuration"]["train.lr"] for r in runs_of(rows, "final")} == {1e-1, 1e-2}
    assert "2 (1 runs failed)" in report.markdown(Results(grid, rows))
    assert experiment.run(grid, tmp_path, minutes=0).held == 8


def test_a_rate_that_is_far_too_high_diverges_in_earnest(images, tmp_path):
    methods = {"lion": {"options": {"state_dim": 8}, "grid": {"train.lr": [1e-3, 1e30]}}}
    train = {"epochs": 3, "batch_size": 8, "optimizer": "sgd", "warmup_epochs": 0.0, "device": "cpu"}
    grid = make_grid(small_grid(images, methods=methods, reference=None, seeds=[1], train=train))
    told = experiment.run(grid, tmp_path)
    rows = runs_of(read_rows(tmp_path))
    assert told.failed == 1 and [bool(r["failed"]) for r in rows] == [False, True, False]
    assert "not finite" in rows[1]["failed"] or "loss is" in rows[1]["failed"]


# -- grids that are refused


def changed(images: Path, *path: str, value) -> dict:
    grid = copy.deepcopy(small_grid(images))
    inner = grid
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return grid


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("colour",), 1, "'colour'"),
        (("train", "lrate"), 1, "'lrate'"),
        (("train", "seed"), 1, "'seed'"),
        (("sets", "noise", "n_tests"), 1, "'n_tests'.*n_test"),
        (("sets", "noise", "seed"), 1, "'seed'"),
        (("sets", "noise", "n_test"), 0, "sets.noise: n_test"),
        (("sets", "noise", "check"), "some", "sets.noise: check"),
        (("sets", "noise", "monitor"), "loss", "monitor must be one of"),
        (("methods", "probe", "gird"), {}, "'gird'.*grid"),
        (("methods", "probe", "options"), {"size": 1}, "'size'"),
        (("methods", "probe", "grid"), {"lr": [1, 2]}, "'lr'"),
        (("methods", "probe", "grid"), {"train.lr": 1}, "lists of values"),
        (("methods", "probe", "grid"), {"train.lr": [0.1, 0.1]}, "are the same"),
        (("methods", "probe", "grid"), {"train.lr": [0.1, -1]}, "lr must be a finite number above 0"),
        (("methods", "probe", "method"), "nothing", "must be one of"),
        (("methods", "lion-8", "options"), {"gamma": "big"}, "gamma"),
        (("backbones", "tiny"), {"img_size": 32}, "needs a name"),
        (("backbones", "tiny"), {"name": "x", "random": True, "weights": "y"}, "random goes with"),
        (("seeds",), [1, 1], "seeds must be"),
        (("seeds",), [], "seeds must be"),
        (("reference",), "vpt", "must be one of"),
        (("pairs",), [["lion-8"]], "pairs must be"),
        (("sets",), {}, "needs sets"),
        (("name",), "a/b", "name must be"),
    ],
)  # fmt: skip
def test_what_a_grid_cannot_hold_is_refused_by_name(images, path, value, told):
    with pytest.raises(OptionError, match=told):
        make_grid(changed(images, *path, value=value))


def test_unequal_grids_are_refused_unless_the_reason_is_told(images, tmp_path):
    given = changed(images, "methods", "probe", "grid", value={"train.lr": [1e-3]})
    with pytest.raises(OptionError, match="same number of configurations, 2 here; fewer have: probe 1"):
        make_grid(given)
    given["methods"]["probe"] |= {"fewer": "it has nothing else to choose"}
    grid = make_grid(given)
    assert "probe: 1 configuration: it has nothing else to choose" in report.markdown(Results(grid, []))
    del given["methods"]["probe"]["grid"]
    given["methods"]["probe"]["fixed"] = {"train.lr": 0.5}
    grid = make_grid(given)
    assert grid.config("noise", "probe", 0, 3).lr == 0.5 and grid.tuning("tiny", "noise", "probe") == []


def test_a_method_that_does_not_fit_is_refused_before_anything_runs(images, tmp_path):
    given = changed(images, "methods", "lion-8", "options", value={"state_dim": 0})
    with pytest.raises(OptionError, match="lion-8 on tiny.*state_dim"):
        experiment.run(make_grid(given), tmp_path)
    given = changed(images, "sets", "noise", "n_test", value=None)
    given["sets"]["noise"]["test"] = 0.0
    with pytest.raises(OptionError, match="no test images"):
        experiment.run(make_grid(given), tmp_path)
    assert runs_of(read_rows(tmp_path)) == []


def test_settings_override_from_the_grid_to_the_configuration(images):
    given = small_grid(images)
    given["train"] |= {"lr": 1.0, "weight_decay": 1.0, "label_smoothing": 0.1, "clip_norm": 1.0}
    given["sets"]["noise"] |= {"epochs": 7, "clip_norm": 2.0, "lr": 2.0, "weight_decay": 2.0}
    given["sets"]["noise"]["monitor"] = "balanced_accuracy"
    given["methods"]["lion-8"]["train"] = {"lr": 3.0, "weight_decay": 3.0}
    given["methods"]["lion-8"]["grid"] = {"train.lr": [4.0, 5.0]}
    grid = make_grid(given)
    config = grid.config("noise", "lion-8", 0, 9)
    assert (config.lr, config.weight_decay, config.clip_norm, config.epochs) == (4.0, 3.0, 2.0, 7)
    assert (config.label_smoothing, config.seed, config.keep) == (0.1, 9, "last")
    assert config.monitor == "balanced_accuracy"


def test_configurations_are_the_product_and_the_first_of_equals_is_chosen(images):
    given = small_grid(images)
    given["methods"]["lion-8"]["grid"] = {"train.lr": [1, 2], "options.state_dim": [4, 8]}
    listed = [{"train.lr": float(i)} for i in range(1, 5)]
    given["methods"]["probe"]["grid"] = listed
    grid = make_grid(given | {"tuning_seeds": [0, 7]})
    found = grid.methods["lion-8"].configurations
    assert [tuple(c.values()) for c in found] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert list(grid.methods["probe"].configurations) == listed
    cell = ("tiny", "noise", "lion-8")
    scores = {0: (0.4, 0.8), 1: (0.9, 0.3), 2: (0.7, 0.5), 3: (0.1, 1.0)}  # means: 0.6, 0.6, 0.6, 0.55
    rows = {
        i.run: {"val": {"accuracy": scores[i.index][i.seed == 7], "balanced_accuracy": -i.index}}
        for i in grid.tuning(*cell)
    }
    assert grid.choose(*cell, rows) == 0
    first = next(i for i in grid.tuning(*cell) if i.index == 0 and i.seed == 7)
    assert grid.choose(*cell, {k: v for k, v in rows.items() if k != first.run}) is None
    rows[first.run] = {"failed": "diverged"}
    assert grid.choose(*cell, rows) == 1


def test_the_grids_of_the_repository_are_valid():
    for path in (Path(__file__).parents[2] / "bench" / "accuracy").glob("*.yaml"):
        assert read_grid(path).name == path.stem


# -- statistics


def draws(rng, shares, n):
    return [rng.random(n) < p for p in shares]


def test_the_same_method_twice_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    right, labels = draws(rng, [0.6, 0.8, 0.7], 50), [rng.integers(0, 4, 50) for _ in range(3)]
    for metric in ("accuracy", "balanced_accuracy"):
        found = paired_difference(right, right, labels, metric=metric)
        assert (found.point, found.low, found.high) == (0.0, 0.0, 0.0)
        assert not found.resampled.any()


def test_right_everywhere_against_wrong_everywhere_is_exactly_one():
    yes, no, labels = [np.ones(9, bool)] * 2, [np.zeros(9, bool)] * 2, [np.arange(9) % 3] * 2
    for metric in ("accuracy", "balanced_accuracy"):
        found = paired_difference(yes, no, labels, metric=metric)
        assert (found.point, found.low, found.high) == (1.0, 1.0, 1.0)


def test_points_by_hand():
    labels = [np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])]
    a = [np.array([1, 1, 0, 1], bool), np.array([1, 1, 0, 0], bool)]
    b = [np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)]
    assert paired_difference(a, b, labels).point == pytest.approx((2 / 4 + 0 / 4) / 2)
    # seed 1: class 0 by 1/3, class 1 by 1; seed 2: class 0 by 1, class 1 by -1/3
    expected = ((1 / 3 + 1) / 2 + (1 - 1 / 3) / 2) / 2
    assert paired_difference(a, b, labels, metric="balanced_accuracy").point == pytest.approx(expected)
    assert accuracy(a, labels).point == pytest.approx((3 / 4 + 2 / 4) / 2)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_resampling_agrees_with_resampling_image_by_image(metric):
    """The counts drawn by class and difference are a plain bootstrap of seeds and images."""
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 3, 40) for _ in range(3)]
    a, b = draws(rng, [0.9, 0.7, 0.8], 40), draws(rng, [0.6, 0.65, 0.7], 40)
    found = paired_difference(a, b, labels, metric=metric, resamples=20_000)

    def value(i, where):
        d, k = a[i][where].astype(float) - b[i][where], labels[i][where]
        return d.mean() if metric == "accuracy" else np.mean([d[k == c].mean() for c in np.unique(k)])

    plain = [np.mean([value(i, rng.integers(0, 40, 40)) for i in rng.integers(0, 3, 3)]) for _ in range(4000)]
    assert found.resampled.mean() == pytest.approx(np.mean(plain), abs=0.005)
    assert found.resampled.std() == pytest.approx(np.std(plain), rel=0.05)
    assert [found.low, found.high] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.012)


def test_one_seed_is_the_spread_of_its_images():
    n, d = 400, 0.1
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    a[: int(d * n)] = True
    found = paired_difference([a], [b], [np.zeros(n, int)])
    half = 1.96 * (d * (1 - d) / n) ** 0.5
    assert found.point == pytest.approx(d)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.07)


def test_seeds_that_differ_widen_the_interval():
    n = 1000
    labels = [np.zeros(n, int)] * 4
    none = [np.zeros(n, bool)] * 4
    same, apart = [], []
    for k in range(4):
        same.append(np.arange(n) < 200)
        apart.append(np.arange(n) < (100 if k % 2 else 300))
    narrow, wide = (paired_difference(x, none, labels) for x in (same, apart))
    assert [narrow.point, wide.point] == pytest.approx([0.2, 0.2])
    # means of four seeds drawn from two at 0.1 and two at 0.3: standard deviation 0.1 / 2
    assert wide.resampled.std() == pytest.approx((0.05**2 + 0.2 * 0.8 / n / 4) ** 0.5, rel=0.1)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Ten seeds whose true difference varies around 5 points; few seeds cost some coverage."""
    rng = np.random.default_rng(1)
    covered, trials = 0, 200
    for _ in range(trials):
        a, b = [], []
        for shift in rng.normal(0.05, 0.03, 10):
            u = rng.random(100)
            b.append(u < 0.6)
            a.append(u < 0.6 + shift)
        found = paired_difference(a, b, [np.zeros(100, int)] * 10, resamples=1000)
        covered += found.low <= 0.05 <= found.high
    assert 0.86 <= covered / trials <= 0.99


def test_the_mean_over_sets_and_what_is_refused():
    rng = np.random.default_rng(2)
    labels = [np.zeros(200, int)] * 3
    found = [
        paired_difference(draws(rng, [p] * 3, 200), draws(rng, [0.5] * 3, 200), labels, seed=k)
        for k, p in enumerate((0.6, 0.8))
    ]
    mean = mean_over_sets(found)
    assert mean.point == pytest.approx((found[0].point + found[1].point) / 2)
    spread = (sum(f.resampled.var() for f in found) / 4) ** 0.5  # of independent sets
    assert mean.resampled.std() == pytest.approx(spread, rel=0.05)
    with pytest.raises(DataError, match="same seeds"):
        paired_difference([], [], [])
    with pytest.raises(DataError, match="as many"):
        paired_difference([np.ones(3, bool)], [np.ones(4, bool)], [np.zeros(3, int)])
    with pytest.raises(OptionError, match="metric"):
        paired_difference([], [], [], metric="loss")


# -- the report


def test_the_report_says_what_the_rows_say(whole):
    given, out, rows = whole
    path = report.write(make_grid(given | {"pairs": [["lion-8", "probe"]]}), out)
    text = path.read_text()
    for label in ("probe", "lion-8"):
        mine = [r["test"]["accuracy"] for r in runs_of(rows, "final") if r["label"] == label]
        spread = np.std(mine, ddof=1)
        assert (
            f"| {label} | {100 * np.mean(mine):.2f} ± {100 * spread:.2f} | {100 * np.mean(mine):.2f} |"
            in text
        )
    by = {(r["label"], r["seed"]): r for r in runs_of(rows, "final")}
    point = np.mean(
        [by["lion-8", s]["test"]["accuracy"] - by["probe", s]["test"]["accuracy"] for s in (1, 2)]
    )
    assert f"| lion-8 | {100 * point:+.2f} [" in text and f"| lion-8 - probe | {100 * point:+.2f} [" in text
    assert "of the test images were among the training or validation images" in text
    for name in ("accuracy-tiny.png", "differences-tiny.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and name in text
    assert "nan" not in text and "None" not in text


def test_missing_and_failed_cells_are_marked_and_not_hidden(whole, tmp_path):
    given, _, rows = whole
    final = runs_of(rows, "final")
    absent, broken = ({"label": "probe", "seed": 2}, {"label": "lion-8", "seed": 1})

    def matches(row, wanted):
        return row["stage"] == "final" and all(row[k] == v for k, v in wanted.items())

    kept = [copy.deepcopy(r) for r in rows if not matches(r, absent)]
    for row in kept:
        if matches(row, broken):
            row |= {"failed": "diverged", "test": None}
    text = report.markdown(Results(make_grid(given), kept))
    one = next(r for r in final if matches(r, {"label": "probe", "seed": 1}))
    assert f"| probe | {100 * one['test']['accuracy']:.2f} (1 of 2 seeds) | " in text
    assert "(1 of 2 seeds, 1 failed) |" in text and "(seeds missing)" in text
    assert "| lion-8 | - | - |" in text  # no seed that both have
    no_final = [r for r in rows if r["stage"] == "tune" and r["label"] == "probe"]
    text = report.markdown(Results(make_grid(given), no_final))
    assert "tuning under way, 0 of 2 runs" in text and "No final runs yet." in text


def test_sets_are_resampled_independently_of_each_other(whole):
    given, _, rows = whole
    images = given["sets"]["noise"]
    results = Results(make_grid(given | {"sets": {"one": images, "same": dict(images)}}), rows)
    one, same = (results.difference("tiny", s, "lion-8", "probe")[0] for s in ("one", "same"))
    mean = results.mean_difference("tiny", "lion-8", "probe")
    assert one.point == same.point == mean.point
    assert abs(np.corrcoef(one.resampled, same.resampled)[0, 1]) < 0.05
    assert mean.resampled.std() == pytest.approx(one.resampled.std() / 2**0.5, rel=0.05)


def test_pairs_need_the_same_images(whole):
    given, _, rows = whole
    rows = copy.deepcopy(rows)
    next(r for r in runs_of(rows, "final") if r["label"] == "probe" and r["seed"] == 1)["data"][
        "fingerprint"
    ] = "other"
    text = report.markdown(Results(make_grid(given), rows))
    assert "saw other images" in text and "(1 of 2 seeds)" in text


def test_labels_are_no_part_of_what_a_row_is(whole, tmp_path):
    """A backbone and a set by other names: the same rows, and nothing that the report says is lost."""
    given, out, rows = whole
    named = given | {"backbones": {"other": dict(TINY)}, "sets": {"grains": given["sets"]["noise"]}}
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    assert experiment.run(make_grid(named), tmp_path, minutes=0).held == 8
    results = Results(make_grid(named), rows)
    assert results.shared_images("grains") == Results(make_grid(given), rows).shared_images("noise")
    old, new = (report.markdown(Results(make_grid(g), rows)) for g in (given, named))
    old = old.replace("noise", "grains").replace("tiny", "other").replace("vit_other", "vit_tiny")
    assert new.replace("noise", "grains") == old  # the folder of the images is called so too


def test_images_that_changed_are_not_mixed_with_those_of_the_rows(tmp_path):
    source, out = write_images(tmp_path / "noise", classes=2, each=12), tmp_path / "out"
    given = small_grid(source, sets={"noise": {"source": str(source)}})
    experiment.run(make_grid(given), out)
    write_images(tmp_path / "more", classes=2, each=16)
    for kind in ("class0", "class1"):
        (tmp_path / "more" / kind / "015.png").rename(source / kind / "other.png")
    before = (out / "rows.jsonl").read_bytes()
    for change in ({}, {"seeds": [1, 2, 3]}):
        with pytest.raises(DataError, match="the set noise has other images by now"):
            experiment.run(make_grid(given | change), out)
    assert (out / "rows.jsonl").read_bytes() == before


def test_rows_of_other_weights_are_not_compared(whole, tmp_path, monkeypatch):
    given, out, _ = whole
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    monkeypatch.setattr(work, "RANDOM_SEED", 5)
    assert experiment.run(make_grid(given), tmp_path, only={"method": ["lion-8"]}).done == 4
    results = Results(make_grid(given), read_rows(tmp_path))
    assert len(results.cells["tiny", "noise", "lion-8"].rows) == 2
    assert not results.cells["tiny", "noise", "probe"].rows
    assert any("tiny: rows with other weights" in remark for remark in results.remarks)


def test_a_backbones_section_has_its_own_plots(whole, tmp_path):
    given, _, rows = whole
    both = given | {"backbones": {"tiny": dict(TINY), "my-tiny": dict(TINY)}}
    with Store(tmp_path) as file:
        for row in rows:
            file.add(row)
    text = report.write(make_grid(both), tmp_path).read_text()
    section = text[text.index("## tiny") : text.index("## my-tiny")]
    assert "(accuracy-tiny.png)" in section and "my-tiny.png" not in section
