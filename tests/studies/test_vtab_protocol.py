"""What VTAB-1k's protocol makes of a method: its configurations by task, and what it refuses."""

import itertools

import pytest

from lion_fast.errors import OptionError
from lion_fast.methods import available
from lion_fast.studies.vtab.protocol import Protocol
from lion_fast.training import TrainConfig
from lion_fast.training.presets import VTAB


def plan(task, *args, **given):
    """(options, training settings) of every configuration on a task."""
    grid = Protocol(*args, **given).on(task, task)
    (label,) = grid.methods
    return [grid.settings(task, label, i) for i in range(len(grid.methods[label].configurations))]


@pytest.mark.parametrize("method", sorted(available()))
def test_six_configurations_for_every_method(method):
    # LION's default variant wants a stronger decay than methods that tune blocks; six are six
    rates, decays = (1e-3, 5e-3, 1e-2), (1e-4, 1e-2)
    if method == "lion":
        rates, decays = (1e-3, 5e-3), (1e-4, 0.1, 0.3)
    for task in VTAB:
        found = [train for _, train in plan(task, method)]
        assert [(t["lr"], t["weight_decay"]) for t in found] == list(itertools.product(rates, decays))
        assert all(t["keep"] == "last" and TrainConfig.from_dict(t).augment == "none" for t in found)
        assert len(plan(task, method, "paper")) == (3 if method == "dyt" else 6)


def test_the_paper_preset_by_task():
    found = plan("kitti", "cvpt", "paper")
    assert found[0][0]["length"] == 20 and "seed" not in found[0][1]  # published seeds are not taken over
    assert [(t["lr"], t["weight_decay"]) for _, t in found] == [
        (lr, decay) for lr in (0.00125, 0.005, 0.02) for decay in (0.005, 0.05)
    ]
    assert [options["rate"] for options, _ in plan("dtd", "dyt", "paper")] == [0.5, 0.7, 0.9]
    assert plan("clevr_dist", "vpt", "paper")[0][0]["length"] == 200


def test_fixed_settings_leave_the_grid():
    found = plan("dtd", "vpt", options={"length": 3}, train={"lr": 0.5, "epochs": 7})
    assert [(t["lr"], t["weight_decay"], t["epochs"], o["length"]) for o, t in found] == [
        (0.5, 1e-4, 7, 3), (0.5, 1e-2, 7, 3),
    ]  # fmt: skip
    assert len(plan("dtd", "vpt", train={"lr": 0.5, "weight_decay": 0.0})) == 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "vtp"}, "no method named 'vtp'; the methods are"),
        ({"preset": "best"}, "preset must be one of paper, common"),
        ({"grid": {"lenght": (1,)}}, "unknown name in the grid of vpt: 'lenght'; did you mean length"),
        ({"grid": {"keep": ("best",)}}, "protocol decides keep: the last epoch is kept"),
        ({"train": {"early_stop": 3}}, "protocol decides early_stop"),
        ({"grid": {"lr": (0.1, 0.1)}}, "the grid has lr=0.1 twice"),
        ({"grid": {"lr": ()}}, "the grid needs values for lr"),
        ({"grid": {"lr": (0.1,)}, "train": {"lr": 0.2}}, "lr is both fixed and in the grid"),
        ({"options": {"lr": 1}}, "unknown option of vpt 'lr'"),
        ({"seeds": (1, 1)}, "seeds must be"),
    ],
)
def test_wrong_protocols(given, match):
    with pytest.raises(OptionError, match=match):
        Protocol(**{"method": "vpt"} | given)
