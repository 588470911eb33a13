"""Masked matrices in a file: one bit per entry and the kept values, instead of every value."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lion_fast.errors import AdapterError

MASK = "_mask"
BITS, KEPT, SHAPE = "#bits", "#kept", "#shape"


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as bytes, in row order, the first in the lowest bit; the last byte is padded.

    >>> pack_bits(torch.tensor([True, False, True] + 5 * [False] + [True])).tolist()
    [5, 1]
    """
    bits = np.packbits(mask.flatten().cpu().numpy(), bitorder="little")
    return torch.from_numpy(bits).to(mask.device)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The booleans that `pack_bits` packed; ValueError where their number does not fit."""
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise ValueError(f"{count} bits need {-(-count // 8)} bytes; got {bits.dtype} {list(bits.shape)}")
    flat = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), bitorder="little")).bool()
    if flat[count:].any():
        raise ValueError("bits behind the last entry are set")
    return flat[:count].view(shape).to(bits.device)


def pack_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict in which each matrix X with a mask X_mask becomes X#bits, X#kept and X#shape.

    An entry off the mask counts as zero and its value is not kept. What has no mask stays as it is.

    >>> state = {"A": torch.tensor([[0.0, 2.0]]), "A_mask": torch.tensor([[False, True]])}
    >>> sorted(pack_state(state))
    ['A#bits', 'A#kept', 'A#shape']
    """
    masks = {key.removesuffix(MASK): mask for key, mask in state.items() if _is_mask(key, state)}
    packed = {}
    for key, value in state.items():
        if key in masks:
            mask = masks[key]
            packed[key + BITS] = pack_bits(mask)
            packed[key + KEPT] = value[mask]
            packed[key + SHAPE] = torch.tensor(value.shape, dtype=torch.int64)
        elif not _is_mask(key, state):
            packed[key] = value
    return packed


def _is_mask(key: str, state: Mapping[str, Tensor]) -> bool:
    return key.endswith(MASK) and key.removesuffix(MASK) in state and state[key].dtype == torch.bool


def is_packed(state: Mapping[str, Tensor]) -> bool:
    """Whether `pack_state` packed anything here."""
    return any(key.endswith(BITS) for key in state)


def unpack_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict that `pack_state` packed: the kept values bit by bit, zeros off the masks, the masks.

    Raises AdapterError, naming the matrix, where the parts do not fit each other.
    """
    unpacked = {k: v for k, v in state.items() if not k.endswith((BITS, KEPT, SHAPE))}
    for key in [k.removesuffix(BITS) for k in state if k.endswith(BITS)]:
        try:
            shape = torch.Size(state[key + SHAPE].tolist())
            kept = state[key + KEPT]
            mask = unpack_bits(state[key + BITS], shape)
            if kept.ndim != 1 or len(kept) != int(mask.sum()):
                raise ValueError(f"{int(mask.sum())} bits are set for {kept.numel()} values")
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise AdapterError(
                f"the packed matrix {key} cannot be read ({error}); save the adapter again"
            ) from error
        value = kept.new_zeros(shape)
        value[mask] = kept
        unpacked[key], unpacked[key + MASK] = value, mask
    return unpacked
