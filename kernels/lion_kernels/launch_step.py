"""Launch configurations of the step kernels, as `launch` has those of the whole solve."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lion_kernels import launch

MAX_STATE = 1024
# Relative spacing of float16 near one is 2^-10: a tolerance below this would never be met on a rounded state.
HALF_STATE_TOL = 1e-3


@dataclass(frozen=True)
class StepConfig:
    """Tile of one step launch (rows, state columns, depth of a slice of its product) and resources."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def resources(self) -> dict[str, int]:
        """The launch options that are not arguments of the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Per capability and arithmetic; nothing here has been timed yet. The number of rows does not enter, so
# that the bits of a row do not depend on the size of the batch.
_TF32, _IEEE = StepConfig(128, 64, 32, 8, 3), StepConfig(64, 64, 16, 8, 2)
_HALF, _DAMPED = StepConfig(128, 64, 64, 8, 3), StepConfig(64, 64, 64, 8, 3)
CONFIGS = {
    80: {
        "half": StepConfig(128, 64, 32, 8, 3),
        "damped": _DAMPED,
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    90: {"half": _HALF, "damped": _DAMPED, "tf32": _TF32, "ieee": _IEEE},
    100: {"half": StepConfig(64, 64, 32, 4, 3), "damped": _DAMPED, "tf32": _TF32, "ieee": _IEEE},
}


def why_not(dtype: torch.dtype, state_dim: int) -> str | None:
    """The reason why no step kernel serves this dtype and state width, or None."""
    if dtype not in launch.DTYPES:
        return f"the kernels take float16, bfloat16 and float32 tokens, not {dtype}"
    if state_dim > MAX_STATE:
        return f"the step kernels go up to a state of {MAX_STATE}, not {state_dim}"
    return None


def config(
    rows: int,
    width: int,
    state: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tf32: bool = False,
    damping: float = 1.0,
) -> StepConfig:
    """The newest configuration that is not newer than `capability`; ValueError where `why_not` has a reason.

    `tf32` says how float32 products are made. Damped steps of half-precision tokens hold a float32 state
    next to the new one, which takes smaller tiles. `rows` and `width` are not part of the present answer.
    """
    if reason := why_not(dtype, state):
        raise ValueError(reason)
    kind = launch.arithmetic(dtype, tf32)
    return launch.newest(CONFIGS, capability)["damped" if kind == "half" and damping != 1 else kind]


class Planes(NamedTuple):
    """The dtype of the iterated state in memory, and of the operands of its products."""

    state: torch.dtype
    operand: torch.dtype


def plane_dtypes(dtype: torch.dtype, damping: float, tol: float) -> Planes:
    """Float32 tokens keep all in float32; others iterate with float16 operands.

    Their state is float16 too, which halves the memory a step moves, where nothing is lost by it: without
    damping the next step reads only the rounded operand anyway. Damped steps move by less than the
    rounding near the end, and a tight tolerance is below it, so these keep a float32 state.
    """
    if dtype == torch.float32:
        return Planes(torch.float32, torch.float32)
    rounded = damping == 1 and (tol == 0 or tol >= HALF_STATE_TOL)
    return Planes(torch.float16 if rounded else torch.float32, torch.float16)


def finish_constants(
    config: StepConfig, state: int, kinds: dict[str, str], activation: str, floor: float, **own: object
) -> dict[str, object]:
    """The compile-time arguments of a kernel that ends a solve; `kinds` from `launch.numerics`.

    `floor` is a state's smallest root mean square in its residual, `own` what the kernel has to itself.
    Raises ValueError for an activation that the kernels do not have.
    """
    launch.check_activation(activation)
    return {
        "R": state,
        "FLOOR": floor * state**0.5,
        "BLOCKS": -(-state // config.block_n),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "ACT": activation,
        "MATH": kinds["MATH"],
        **own,
    }


def step_constants(
    config: StepConfig,
    width: int,
    state: int,
    kinds: dict[str, str],
    activation: str,
    damping: float,
    floor: float,
    **own: object,
) -> dict[str, object]:
    """The compile-time arguments of a kernel that makes one step, as `finish_constants`."""
    own |= {"D": width, "BLOCK_K": config.block_k, "DAMPED": damping != 1, **kinds}
    return finish_constants(config, state, kinds, activation, floor, **own)


def read_out_constants(
    config: StepConfig, width: int, state: int, kinds: dict[str, str], **own: object
) -> dict[str, object]:
    """The compile-time arguments of the read-out kernel."""
    return {
        "D": width,
        "R": state,
        "BLOCKS": -(-width // config.block_n),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "INPUT": kinds["INPUT"],
        "PRECISION": kinds["PRECISION"],
        **own,
    }
