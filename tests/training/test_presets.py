"""Presets build models and training settings, and say what their sources say."""

from pathlib import Path

import pytest
from training_helpers import tiny_backbone

from lion_fast.errors import OptionError
from lion_fast.methods import available, create
from lion_fast.training import TrainConfig
from lion_fast.training.presets import SIZES, TASKS, VTAB, preset, size_of


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.mark.parametrize("method", sorted(available()))
@pytest.mark.parametrize("name", ["paper", "common"])
def test_presets_are_usable(backbone, method, name):
    chosen = preset(method, name)
    model = create(backbone, method, num_classes=2, **chosen.options)
    assert all(model.options[k] == v for k, v in chosen.options.items())
    config = TrainConfig(**chosen.train)
    assert (config.epochs, config.warmup_epochs, config.keep) == (100, 10.0, "last")
    for key, values in chosen.grid.items():
        if key in ("lr", "weight_decay"):
            assert chosen.train[key] in values
            for value in values:
                TrainConfig(**{**chosen.train, key: value})
        elif key != "prune_ratio":
            for value in values:
                create(backbone, method, num_classes=2, **{**chosen.options, key: value})


def test_the_common_preset_is_common():
    trains = [preset(method, "common").train for method in available()]
    assert all(train == trains[0] for train in trains)


@pytest.mark.parametrize("method", sorted(TASKS))
def test_every_task(backbone, method):
    assert len(VTAB) == len(set(VTAB)) == 19 and set(TASKS[method]) == set(VTAB)
    for task in VTAB:
        chosen = preset(method, task=task)
        create(backbone, method, num_classes=2, **chosen.options)
        TrainConfig(**chosen.train)


def test_values_by_task():
    """Spot checks against the published configurations, and the averages the papers give."""
    kitti = preset("cvpt", task="kitti")
    assert (kitti.options["length"], kitti.train["lr"], kitti.train["seed"]) == (20, 5e-3, 44)
    camelyon = preset("cvpt", task="patch_camelyon").train
    assert (camelyon["lr"], camelyon["weight_decay"], camelyon["batch_size"]) == (1e-2, 1e-5, 16)
    assert preset("ssf", task="clevr_dist").train["lr"] == 5e-2
    assert preset("e2vpt", task="caltech101").options["length"] == 32
    assert preset("e2vpt", task="patch_camelyon").options["kv_length"] == 10
    assert preset("vfpt", task="svhn").options["fraction"] == 0.2
    lengths = [TASKS["vpt"][task]["length"] for task in VTAB]
    means = [sum(part) / len(part) for part in (lengths[:7], lengths[7:11], lengths[11:])]
    assert [round(mean, 1) for mean in means] == [12.4, 52.8, 107.5]


def test_the_methods_page_names_every_method():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    for method in available():
        assert f"| `{method}`" in page, method


@pytest.mark.parametrize(
    "asked, task, told",
    [
        (("vtp",), None, "no method"), (("vpt", "best"), None, "paper, common"), (("vpt",), "mnist", "cifar"),
        (("lora",), "cifar", "by task"), (("vpt", "common"), "cifar", "same for every task"),
        (("vpt", "few"), None, "paper, common"), (("lion", "few"), "kitti", "same for every task"),
    ],
)  # fmt: skip
def test_presets_refuse(asked, task, told):
    with pytest.raises(OptionError, match=told):
        preset(*asked, task=task)


def test_presets_are_not_shared():
    preset("vpt").options["length"] = 3
    preset("vpt").train["lr"] = 3
    assert preset("vpt").options["length"] == 10 and preset("vpt").train["lr"] == 0.25


@pytest.mark.parametrize("name", SIZES)
def test_lions_presets_by_size(backbone, name):
    chosen = preset("lion", name)
    assert create(backbone, "lion", num_classes=2, **chosen.options).options["form"] == "states"
    assert TrainConfig(**chosen.train).lr in chosen.grid["lr"]


@pytest.mark.parametrize(
    "images,classes,name",
    [(1, 1, "few"), (200, 10, "few"), (201, 10, "small"), (5_000, 10, "small"), (5_001, 10, "large")],
)
def test_the_preset_of_a_size(images, classes, name):
    assert size_of(images, classes) == name
