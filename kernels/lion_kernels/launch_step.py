"""Launch configurations of the step kernels, as `launch` has those of the whole solve."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lion_kernels import launch
from lion_kernels.reference import ACTIVATIONS, ADJOINT_FLOOR, STATE_FLOOR

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


def choose(
    rows: int, width: int, state: int, dtype: torch.dtype, device: torch.device, damping: float
) -> StepConfig:
    """The configuration for the capability of `device`; ValueError where `why_not` has a reason."""
    capability = launch.capability(device)
    return config(rows, width, state, dtype, capability, launch.tf32_allowed(), damping)


def config(
    rows: int,
    width: int,
    state: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tf32: bool = False,
    damping: float = 1.0,
) -> StepConfig:
    """The newest configuration that is not newer than `capability`; ValueError as `choose`.

    `tf32` says how float32 products are made. Damped steps of half-precision tokens hold a float32 state
    next to the new one, which takes smaller tiles. `rows` and `width` are not part of the present answer.
    """
    if reason := why_not(dtype, state):
        raise ValueError(reason)
    number = capability[0] * 10 + capability[1]
    table = CONFIGS[max((c for c in CONFIGS if c <= number), default=min(CONFIGS))]
    if dtype == torch.float32:
        return table["tf32" if tf32 else "ieee"]
    return table["half" if damping == 1 else "damped"]


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


def numerics(dtype: torch.dtype) -> dict[str, str]:
    """The precision arguments of the kernels as this process runs them now."""
    return launch.numerics(dtype, launch.tf32_allowed(), launch.interpreted())


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _row_constants(config: StepConfig, state: int, floor: float) -> dict[str, object]:
    return {
        "R": state,
        "FLOOR": floor * state**0.5,
        "BLOCKS": -(-state // config.block_n),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
    }


def forward_constants(
    config: StepConfig,
    width: int,
    state: int,
    numerics: dict[str, str],
    activation: str,
    damping: float,
    save: bool,
    first: bool,
    last: bool,
    split: bool,
    sparse: bool = False,
) -> dict[str, object]:
    """The compile-time arguments of the forward step kernel."""
    _check_activation(activation)
    return {
        **_row_constants(config, state, STATE_FLOOR),
        **numerics,
        "D": width,
        "BLOCK_K": config.block_k,
        "ACT": activation,
        "DAMPED": damping != 1,
        "SPLIT": split,
        "SAVE": save,
        "FIRST": first,
        "LAST": last,
        "SPARSE": sparse,
    }


def finish_constants(
    config: StepConfig, state: int, numerics: dict[str, str], activation: str, save: bool
) -> dict[str, object]:
    """The compile-time arguments of the kernel that ends a forward solve."""
    return {
        **_row_constants(config, state, STATE_FLOOR),
        "ACT": activation,
        "MATH": numerics["MATH"],
        "SAVE": save,
    }


def read_out_constants(
    config: StepConfig,
    width: int,
    state: int,
    numerics: dict[str, str],
    bias: bool,
    residual: bool,
    sparse: bool = False,
) -> dict[str, object]:
    """The compile-time arguments of the read-out kernel."""
    return {
        "D": width,
        "R": state,
        "BLOCKS": -(-width // config.block_n),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "INPUT": numerics["INPUT"],
        "PRECISION": numerics["PRECISION"],
        "BIAS": bias,
        "RESIDUAL": residual,
        "SPARSE": sparse,
    }


def backward_constants(
    config: StepConfig,
    width: int,
    state: int,
    numerics: dict[str, str],
    activation: str,
    damping: float,
    first: bool,
    check: bool,
    sparse: bool = False,
) -> dict[str, object]:
    """The compile-time arguments of the adjoint step kernel."""
    _check_activation(activation)
    return {
        **_row_constants(config, state, ADJOINT_FLOOR),
        **numerics,
        "D": width,
        "BLOCK_K": config.block_k,
        "ACT": activation,
        "DAMPED": damping != 1,
        "FIRST": first,
        "CHECK": check,
        "SPARSE": sparse,
    }


def backward_finish_constants(
    config: StepConfig, state: int, numerics: dict[str, str], activation: str, terms: int
) -> dict[str, object]:
    """The compile-time arguments of the kernel that ends an adjoint solve."""
    return {
        **_row_constants(config, state, ADJOINT_FLOOR),
        "ACT": activation,
        "MATH": numerics["MATH"],
        "STEPS": terms > 0,
    }


_TRITON_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_RECORDS = {"part_ptr": "*fp32", "change_ptr": "*fp32", "count_ptr": "*i32"}
_SCALARS = {"T": "i32", "k": "i32"}
_LISTS = {"starts_ptr": "*i32", "columns_ptr": "*i32"}


def _kernels(
    config: StepConfig,
    width: int,
    state: int,
    dtype: torch.dtype,
    tf32: bool,
    damping: float,
    sparse: bool = False,
) -> list[tuple[str, str, dict[str, str], dict[str, object]]]:
    """Label, kernel, pointer types and constants of every launch of a wide solve and its adjoint."""
    tokens, kinds = _TRITON_TYPES[dtype], launch.numerics(dtype, tf32)
    planes = plane_dtypes(dtype, damping, 0.0)
    held, operand = _TRITON_TYPES[planes.state], _TRITON_TYPES[planes.operand]
    split = planes.state != planes.operand
    loop = {"tol": "fp32", "damping": "fp32", "done_ptr": "*i32", **_SCALARS, **_RECORDS}
    loop |= _LISTS
    forward = {"x_ptr": tokens, "b_ptr": "*fp32", "q_ptr": "*fp32", "z_ptr": held, **loop}
    forward |= {"u_ptr": operand, "p_ptr": tokens, "h_ptr": tokens}
    backward = {"grad_ptr": tokens, "scale_ptr": "*fp32", "p_ptr": tokens, "g_ptr": "*fp32", **loop}
    backward |= {"y_ptr": held, "u_ptr": operand}
    finish = {"z_ptr": held, "p_ptr": tokens, "h_ptr": tokens, **_SCALARS, **_RECORDS}
    end = {"p_ptr": tokens, "scale_ptr": "*fp32", "u_ptr": operand, "t_ptr": tokens, "h_ptr": tokens}
    end |= {"done_ptr": "*i32", **_SCALARS, **_RECORDS}
    read_out = {"h_ptr": tokens, "weight_ptr": tokens, "c_ptr": "*fp32", "x_ptr": tokens, "out_ptr": tokens}
    read_out |= _LISTS
    found = []
    for label, first, last in ((" first", True, False), ("", False, False), (" last", False, True)):
        constants = forward_constants(
            config, width, state, kinds, "gelu", damping, True, first, last, split, sparse
        )
        weight = tokens if first else operand
        found.append((f"step{label}", "_step_fwd_kernel", {**forward, "weight_ptr": weight}, constants))
    for label, first in ((" first", True), ("", False)):
        constants = backward_constants(config, width, state, kinds, "gelu", damping, first, not first, sparse)
        weight = tokens if first else operand
        found.append(
            (f"adjoint step{label}", "_step_bwd_kernel", {**backward, "weight_ptr": weight}, constants)
        )
    constants = finish_constants(config, state, kinds, "gelu", True)
    found.append(("step finish", "_step_finish_kernel", finish, constants))
    constants = backward_finish_constants(config, state, kinds, "gelu", 8)
    found.append(("adjoint finish", "_step_bwd_finish_kernel", end, constants))
    constants = read_out_constants(config, width, state, kinds, True, True, sparse)
    found.append(("read-out", "_read_out_kernel", {**read_out, "T": "i32"}, constants))
    return found


def sparse_kernels(
    config: StepConfig, width: int, state: int, dtype: torch.dtype, tf32: bool, damping: float
) -> list[tuple[str, str, dict[str, str], dict[str, object]]]:
    """As `_kernels`, for the launches that read a block-sparse matrix."""
    found = _kernels(config, width, state, dtype, tf32, damping, sparse=True)
    return [kernel for kernel in found if "SPARSE" in kernel[3]]


# (kind, state, damping): the launches that are compiled. The activation is gelu, whose code is the longest;
# what is left out differs from what is here by less than these differ among themselves.
_EVERY = ("step first", "step", "step last", "adjoint step first", "adjoint step")
_SHIPPED = {
    ("bf16", 512, 1.0): (*_EVERY, "step finish", "adjoint finish", "read-out"),
    ("bf16", 512, 0.5): ("step", "adjoint step"),
    ("bf16", 1024, 1.0): ("step", "step last", "adjoint step"),
    ("tf32", 512, 1.0): ("step", "adjoint step", "read-out"),
    ("ieee", 512, 1.0): ("step", "adjoint step"),
}


def shipped() -> list[launch.Shipped]:
    """The step kernels as they are compiled ahead of time, for D = 768 and each capability of the tables."""
    found = []
    for capability in CONFIGS:
        for (kind, state, damping), labels in _SHIPPED.items():
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            tf32 = kind == "tf32"
            chosen = config(1, 768, state, dtype, (capability // 10, capability % 10), tf32, damping)
            for label, kernel, types, constants in _kernels(chosen, 768, state, dtype, tf32, damping):
                if label not in labels:
                    continue
                found.append(
                    launch.Shipped(
                        name=f"{label} {kind} R={state}{' damped' if damping != 1 else ''}",
                        module="lion_kernels.step",
                        kernel=kernel,
                        capability=capability,
                        signature=types,
                        constexprs=constants,
                        num_warps=chosen.num_warps,
                        num_stages=chosen.num_stages,
                        divisible=tuple(n for n in types if n.endswith("_ptr")),
                    )
                )
    return found
