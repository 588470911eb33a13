"""Launch configurations: a pure function of shape, dtype and compute capability.

Nothing here imports Triton or asks a device; `present` and `tuned` do, once a kernel is launched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_kernels.reference import ACTIVATIONS

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# The recurrence W stays in shared memory during a solve: 128 KB of float16, 64 KB of float32.
MAX_STATE = 256
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
    """Tile sizes and resources of one launch.

    `check_every` steps lie between stopping tests. `carry` keeps the last pre-activation of a solve
    through the loop, which costs registers; without it one more product recomputes it, which costs a
    second copy of W in shared memory where the tensor core takes W from there in another layout.
    """

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    check_every: int = 1
    carry: bool = False

    @property
    def resources(self) -> dict[str, int]:
        """The launch options that are not arguments of the kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Per capability, arithmetic and operation: (widest padded state, configuration).
# The tiles compile ahead of time without spills in Triton 3.6, 3.8 and 3.9 (docs/kernels.md); none has been
# timed yet. The number of rows does not enter: the order of a row's sums, and with it its bits, must not
# depend on the size of the batch.
_HALF = {
    "solve": (
        (64, Config(64, 64, 4, 3)),
        (128, Config(64, 64, 8, 3)),
        (256, Config(32, 32, 16, 2, carry=True)),
    ),
    "adjoint": (
        (64, Config(64, 64, 4, 3)),
        (128, Config(64, 64, 8, 3)),
        (256, Config(16, 32, 8, 2)),
    ),
    "weights": ((64, Config(64, 64, 4, 3)), (128, Config(64, 64, 8, 3)), (256, Config(64, 32, 8, 2))),
}
_TF32 = {
    "solve": ((32, Config(64, 32, 4, 2)), (64, Config(64, 32, 8, 3)), (128, Config(64, 32, 8, 2))),
    "adjoint": ((32, Config(64, 32, 4, 2)), (64, Config(64, 32, 8, 3)), (128, Config(64, 32, 8, 2))),
    "weights": ((32, Config(32, 32, 4, 2)), (64, Config(32, 32, 4, 3)), (128, Config(32, 32, 8, 2))),
}
# Without tensor cores: every product is fused multiply-adds over registers.
_IEEE = {
    "solve": (
        (32, Config(64, 32, 4, 2)),
        (64, Config(32, 32, 8, 2)),
        (128, Config(16, 32, 16, 2, carry=True)),
    ),
    "adjoint": ((32, Config(64, 32, 8, 2)), (64, Config(32, 32, 16, 2)), (128, Config(16, 32, 8, 2))),
    "weights": ((64, Config(32, 32, 4, 3)), (128, Config(32, 32, 8, 2))),
}


def _with(table: dict, **narrower: tuple) -> dict:
    """A table whose entries of an operation are preceded by those given for it."""
    return {op: (*narrower.get(op, ()), *entries) for op, entries in table.items()}


CONFIGS = {
    80: {
        "half": _with(_HALF, weights=((64, Config(64, 32, 4, 3)),)),
        "tf32": {
            **_TF32,
            "solve": ((32, Config(64, 32, 4, 2)), (64, Config(64, 32, 8, 3)), (128, Config(32, 32, 8, 2))),
        },
        "ieee": _IEEE,
    },
    90: {"half": _HALF, "tf32": _TF32, "ieee": _IEEE},
    100: {
        "half": {
            "solve": (
                (32, Config(64, 32, 4, 3)),
                (64, Config(64, 64, 4, 3)),
                (128, Config(64, 64, 8, 3)),
                (256, Config(16, 32, 8, 1, carry=True)),
            ),
            "adjoint": (
                (32, Config(64, 32, 4, 3)),
                (64, Config(64, 64, 4, 2)),
                (128, Config(64, 64, 8, 3)),
                (256, Config(16, 32, 8, 2)),
            ),
            "weights": _HALF["weights"],
        },
        "tf32": _with(_TF32, solve=((16, Config(64, 64, 4, 2)),), adjoint=((16, Config(64, 32, 8, 2)),)),
        "ieee": _with(_IEEE, solve=((32, Config(64, 32, 4, 2)), (64, Config(16, 32, 8, 2)))),
    },
}


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


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """How products of tokens of `dtype` are made: "half", "tf32" or "ieee"."""
    return "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"


def newest(tables: dict, capability: tuple[int, int]):
    """The entry of the newest capability, such as 90, that is not newer than `capability`."""
    number = capability[0] * 10 + capability[1]
    return tables[max((c for c in tables if c <= number), default=min(tables))]


def config(
    op: str,
    rows: int,
    width: int,
    state: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tf32: bool = False,
) -> Config:
    """The launch configuration of `op` ("solve", "adjoint" or "weights") for `rows` tokens of `width`.

    The newest table not newer than `capability` is taken; `tf32` says how float32 products are made.
    `rows` and `width` are part of the question, not of the present answer.
    Raises ValueError where `why_not` has a reason.
    """
    if reason := why_not(dtype, state):
        raise ValueError(reason)
    ladder = newest(CONFIGS, capability)[arithmetic(dtype, tf32)][op]
    return next(found for widest, found in ladder if padded_state(state) <= widest)


def numerics(dtype: torch.dtype, tf32: bool, interpreted: bool = False) -> dict[str, str]:
    """The precision arguments of the kernels for tokens of `dtype`.

    Half-precision tokens meet A and V in their own dtype and iterate with float16 operands, whose
    rounding is an eighth of bfloat16's; float32 tokens use tf32 products where torch allows them.
    """
    kind = DTYPES[dtype]
    if kind == "fp32":
        return {"MATH": "exact", "INPUT": "fp32", "LOOP": "fp32", "PRECISION": "tf32" if tf32 else "ieee"}
    if interpreted:
        # The interpreter has no PTX, and multiplies the bit patterns of bfloat16 operands.
        operand = "fp32" if kind == "bf16" else kind
        return {"MATH": "approx", "INPUT": operand, "LOOP": "fp16", "PRECISION": "ieee"}
    return {"MATH": "ptx", "INPUT": kind, "LOOP": "fp16", "PRECISION": "ieee"}


def check_shapes(x: Tensor, **given: Tensor) -> None:
    """Asserts that x is [T, D] and that the other arguments fit it, by their names in the mathematics."""
    assert x.ndim == 2, f"tokens must be [T, D]; got {list(x.shape)}"
    D, R = x.shape[1], given["A"].shape[0]
    shapes = {"A": [R, D], "W": [R, R], "b": [R], "V": [D, R], "c": [D], "p": [x.shape[0], R]}
    shapes["grad_out"] = list(x.shape)
    for name, t in given.items():
        assert list(t.shape) == shapes[name], f"{name} must be {shapes[name]}; got {list(t.shape)}"
        assert t.device == x.device, f"{name} is on {t.device}, the tokens are on {x.device}"


def check_activation(activation: str) -> None:
    """Raises ValueError for one that the kernels do not have."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _tile_constants(config: Config, width: int, state: int) -> dict[str, object]:
    return {
        "D": width,
        "R": state,
        "BLOCK_T": config.block_t,
        "BLOCK_R": padded_state(state),
        "BLOCK_D": config.block_d,
    }


def loop_constants(
    config: Config,
    width: int,
    state: int,
    kinds: dict[str, str],
    activation: str,
    damping: float,
    floor: float,
    **own: object,
) -> dict[str, object]:
    """The compile-time arguments of a kernel that iterates on chip; `kinds` from `numerics`.

    `floor` is a state's smallest root mean square in its residual, `own` what the kernel has to itself.
    Raises ValueError for an activation that the kernels do not have.
    """
    check_activation(activation)
    return {
        **_tile_constants(config, width, state),
        **kinds,
        "FLOOR": floor * state**0.5,
        "ACT": activation,
        "DAMPED": damping != 1,
        "CHECK_EVERY": config.check_every,
        **own,
    }


def weights_constants(
    config: Config, width: int, state: int, kinds: dict[str, str], rows: int
) -> dict[str, object]:
    """The compile-time arguments of the fused weight gradients, `rows` rows per split."""
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
