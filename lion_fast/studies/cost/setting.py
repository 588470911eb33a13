"""What is compared: the setting that all contenders of one interleaved run share, and the contenders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What all contenders of one interleaved run share.

    mode: "train" (forward, backward, optimiser) or "infer". dtype: "fp32", "bf16" or "fp8", how the frozen
    backbone computes. engine: "eager", "compile" or "graphs" (compiled, CUDA graphs). memory: "plain" or
    "save". fold: norms folded into linears. img_size: None is the backbone's own.
    """

    backbone: str
    mode: str
    batch_size: int
    dtype: str = "fp32"
    engine: str = "eager"
    memory: str = "plain"
    fold: bool = False
    img_size: int | None = None

    def key(self) -> str:
        """One line that names it.

        >>> Setting("vit_tiny_patch16_224", "train", 8).key()
        'vit_tiny_patch16_224/train/b8/fp32/eager'
        """
        size = f"@{self.img_size}" if self.img_size else ""
        more = [word for word, yes in (("save", self.memory == "save"), ("fold", self.fold)) if yes]
        parts = [self.backbone + size, self.mode, f"b{self.batch_size}", self.dtype, self.engine, *more]
        return "/".join(parts)


@dataclass(frozen=True)
class Contender:
    """One method with options in one form: "exact" or "naive" where it has both, "merged", LION's variant
    "states" or "residual" (two functions), or "" where it has only one. `floor` is the name of the bare
    backbone.

    Rows taken before LION had variants are labelled `lion`: they are of its residual one.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    form: str = ""

    def label(self) -> str:
        """One word that names it.

        >>> Contender("vpt", (("length", 50),), "naive").label()
        'vpt(length=50):naive'
        """
        inside = ",".join(f"{k}={v}" for k, v in self.options)
        return self.method + (f"({inside})" if inside else "") + (f":{self.form}" if self.form else "")


FLOOR = Contender("floor")


def keys(setting: Setting, contenders: Sequence[Contender]) -> Iterator[str]:
    """The keys of the rows of a setting, the floor's first.

    >>> list(keys(Setting("resnet18", "infer", 2), [Contender("probe")]))
    ['resnet18/infer/b2/fp32/eager/floor', 'resnet18/infer/b2/fp32/eager/probe']
    """
    for contender in [FLOOR, *contenders]:
        yield f"{setting.key()}/{contender.label()}"
