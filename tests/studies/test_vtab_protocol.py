"""What VTAB-1k's protocol makes of a method: its configurations by task, what it refuses, and the means."""

import itertools

import pytest

from lion_fast.errors import OptionError
from lion_fast.methods import available
from lion_fast.studies.vtab import report, tasks
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


def a_row(task, accuracy, seed=0, parameters=100, head=30):
    return {
        "stage": "final", "set": task, "seed": seed, "failed": None,
        "test": {"accuracy": accuracy, "n": 100}, "configuration": {"train.lr": 0.1},
        "parameters": {"kept": parameters, "kept_with_head": parameters + head},
    }  # fmt: skip


def test_means_by_hand():
    # natural 10, 20, ..., 70: 40; specialized 80, 90, 100, 90: 90; structured 10 and seven times 30: 27.5
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.9, 0.1, *[0.3] * 7]
    rows = [a_row(task, value) for task, value in zip(VTAB, values, strict=True)]
    found = report.summarize(rows)
    groups = {name: group["accuracy"] for name, group in found["groups"].items()}
    assert groups == pytest.approx({"natural": 0.4, "specialized": 0.9, "structured": 0.275})
    assert found["mean_of_groups"] == pytest.approx(1.575 / 3)
    assert found["mean"] == pytest.approx((2.8 + 3.6 + 2.2) / 19) and found["n"] == 19
    assert found["absent"] == [] and (found["parameters"], found["with_head"]) == (100, 130)

    some = report.summarize(
        [r for r in rows if r["set"] in ("cifar", "svhn", "kitti")] + [a_row("kitti", 0.5, 1)]
    )
    assert some["groups"]["natural"] == {"accuracy": pytest.approx(0.35), "tasks": 2, "of": 7}
    assert some["groups"]["specialized"] == {"accuracy": None, "tasks": 0, "of": 4}
    assert some["mean_of_groups"] is None  # a group without a task is not left out of its mean in silence
    assert some["tasks"]["kitti"]["accuracy"] == pytest.approx(0.4)
    assert some["mean"] == pytest.approx((0.1 + 0.6 + 0.4) / 3) and len(some["absent"]) == 16
    line = next(line for line in report.table(some).splitlines() if "specialized" in line)
    assert "(0 of 4)" in line and " - " in line


def test_tasks_and_groups_are_the_benchmarks():
    assert [len(group) for group in tasks.GROUPS.values()] == [7, 4, 8] and set(tasks.SIZES) == set(VTAB)
    assert "sun397" in tasks.GROUPS["natural"] and "kitti" in tasks.GROUPS["structured"]
    assert tasks.differences("dtd", 47, 1000, 1880) == []
