"""Launch configurations: a pure function of shape, dtype and compute capability.

Nothing here imports Triton or asks a device before a kernel is launched.
"""

import contextlib
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_kernels.reference import ACTIVATIONS, ADJOINT_FLOOR, STATE_FLOOR

MAX_STATE = 256
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Two operands of this many bytes per state pair must fit the shared memory of a block.
MAX_STATE_FP32 = 128
# Up to so many rows the weights' gradients are fused.
FUSED_ROWS = 4096
# Columns behind the state of which the first is one, for the bias sums; eight keep rows 16-byte aligned.
ONES = 8
# Entries that one program of the second stage of the fused weight gradients adds up.
SUM_BLOCK = 1024
# Half-precision products with a float32 result, on CUDA since torch 2.8.
MM_OUT_DTYPE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one launch; `check_every` is the step between stopping tests."""

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    check_every: int = 1

    @property
    def resources(self) -> dict[str, int]:
        """The launch options that are not arguments of the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Per capability and operation: (widest padded state, configuration), for 16-bit and for float32 tokens.
# Tiles are those that ahead-of-time compilation shows without spills (see docs/kernels.md); none has
# been timed yet. The number of rows does not enter: the order of a row's sums, and with it its bits,
# must not depend on the size of the batch.
_HALF = {
    "solve": (
        (32, Config(64, 64, 4, 3)),
        (64, Config(64, 64, 4, 3)),
        (128, Config(64, 64, 8, 3)),
        (256, Config(64, 32, 8, 2)),
    ),
    "adjoint": (
        (32, Config(64, 64, 4, 3)),
        (64, Config(64, 64, 4, 3)),
        (128, Config(64, 64, 8, 3)),
        (256, Config(64, 32, 8, 2)),
    ),
    "weights": ((64, Config(64, 64, 4, 3)), (128, Config(64, 64, 8, 3)), (256, Config(64, 32, 8, 2))),
}
_FLOAT = {
    "solve": ((64, Config(64, 32, 4, 3)), (128, Config(64, 32, 8, 2))),
    "adjoint": ((64, Config(64, 32, 4, 3)), (128, Config(64, 32, 8, 2))),
    "weights": ((64, Config(32, 32, 4, 3)), (128, Config(32, 32, 8, 2))),
}
CONFIGS = {80: (_HALF, _FLOAT), 90: (_HALF, _FLOAT), 100: (_HALF, _FLOAT)}


def padded_state(state: int) -> int:
    """The state width the kernels work in: a power of two of at least 16."""
    return max(16, 1 << (state - 1).bit_length())


def why_not(dtype: torch.dtype, state_dim: int) -> str | None:
    """The reason why no whole-solve kernel serves this dtype and state width, or None."""
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32 tokens, not {dtype}"
    widest = MAX_STATE_FP32 if dtype == torch.float32 else MAX_STATE
    if state_dim > widest:
        return (
            f"a state of {state_dim} does not stay on chip: the whole-solve kernels go up to {widest} for "
            f"{dtype}, wider states take one launch per step (lion_kernels.step)"
        )
    return None


def config(
    op: str, rows: int, width: int, state: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Config:
    """The launch configuration of `op` ("solve", "adjoint" or "weights") for `rows` tokens of `width`.

    The newest table not newer than `capability` is taken. `rows` and `width` are part of the question,
    not of the present answer. Raises ValueError where `why_not` has a reason.
    """
    if reason := why_not(dtype, state):
        raise ValueError(reason)
    number = capability[0] * 10 + capability[1]
    table = CONFIGS[max((c for c in CONFIGS if c <= number), default=min(CONFIGS))]
    for widest, found in table[dtype == torch.float32][op]:
        if padded_state(state) <= widest:
            return found
    raise AssertionError(f"no configuration of {op} for a state of {state}")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks before the first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; of the interpreter's tables on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def numerics(dtype: torch.dtype) -> dict[str, str]:
    """The precision arguments of the kernels for tokens of `dtype`.

    Half-precision tokens meet A and V in their own dtype and iterate with float16 operands, whose
    rounding is an eighth of bfloat16's; float32 tokens use tf32 products where torch allows them.
    """
    kind = DTYPES[dtype]
    if kind == "fp32":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return {"MATH": "exact", "INPUT": "fp32", "LOOP": "fp32", "PRECISION": "tf32" if tf32 else "ieee"}
    if interpreted():
        # The interpreter multiplies the bit patterns of bfloat16 operands.
        return {
            "MATH": "approx",
            "INPUT": "fp32" if kind == "bf16" else kind,
            "LOOP": "fp16",
            "PRECISION": "ieee",
        }
    return {"MATH": "ptx", "INPUT": kind, "LOOP": "fp16", "PRECISION": "ieee"}


def choose(op: str, rows: int, width: int, state: int, dtype: torch.dtype, device: torch.device) -> Config:
    """`config` for the capability of `device`."""
    return config(op, rows, width, state, dtype, capability(device))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_shapes(x: Tensor, **given: Tensor) -> None:
    """Asserts that x is [T, D] and that the other arguments fit it, by their names in the mathematics."""
    assert x.ndim == 2, f"tokens must be [T, D]; got {list(x.shape)}"
    D, R = x.shape[1], given["A"].shape[0]
    shapes = {"A": [R, D], "W": [R, R], "b": [R], "V": [D, R], "c": [D], "p": [x.shape[0], R]}
    shapes["grad_out"] = list(x.shape)
    for name, t in given.items():
        assert list(t.shape) == shapes[name], f"{name} must be {shapes[name]}; got {list(t.shape)}"
        assert t.device == x.device, f"{name} is on {t.device}, the tokens are on {x.device}"


def _tile_constants(config: Config, width: int, state: int) -> dict[str, object]:
    return {
        "D": width,
        "R": state,
        "BLOCK_T": config.block_t,
        "BLOCK_R": padded_state(state),
        "BLOCK_D": config.block_d,
    }


def _loop_constants(
    config: Config,
    width: int,
    state: int,
    dtype: torch.dtype,
    activation: str,
    damping: float,
    residual: bool,
    floor: float,
) -> dict[str, object]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return {
        **_tile_constants(config, width, state),
        **numerics(dtype),
        "FLOOR": floor * state**0.5,
        "ACT": activation,
        "DAMPED": damping != 1,
        "RESIDUAL": residual,
        "CHECK_EVERY": config.check_every,
    }


def solve_constants(
    config: Config,
    width: int,
    state: int,
    dtype: torch.dtype,
    activation: str,
    damping: float,
    residual: bool,
    save: bool,
) -> dict[str, object]:
    """The compile-time arguments of the solve kernel."""
    return {
        **_loop_constants(config, width, state, dtype, activation, damping, residual, STATE_FLOOR),
        "SAVE": save,
    }


def adjoint_constants(
    config: Config,
    width: int,
    state: int,
    dtype: torch.dtype,
    activation: str,
    damping: float,
    residual: bool,
    ones: int,
) -> dict[str, object]:
    """The compile-time arguments of the adjoint kernel."""
    return {
        **_loop_constants(config, width, state, dtype, activation, damping, residual, ADJOINT_FLOOR),
        "ONES": ones,
    }


def weights_constants(
    config: Config, width: int, state: int, dtype: torch.dtype, rows: int
) -> dict[str, object]:
    """The compile-time arguments of the fused weight gradients, `rows` rows per split."""
    kinds = numerics(dtype)
    return {
        **_tile_constants(config, width, state),
        "ROWS": rows,
        "INPUT": kinds["INPUT"],
        "PRECISION": kinds["PRECISION"],
    }


def rows_per_split(rows: int, width: int) -> int:
    """Rows that one program of the fused weight gradients sums, or 0 where matrix products take over.

    Few rows are bound by launches, of which the fused form has two and the products with their
    copies seven; many rows are left to the vendor's products until both have been timed.
    """
    if rows > FUSED_ROWS:
        return 0
    return min(512, max(64, 1 << max(0, rows // 16 - 1).bit_length()))


@dataclass(frozen=True)
class Shipped:
    """One kernel configuration as it is compiled ahead of time.

    `signature` holds Triton's type of every argument that is not a constexpr, `divisible` the names of
    those that are multiples of 16, `capability` the target, such as 90.
    """

    name: str
    module: str
    kernel: str
    capability: int
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    spill_free: bool
    divisible: tuple[str, ...] = field(default=())


def shipped() -> list[Shipped]:
    """Every configuration that this version launches, for each capability of the tables."""
    return []
