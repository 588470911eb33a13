"""Modules whose matrices can carry a pruning mask."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lion_fast.errors import OptionError


class Masked(nn.Module):
    """Keeps a boolean mask, True where kept, beside each parameter named in `matrices`.

    A mask is a buffer NAME_mask, which is not there until it is set, and made on loading where the
    state_dict has it. `masked` multiplies by it, so that an entry off the mask has neither a value nor a
    gradient; the parameter itself is zero there when the mask is set.

    The buffers are named as those of `torch.nn.utils.prune`, whose masks count too while they are there.
    """

    matrices: ClassVar[tuple[str, ...]] = ()

    def masked(self, name: str) -> Tensor:
        """The matrix as it counts: the parameter itself, or its product with its mask."""
        matrix, mask = getattr(self, name), getattr(self, f"{name}_mask", None)
        return matrix if mask is None else matrix * mask

    def masks(self) -> dict[str, Tensor]:
        """The masks that are set, by the name of their matrix.

        Raises OptionError where they are those of `torch.nn.utils.prune`.
        """
        for name in self.matrices:
            if f"{name}_orig" in self._parameters:
                raise OptionError(
                    f"{name} is pruned by torch.nn.utils.prune: call its remove(layer, {name!r}) first, or "
                    "use lion_fast.pruning alone"
                )
        found = {name: getattr(self, f"{name}_mask", None) for name in self.matrices}
        return {name: mask for name, mask in found.items() if mask is not None}

    def _put_mask(self, name: str, mask: Tensor | None) -> None:
        if mask is not None:
            self.register_buffer(f"{name}_mask", mask)
        elif hasattr(self, f"{name}_mask"):
            delattr(self, f"{name}_mask")

    @torch.no_grad()
    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Set the mask of a matrix, a boolean of its shape, and zero what it drops; None takes it away.

        Raises OptionError for another name, shape or dtype, and as `masks`.
        """
        matrix = getattr(self, name) if name in self.matrices else None
        if matrix is None:
            raise OptionError(f"{name!r} has no mask; those with one are {', '.join(self.matrices)}")
        self.masks()
        if mask is not None:
            of = getattr(mask, "dtype", type(mask).__name__), tuple(getattr(mask, "shape", ()))
            if of != (torch.bool, tuple(matrix.shape)):
                raise OptionError(
                    f"the mask of {name} must be a boolean of shape {tuple(matrix.shape)}; got {of[0]} of "
                    f"shape {of[1]}"
                )
            mask = mask.to(matrix.device, copy=True)
            matrix.masked_fill_(~mask, 0)
        self._put_mask(name, mask)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self._make_masks(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _make_masks(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """A mask that keeps all for each one that the state has and this module has not yet."""
        for name in self.matrices:
            matrix = getattr(self, name)
            known = getattr(self, f"{name}_mask", None) is not None
            if f"{prefix}{name}_mask" in state and matrix is not None and not known:
                self._put_mask(name, torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device))


class Seen:
    """Tensors as they were: `same` tells whether given ones are those, and unchanged.

    A write to `.data` in place is the one change that torch keeps no count of, and of inference tensors all.

    >>> weight = torch.zeros(2)
    >>> seen = Seen([weight])
    >>> seen.same([weight]), seen.same([weight.add_(1)])
    (True, False)
    """

    def __init__(self, tensors: Iterable[Tensor]):
        # aliases keep the memory, so that no other tensor can come to lie at its address
        self._held = [(t, t.detach()) for t in tensors]
        self._stamps = _stamps(t for t, _ in self._held)

    def same(self, tensors: Iterable[Tensor]) -> bool:
        return _stamps(tensors) == self._stamps


def _stamps(tensors: Iterable[Tensor]) -> list[tuple[int, int, int, torch.dtype]]:
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors]


def match_masks(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the `Masked` modules of a model the masks that a state_dict for it has, and no others.

    New ones keep everything until they are loaded.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, Masked):
            prefix = f"{prefix}." if prefix else ""
            module._make_masks(state, prefix)
            for name in module.masks():
                if f"{prefix}{name}_mask" not in state:
                    module._put_mask(name, None)
