"""Tuning methods behind one interface; `create` builds one on a backbone."""

from contextlib import nullcontext

import torch

from lion_fast.backbones import Backbone, load_backbone
from lion_fast.errors import OptionError, check_seed, refuse_unknown, shown
from lion_fast.methods.adapter import AdaptFormer, Houlsby
from lion_fast.methods.apt import APT
from lion_fast.methods.base import TunedModel, available, check_kinds, method_options, register
from lion_fast.methods.cvpt import CVPT
from lion_fast.methods.dyt import DyT
from lion_fast.methods.e2vpt import E2VPT
from lion_fast.methods.lion import LionModel
from lion_fast.methods.lora import LoRA
from lion_fast.methods.partial import BitFit, Full, NormTune, Partial
from lion_fast.methods.probe import Probe
from lion_fast.methods.ssf import SSF
from lion_fast.methods.vfpt import VFPT
from lion_fast.methods.vpt import VPT

__all__ = [
    "APT", "CVPT", "E2VPT", "SSF", "VFPT", "VPT", "AdaptFormer", "BitFit", "DyT", "Full", "Houlsby",
    "LionModel", "LoRA", "NormTune", "Partial", "Probe", "TunedModel", "available", "create",
    "method_options", "register",
]  # fmt: skip


def create(
    backbone: str | Backbone,
    method: str = "lion",
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
    memory: str = "plain",
    fold: bool = False,
    precision: str = "fp32",
    **options,
) -> TunedModel:
    """A tuned model: `method` on `backbone`, ready to train.

    backbone: a name, loaded with `pretrained`, `weights`, `img_size`, `memory`, `fold` and `precision` as
        `load_backbone` says, or a `Backbone` made before (which these then cannot change).
    method: a name of `available()`.
    num_classes: outputs of the head; required.
    seed: draws the method's and the head's first values (and a random backbone) from this seed, and leaves
        the global generator as it was.
    options: of the method; `method_options` lists them, an unknown one is refused by name.

    >>> small = load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> create(small, method="vpt", num_classes=3, length=5)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 3])
    """
    if not isinstance(method, str) or method not in available():
        raise OptionError(f"no method named {shown(method)}; the methods are {', '.join(available())}")
    cls = available()[method]
    # before a backbone is downloaded for nothing
    refuse_unknown(options, method_options(cls), f"option of {method}")
    check_kinds(cls, options)
    if num_classes is None:
        raise OptionError("create needs num_classes, the number of outputs of the head")
    if seed is not None:
        check_seed("seed", seed)
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(backbone, str):
            backbone = load_backbone(
                backbone,
                pretrained=pretrained,
                weights=weights,
                img_size=img_size,
                memory=memory,
                fold=fold,
                precision=precision,
            )
        elif any(
            type(value) is not type(default) or value != default
            for value, default in (
                (weights, None), (img_size, None), (memory, "plain"), (fold, False), (precision, "fp32"),
            )
        ):  # fmt: skip
            raise OptionError(
                "weights, img_size, memory, fold and precision belong to load_backbone when the backbone is "
                "not given by name"
            )
        return cls(backbone, num_classes, **options)
