"""Grids of experiments: what one cannot hold, what its settings come to, which configuration is chosen."""

from pathlib import Path

import pytest
from experiment_helpers import LION, LION_CELL, grid_of, small_grid
from training_helpers import write_images

from lion_fast.errors import OptionError
from lion_fast.studies import experiment, report
from lion_fast.studies.grid import make_grid, read_grid, same_options
from lion_fast.studies.rows import read_rows
from lion_fast.studies.tables import Results


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "noise", classes=3, each=12)


def changed(images: Path, *path: str, value) -> dict:
    given = small_grid(images)
    inner = given
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return given


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
        (("first",), [["other"]], "first must be"),
        (("first",), [["nowhere", "noise"]], "first: backbone must be one of tiny; got 'nowhere'"),
        (("first",), [["tiny", "nothing"]], "first: set must be one of noise"),
        (("sets",), {}, "needs sets"),
        (("name",), "a/b", "name must be"),
    ],
)  # fmt: skip
def test_what_a_grid_cannot_hold_is_refused_by_name(images, path, value, told):
    with pytest.raises(OptionError, match=told):
        make_grid(changed(images, *path, value=value))


def test_unequal_grids_are_refused_unless_the_reason_is_told(images):
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
    no_size = changed(images, "methods", "lion-8", "options", value={"state_dim": 0})
    no_test = small_grid(images, sets={"noise": {"n_val": 9, "test": 0.0}})
    for given, told in ((no_size, "lion-8 on tiny.*state_dim"), (no_test, "no test images")):
        with pytest.raises(OptionError, match=told):
            experiment.run(make_grid(given), tmp_path)
    assert read_rows(tmp_path) == []


def test_settings_override_from_the_grid_to_the_configuration(images):
    given = small_grid(images)
    given["train"] |= {"lr": 1.0, "weight_decay": 1.0, "label_smoothing": 0.1, "clip_norm": 1.0}
    given["sets"]["noise"] |= {"epochs": 7, "clip_norm": 2.0, "lr": 2.0, "weight_decay": 2.0}
    given["sets"]["noise"]["monitor"] = "balanced_accuracy"
    given["methods"]["lion-8"]["train"] = {"lr": 3.0, "weight_decay": 3.0}
    given["methods"]["lion-8"]["grid"] = {"train.lr": [4.0, 5.0]}
    config = make_grid(given).config("noise", "lion-8", 0, 9)
    assert (config.lr, config.weight_decay, config.clip_norm, config.epochs) == (4.0, 3.0, 2.0, 7)
    assert (config.label_smoothing, config.seed, config.keep) == (0.1, 9, "last")
    assert config.monitor == "balanced_accuracy"


def test_configurations_are_the_product_and_the_first_of_equals_is_chosen(images):
    listed = [{"train.lr": float(i)} for i in range(1, 5)]
    product = LION | {"grid": {"train.lr": [1, 2], "options.state_dim": [4, 8]}}
    methods = {"probe": {"grid": listed}, "lion-8": product}
    grid = grid_of(images, methods=methods, tuning_seeds=[0, 7])
    found = grid.methods["lion-8"].configurations
    assert [tuple(c.values()) for c in found] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert list(grid.methods["probe"].configurations) == listed
    scores = {0: (0.4, 0.8), 1: (0.9, 0.3), 2: (0.7, 0.5), 3: (0.1, 1.0)}  # means: 0.6, 0.6, 0.6, 0.55
    rows = {
        i.run: {"val": {"accuracy": scores[i.index][i.seed == 7], "balanced_accuracy": -i.index}}
        for i in grid.tuning(*LION_CELL)
    }
    assert grid.choose(*LION_CELL, rows) == 0
    first = next(i for i in grid.tuning(*LION_CELL) if i.index == 0 and i.seed == 7)
    assert grid.choose(*LION_CELL, {k: v for k, v in rows.items() if k != first.run}) is None
    rows[first.run] = {"failed": "diverged"}
    assert grid.choose(*LION_CELL, rows) == 1


def test_the_grids_of_the_repository_are_valid():
    for path in (Path(__file__).parents[2] / "bench" / "accuracy").glob("*.yaml"):
        assert read_grid(path).name == path.stem


def test_what_a_run_chose_for_itself_is_no_difference_of_options():
    one = {"reading": "auto", "at": 4, "grid": 1, "pooled": False, "state_dim": 16, "gamma": 0.8}
    assert same_options(one, one | {"at": [4, 11], "grid": 2, "pooled": True, "state_dim": 64})
    assert not same_options(one, one | {"gamma": 0.9})
    assert not same_options(one | {"reading": "fixed"}, one | {"reading": "fixed", "at": 8})
