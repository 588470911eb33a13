"""Launch configurations of the block-sparse products, as `launch` has those of the whole solve."""

import torch

from lion_kernels import launch
from lion_kernels.launch_step import StepConfig

# Per arithmetic and block: rows, block (the columns of a tile), depth of a slice, warps, stages. Nothing here
# has been timed yet; they are tiles that compile without spills.
_PRODUCT = {
    "half": {16: (128, 16, 16, 4, 4), 32: (128, 32, 32, 4, 4), 64: (128, 64, 64, 8, 3)},
    "tf32": {16: (128, 16, 16, 4, 3), 32: (128, 32, 32, 8, 3), 64: (64, 64, 32, 8, 3)},
    "ieee": {16: (64, 16, 16, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
}
# A step holds more than a product: the old state too, which is float32 where a half-precision one is damped.
_STEP = {
    "half": _PRODUCT["half"],
    "damped": {16: (128, 16, 16, 4, 4), 32: (64, 32, 32, 8, 4), 64: (64, 64, 64, 8, 3)},
    "tf32": _PRODUCT["tf32"],
    "ieee": _PRODUCT["ieee"] | {64: (32, 64, 16, 8, 2)},
}
_SAMPLED = {
    "half": {16: (64, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (64, 64, 64, 4, 3)},
    "tf32": {16: (32, 16, 16, 4, 3), 32: (32, 32, 32, 4, 3), 64: (32, 64, 64, 8, 3)},
    "ieee": {16: (32, 16, 16, 4, 2), 32: (16, 32, 32, 4, 2), 64: (16, 64, 64, 8, 2)},
}


def config(op: str, block: int, dtype: torch.dtype, tf32: bool = False, damping: float = 1.0) -> StepConfig:
    """The tile of "matmul", "step" or "sampled" for blocks of `block`; the same on every capability.

    Of "sampled" block_t is the rows of a slice, and block_k is not used. ValueError for a dtype that the
    kernels do not take.
    """
    if dtype not in launch.DTYPES:
        raise ValueError(f"the kernels take float16, bfloat16 and float32 tokens, not {dtype}")
    kind = launch.arithmetic(dtype, tf32)
    if op == "sampled":
        return StepConfig(*_SAMPLED[kind][block])
    if op == "step":
        return StepConfig(*_STEP["damped" if kind == "half" and damping != 1 else kind][block])
    return StepConfig(*_PRODUCT[kind][block])


def sampled_constants(config: StepConfig, shape: tuple[int, int], kinds: dict[str, str]) -> dict[str, object]:
    """The compile-time arguments of the sampled dense x dense kernel; `kinds` from `launch.numerics`."""
    return {
        "N": shape[0],
        "K": shape[1],
        "BLOCK_T": config.block_t,
        "BLOCK": config.block_n,
        "INPUT": kinds["INPUT"],
        "PRECISION": kinds["PRECISION"],
    }


def matmul_constants(config: StepConfig, shape: tuple[int, int], kinds: dict[str, str]) -> dict[str, object]:
    """The compile-time arguments of the dense x sparse kernel."""
    own = {"ROW_BLOCKS": -(-shape[0] // config.block_n), "BLOCK_K": config.block_k}
    return sampled_constants(config, shape, kinds) | own
