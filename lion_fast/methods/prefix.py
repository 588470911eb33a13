"""Keys and values that do not depend on the images, kept between evaluations."""

from typing import Any

import torch
from torch import Tensor

KV = list[tuple[Tensor, Tensor]]


class PrefixCache:
    """Mixin of methods that put rows of keys and values, the same for every image, into attention.

    While training, or where gradients are recorded, they are computed in every call, once for the batch;
    while evaluating without gradients they are computed once and kept until what they are made of changes.
    Inside `torch.compile`, which cannot see that change, they are computed in every call.
    A method gives `_prefix`, what computes them, and `_prefix_sources`, the tensors they are made of.
    """

    _cache: tuple[tuple[Any, ...], KV] | None = None

    def _prefix(self) -> KV:
        raise TypeError(f"{type(self).__name__} must say how its prefix is computed")

    def _prefix_sources(self) -> tuple[Tensor, ...]:
        raise TypeError(f"{type(self).__name__} must say what its prefix is made of")

    def prefix(self) -> KV:
        """Keys and values of every block, each (h, P, D/h)."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._prefix()
        sources = self._prefix_sources()
        # an in-place update, a cast and an autocast region each make another key
        device = sources[0].device
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (*sources, cast, *((t._version, t.device) for t in sources))
        if self._cache is None or not _same(self._cache[0], key, len(sources)):
            self._cache = (key, self._prefix())
        return self._cache[1]

    def clear_cache(self) -> None:
        """Forget kept keys and values; needed by hand only after a write to `.data` in evaluation."""
        self._cache = None

    def train(self, mode: bool = True):
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self.clear_cache()
        return super()._apply(fn, recurse)


def _same(old: tuple, new: tuple, sources: int) -> bool:
    return all(a is b for a, b in zip(old[:sources], new[:sources], strict=True)) and (
        old[sources:] == new[sources:]
    )
