"""Keys and values that do not depend on the images, kept between evaluations."""

from typing import Any

import torch
from torch import Tensor

from lion_fast.backbones import Backbone
from lion_fast.backbones.prefix import kv_sources
from lion_fast.equilibrium.masked import Seen

KV = list[tuple[Tensor, Tensor]]


def is_recorded() -> bool:
    """Whether this call is being compiled or traced: what Python decides in it would hold for ever."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class PrefixCache:
    """Mixin of methods that put rows of keys and values, the same for every image, into attention.

    While training, or where gradients are recorded, they are computed in every call, once for the batch;
    while evaluating without gradients they are computed once and kept until what they are made of changes:
    the method's own tensors or the frozen weights.
    Inside `torch.compile` and traces, which cannot see that change, they are computed in every call.
    A method gives `_prefix`, what computes them, and `_prefix_sources`, its own tensors in them.
    """

    backbone: Backbone
    _cache: tuple[Seen, torch.dtype | None, KV] | None = None

    def _prefix(self) -> KV:
        raise TypeError(f"{type(self).__name__} must say how its prefix is computed")

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        raise TypeError(f"{type(self).__name__} must say what its prefix is made of")

    def prefix(self) -> KV:
        """Keys and values of every block, each (h, P, D/h)."""
        if self.training or torch.is_grad_enabled() or is_recorded():
            return self._prefix()
        sources = [*self._prefix_sources(), *kv_sources(self.backbone)]
        if any(t.is_inference() for t in sources):  # their changes are not counted
            return self._prefix()
        device = sources[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if self._cache is None or self._cache[1] != cast or not self._cache[0].same(sources):
            self._cache = Seen(sources), cast, self._prefix()
        return self._cache[2]

    def clear_cache(self) -> None:
        """Forget kept keys and values; needed by hand only after a write to `.data` in evaluation."""
        self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def train(self, mode: bool = True):
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self.clear_cache()
        return super()._apply(fn, recurse)
