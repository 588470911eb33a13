"""Launch configurations: a pure function of shape, dtype and compute capability.

Nothing here imports Triton or asks a device before a kernel is launched.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lion_kernels.reference import ACTIVATIONS, ADJOINT_FLOOR, STATE_FLOOR

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
# (operation, capability, padded state, arithmetic): the Triton releases in which some activation has spills
# on every tile tried, of which this is one without in the others. Without tensor cores.
SPILLING = {("solve", 100, 128, "ieee"): ("3.6",)}


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


def _arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    return "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"


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
    number = capability[0] * 10 + capability[1]
    table = CONFIGS[max((c for c in CONFIGS if c <= number), default=min(CONFIGS))]
    ladder = table[_arithmetic(dtype, tf32)][op]
    return next(found for widest, found in ladder if padded_state(state) <= widest)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks before the first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; of the interpreter's tables on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tf32_allowed() -> bool:
    """Whether torch lets float32 products on CUDA run in tf32, by either of its two settings."""
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)
    return settings.allow_tf32 if precision is None else precision == "tf32"


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


def present_numerics(dtype: torch.dtype) -> dict[str, str]:
    """`numerics` under torch's present settings, in the interpreter where that is on."""
    return numerics(dtype, tf32_allowed(), interpreted())


def choose(op: str, rows: int, width: int, state: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration tuned for this device where there is one, else `config`."""
    from lion_kernels import tune

    if found := tune.lookup(op, width, state, dtype, device):
        return found
    return config(op, rows, width, state, dtype, capability(device), tf32_allowed())


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
    kinds: dict[str, str],
    activation: str,
    damping: float,
    residual: bool,
    floor: float,
) -> dict[str, object]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return {
        **_tile_constants(config, width, state),
        **kinds,
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
    kinds: dict[str, str],
    activation: str,
    damping: float,
    residual: bool,
    save: bool,
) -> dict[str, object]:
    """The compile-time arguments of the solve kernel; `kinds` from `numerics`."""
    return {
        **_loop_constants(config, width, state, kinds, activation, damping, residual, STATE_FLOOR),
        "SAVE": save,
        "CARRY": config.carry,
    }


def adjoint_constants(
    config: Config,
    width: int,
    state: int,
    kinds: dict[str, str],
    activation: str,
    damping: float,
    residual: bool,
    ones: int,
) -> dict[str, object]:
    """The compile-time arguments of the adjoint kernel; `ones` columns follow the saved state."""
    return {
        **_loop_constants(config, width, state, kinds, activation, damping, residual, ADJOINT_FLOOR),
        "ONES": ones,
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


@dataclass(frozen=True)
class Shipped:
    """One kernel configuration as it is compiled ahead of time.

    `signature` holds Triton's type of every argument that is not a constexpr, `divisible` the names of
    those that are multiples of 16, `capability` the target, such as 90. `spills_in` names the releases of
    Triton, such as "3.6", in which the compiled kernel may use a stack; in others it must not.
    """

    name: str
    module: str
    kernel: str
    capability: int
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...]
    spills_in: tuple[str, ...] = ()


SHIPPED_STATES = (16, 32, 64, 128, 256)
SHIPPED_WIDTH = 768


def _ship(
    op: str,
    kernel: str,
    capability: int,
    state: int,
    dtype: torch.dtype,
    tf32: bool,
    width: int = SHIPPED_WIDTH,
    **options,
) -> Shipped:
    found = config(op, 1 << 16, width, state, dtype, divmod(capability, 10), tf32)
    kinds = numerics(dtype, tf32)
    tokens, word = "*" + DTYPES[dtype], "*fp32"
    scalars = {"T": "i32", "tol": "fp32", "damping": "fp32"}
    if op == "solve":
        constants = solve_constants(found, width, state, kinds, residual=True, save=True, **options)
        pointers = dict.fromkeys(("x_ptr", "a_ptr", "v_ptr", "out_ptr", "p_ptr"), tokens)
        pointers |= {"w_ptr": word, "b_ptr": word, "c_ptr": word, "change_ptr": word, "count_ptr": "*i32"}
        scalars["max_iter"] = "i32"
    elif op == "adjoint":
        constants = adjoint_constants(found, width, state, kinds, residual=True, ones=ONES, **options)
        names = ("grad_ptr", "p_ptr", "a_ptr", "v_ptr", "dx_ptr", "t_ptr", "z_ptr")
        pointers = dict.fromkeys(names, tokens) | {"w_ptr": word, "change_ptr": word, "count_ptr": "*i32"}
        scalars["terms"] = "i32"
    else:
        constants = weights_constants(found, width, state, kinds, **options)
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "t_ptr", "z_ptr"), tokens) | {"partial_ptr": word}
        scalars = {"T": "i32"}
    arithmetic = DTYPES[dtype] + (f"-{kinds['PRECISION']}" if dtype == torch.float32 else "")
    detail = [str(v) for v in options.values() if isinstance(v, str)]
    detail += ["damped"] if options.get("damping", 1) != 1 else []
    detail += [f"D{width}"] if width != SHIPPED_WIDTH else []
    return Shipped(
        name=" ".join([op, f"sm_{capability}", f"R{state}", arithmetic, *detail]),
        module="lion_kernels.solve" if op == "solve" else "lion_kernels.adjoint",
        kernel=kernel,
        capability=capability,
        signature=pointers | scalars,
        constexprs=constants,
        num_warps=found.num_warps,
        num_stages=found.num_stages,
        spills_in=SPILLING.get((op, capability, padded_state(state), _arithmetic(dtype, tf32)), ()),
        # Rows of an odd width or state start at odd addresses; the arrays themselves never do.
        divisible=tuple(pointers),
    )


def _ship_sum(capability: int) -> Shipped:
    pointers = ("partial_ptr", "da_ptr", "dv_ptr", "dc_ptr", "dw_ptr", "db_ptr")
    return Shipped(
        name=f"sum sm_{capability}",
        module="lion_kernels.adjoint",
        kernel="_sum_splits_kernel",
        capability=capability,
        signature=dict.fromkeys(pointers, "*fp32") | {"splits": "i32"},
        constexprs={"D": SHIPPED_WIDTH, "R": 64, "BLOCK": SUM_BLOCK},
        num_warps=4,
        num_stages=1,
        divisible=pointers,
    )


def shipped() -> list[Shipped]:
    """Every tile of the tables for each capability, with the cheapest and the dearest activation.

    All activations are listed at a state of 64, an odd state and width once; W, b and c are float32.
    """
    from lion_kernels import launch_sparse, launch_step

    loops = (("solve", "_solve_fwd_kernel"), ("adjoint", "_adjoint_kernel"))
    cheap = {"activation": "relu", "damping": 1.0}
    dear = {"activation": "gelu", "damping": 0.5}
    arithmetics = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
    found = []
    for capability in CONFIGS:
        for op, kernel in loops:
            for dtype, tf32 in arithmetics:
                for state in SHIPPED_STATES:
                    if why_not(dtype, state) is None:
                        for options in (cheap, dear):
                            found.append(_ship(op, kernel, capability, state, dtype, tf32, **options))
            for activation in ("tanh", "gelu_tanh", "silu"):
                options = {"activation": activation, "damping": 1.0}
                found.append(_ship(op, kernel, capability, 64, torch.bfloat16, False, **options))
            found.append(_ship(op, kernel, capability, 64, torch.float16, False, **cheap))
            found.append(_ship(op, kernel, capability, 48, torch.bfloat16, False, width=100, **cheap))
        for dtype, tf32 in arithmetics:
            for state in SHIPPED_STATES:
                if why_not(dtype, state) is None:
                    found.append(
                        _ship("weights", "_weight_grads_kernel", capability, state, dtype, tf32, rows=512)
                    )
        found.append(_ship_sum(capability))
    return found + launch_step.shipped() + launch_sparse.shipped()
