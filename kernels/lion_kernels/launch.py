"""Launch configurations: a pure function of shape, dtype and compute capability."""

import torch


def why_not(dtype: torch.dtype, state_dim: int) -> str | None:
    """The reason why no kernel serves this dtype and state width, or None."""
    return "the kernels are not part of this version yet"
