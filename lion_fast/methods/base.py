"""One interface for every tuning method: a frozen backbone, what the method trains, a linear head."""

import inspect
import os
import platform
import typing
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from lion_fast import __version__
from lion_fast.backbones import Backbone, cheaper, load_backbone
from lion_fast.equilibrium.masked import match_masks
from lion_fast.errors import (
    LARGEST,
    AdapterError,
    BackboneError,
    OptionError,
    check_bool,
    check_number,
    check_text,
    check_whole,
    refuse_unknown,
    shown,
)
from lion_fast.methods.files import FORMAT_VERSION, describe_images, not_finite, write_adapter
from lion_fast.pruning.compaction import describe_compacted
from lion_fast.pruning.counts import count_parameters
from lion_fast.pruning.packing import MASK

# Prompts, ranks, cells: an option above it is a slip that would take all memory
MOST = 65_536
_REGISTRY: dict[str, type["TunedModel"]] = {}


def register(name: str):
    """Class decorator that makes a method known as `name`."""

    def add(cls: type["TunedModel"]) -> type["TunedModel"]:
        cls.method = name
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> dict[str, type["TunedModel"]]:
    """Every method by name, in alphabetical order.

    >>> sorted({"lion", "probe", "vpt"} & available().keys())
    ['lion', 'probe', 'vpt']
    """
    return dict(sorted(_REGISTRY.items()))


def _parameters(cls: type["TunedModel"]) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a method and of its bases, by name."""
    bases = [
        base for base in reversed(cls.__mro__) if issubclass(base, TunedModel) and "__init__" in vars(base)
    ]
    given = [p for base in bases for p in inspect.signature(base.__init__).parameters.values()]
    return {p.name: p for p in given if p.kind is p.KEYWORD_ONLY}


def method_options(cls: type["TunedModel"]) -> dict[str, Any]:
    """The options of a method and their defaults: the keyword-only arguments along its bases.

    >>> method_options(available()["probe"])
    {'pool': 'backbone', 'head_bias': True, 'reading': 'fixed', 'at': None, 'grid': None, 'pooled': None}
    """
    return {name: p.default for name, p in _parameters(cls).items()}


def check_kinds(cls: type["TunedModel"], options: Mapping[str, Any], most: int = LARGEST) -> None:
    """Raise `OptionError` on a value that is no number, bool or text where the annotation asks for one.

    most: bound of whole numbers, either way. A value that JSON has no word for is refused everywhere.
    """
    for name, p in _parameters(cls).items():
        if name not in options:
            continue
        value, union = options[name], isinstance(p.annotation, UnionType)
        kinds = typing.get_args(p.annotation) if union else (p.annotation,)
        if not _is_plain(value):
            raise OptionError(f"{name} must be numbers, texts or lists of them; got {shown(value)}")
        if value is None and NoneType in kinds:
            continue
        if kinds == (bool,):
            check_bool(name, value)
        elif set(kinds) <= {float, int, NoneType}:
            check_number(name, value)
            if isinstance(value, int):
                bound = LARGEST if float in kinds else most
                check_whole(name, value, -bound, bound)
        elif set(kinds) <= {str, NoneType}:
            check_text(name, value)


class TunedModel(nn.Module):
    """A frozen backbone with a method's own parameters and a trained linear head.

    A method subclasses this, overrides `features`, calls `self.record(...)` with the options it took and
    hands the others on as `**options`. Parameters of the backbone that a method trains (by setting
    `requires_grad`) belong to its adapter; everything else of the backbone stays out of it.

    Args:
        backbone: a `Backbone`, or a name for `load_backbone`.
        num_classes: outputs of the head, at least 1.
        pool: "backbone", "mean", for ViTs with a class token also "cls" and "cls+mean".
        head_bias: whether the head has a bias.

    The head is drawn from a normal of deviation 0.02, truncated, with zero bias, in float32; under autocast
    it still computes in its own dtype. Raises `OptionError` for an option the method does not have and
    `BackboneError` for a family it does not work on.
    """

    method: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for lists; the first of the module's description where empty
    families: ClassVar[tuple[str, ...]] = ("vit", "swin", "cnn")
    # options that `fit` has to choose by the training images, and those that it chose; while one is open, its
    # default stands in for it
    open: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: Backbone | str,
        num_classes: int,
        *,
        pool: str = "backbone",
        head_bias: bool = True,
        **unknown,
    ):
        super().__init__()
        refuse_unknown(unknown, method_options(type(self)), f"option of {self.method}")
        check_whole("num_classes", num_classes, most=10_000_000)
        check_bool("head_bias", head_bias)
        backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
        if not isinstance(backbone, Backbone):
            raise BackboneError(
                f"backbone must be a Backbone (see load_backbone) or a name; got {type(backbone).__name__}"
            )
        if backbone.family not in self.families:
            able = ", ".join(n for n, cls in available().items() if backbone.family in cls.families)
            raise BackboneError(
                f"method {self.method} works on {', '.join(self.families)} backbones; {backbone.name} is a "
                f"{backbone.family} backbone. Methods that work on it: {able}"
            )
        if backbone.tuned_by or any(p.requires_grad for p in backbone.parameters()):
            told = f"belongs to a {backbone.tuned_by} model" if backbone.tuned_by else "is not frozen"
            raise BackboneError(
                f"this {backbone.name} {told}; give the backbone as it was loaded, or model.merge().backbone"
            )
        cheaper.check_method(backbone, self.method)
        self.backbone = backbone
        self.num_classes = num_classes
        self.classes: list[str] | None = None
        # how open options were chosen, as `training.choosing` says it
        self.chosen: dict[str, Any] | None = None
        self.pool = pool
        self.options: dict[str, Any] = {}
        self.record(pool=pool, head_bias=head_bias)
        self.head = self.new_head(backbone.pooled_width(pool))

    def new_head(self, width: int) -> nn.Linear:
        """A head on features of that width, with its first values."""
        head = nn.Linear(width, self.num_classes, bias=self.options["head_bias"])
        nn.init.trunc_normal_(head.weight, std=0.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        return head

    def record(self, **options) -> None:
        """Note options as given, in a form JSON keeps; they rebuild the model from a saved adapter."""
        self.options.update({k: list(v) if isinstance(v, tuple) else v for k, v in options.items()})

    def settle(self, chosen: Mapping[str, Any], seed: int) -> None:
        """Take these values of `open` options, and draw what depends on them anew from the seed."""
        raise OptionError(f"method {self.method} leaves nothing open")

    @classmethod
    def known_before(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as a row's key has them: without later ones where these change nothing."""
        return dict(options)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what `behind` reads, (B, E); the frozen backbone here."""
        return self.backbone.pool(self.backbone.body(self.backbone.enter(images)), self.pool)

    def encoding(self) -> tuple:
        """What tells the output of `encode` apart from that of other methods on the same backbone."""
        return (type(self).encode, self.pool)

    def behind(self) -> nn.Module:
        """The part that turns the output of `encode` into logits: the head here.

        Where everything that is trained lies in it, `fit` encodes each image once and trains on that.
        """
        return self.head

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the head reads, (B, F)."""
        return self.encode(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) in the head's dtype; B may be 0. `DataError` for what are no images."""
        self.backbone.check_images(images)
        with self.backbone.autocast(images.device):
            if len(images):
                features = self.features(images)
            else:  # timm's windows take no empty batch: one image stands in for it
                features = self.features(images.new_zeros(1, *images.shape[1:]))[:0]
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def loss_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Extra losses of the method, by name, to add to the cross-entropy; none by default."""
        return {}

    def step_mean(self, images: Tensor) -> Tensor | None:
        """A mean over images that `loss_terms` needs over all of a step, by `noise.over_step`; else None."""
        return None

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last forward worth logging; reading them may synchronise with the device."""
        return {}

    def merge(self) -> "TunedModel":
        """Fold the method into the backbone's weights, where the method can."""
        raise OptionError(f"method {self.method} does not merge into the weights of a backbone")

    def requires_grad_(self, requires_grad: bool = True) -> "TunedModel":
        """Ask for gradients of what the method trains, and of its head; what is frozen stays frozen."""
        frozen = {id(p) for p in self.backbone.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(requires_grad)
        self.backbone.requires_grad_(requires_grad)
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser gets: the method's parameters and the head."""
        return (p for p in self.parameters() if p.requires_grad)

    def num_trainable(self, head: bool = False, kept: bool = False) -> int:
        """Number of trained parameters, with or without the head; `kept` leaves out what is pruned."""
        counts = count_parameters(self, self.head)
        if head:
            return counts["kept_with_head" if kept else "with_head"]
        return counts["kept" if kept else "dense"]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the method and the head, and the backbone's only where trained."""
        tuned = {n for n, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.") or k in tuned}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy an adapter's tensors in; `AdapterError` unless names and shapes agree and all is finite."""
        match_masks(self, state)
        own = self.adapter_state_dict()
        missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or foreign:
            told = [f"lacks {', '.join(missing[:6])}"] if missing else []
            told += [f"holds unknown {', '.join(foreign[:6])}"] if foreign else []
            raise AdapterError(
                f"the adapter does not fit method {self.method} with these options: {'; '.join(told)}"
            )
        got = state["head.weight"].shape
        if got != own["head.weight"].shape:
            raise AdapterError(
                f"the adapter's head is {got[0]} classes from {got[1]} features; this model has "
                f"num_classes={self.num_classes} from {self.head.in_features} features. Build the model with "
                "the adapter's classes and pool, or load the adapter by load_adapter(dir)"
            )
        for name, tensor in own.items():
            if state[name].is_complex() or state[name].is_floating_point() != tensor.is_floating_point():
                raise AdapterError(
                    f"{name} of the adapter is {state[name].dtype}; train or fetch the adapter again"
                )
            if state[name].shape != tensor.shape:
                raise AdapterError(
                    f"{name} of the adapter is {tuple(state[name].shape)}; this model needs "
                    f"{tuple(tensor.shape)}: other options, or a backbone of another width"
                )
        if bad := not_finite(state):
            raise AdapterError(
                f"{', '.join(bad)} of the adapter holds NaN or Inf; train or fetch the adapter again"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def describe(self) -> dict[str, Any]:
        """What `adapter.json` says about this model; JSON-able.

        >>> probe = available()["probe"](load_backbone("resnet10t", pretrained=False), num_classes=2)
        >>> probe.describe()["parameters"]
        {'method': 0, 'with_head': 1026}
        """
        backbone, counts = self.backbone, count_parameters(self, self.head)
        images, compacted = describe_images(backbone), describe_compacted(self)
        pruned = any(key.endswith(MASK) for key in self.adapter_state_dict())
        kept = {"kept": counts["kept"], "kept_with_head": counts["kept_with_head"]}
        return {
            "format_version": FORMAT_VERSION if compacted or pruned else 1,
            "method": self.method,
            "options": self.options,
            **({"chosen": self.chosen} if self.chosen else {}),
            "num_classes": self.num_classes,
            "classes": self.classes,
            "parameters": {"method": counts["dense"], "with_head": counts["with_head"]}
            | (kept if pruned else {}),
            **({"compacted": compacted} if compacted else {}),
            "backbone": {
                "name": backbone.name,
                "family": backbone.family,
                "weights_source": backbone.weights_source,
                **({"caveat": backbone.caveat} if backbone.caveat else {}),
                "sha256": backbone.weights_sha256,
                "img_size": images.pop("img_size"),
                "pool": (backbone.request or {}).get("pool"),
                # what rebuilds it; a module or a class among its arguments cannot be written down
                "request": backbone.request if _is_plain(backbone.request) else None,
            },
            "normalisation": images,
            "versions": {
                "lion_fast": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }

    def save_adapter(self, directory: str | os.PathLike) -> None:
        """Write what the method trained, and the head, as adapter.safetensors and adapter.json.

        Raises `AdapterError` as `methods.files.write_adapter` does, which says what the files hold.
        """
        write_adapter(directory, self.describe(), self.adapter_state_dict())

    def extra_repr(self) -> str:
        return f"method={self.method}, " + ", ".join(f"{k}={v!r}" for k, v in self.options.items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
