"""The one boundary between the layer and its kernels: two opaque custom ops.

`solve` and `adjoint` run the Triton kernels or the plain-torch reference, by `backend`. Being custom
ops they are single nodes for `torch.compile`, and their outputs never alias an input. They have no
derivative of their own: `lion_fast.equilibrium.functional` pairs them in an autograd.Function.

They are defined by schema, since the wrapper of `torch.library.custom_op` costs the host three times
as much a call (measured: 29 against 9 us), which is more than a whole solve takes on a GPU.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from lion_kernels import launch, launch_step, present, reference

BACKENDS = ("auto", "torch", "triton")


def why_not_triton(device: torch.device, dtype: torch.dtype, state_dim: int) -> str | None:
    """The reason why the Triton kernels cannot serve this call, or None."""
    if device.type != "cuda" and not present.interpreted():
        return f"the tokens are on {device.type}, and the kernels need a CUDA device"
    if reason := present.triton_missing():
        return reason
    # What does not stay on chip takes one launch per step.
    return launch.why_not(dtype, state_dim) and launch_step.why_not(dtype, state_dim)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@torch.compiler.assume_constant_result
def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, state_dim: int) -> str:
    """'triton' or 'torch' for a requested backend.

    'auto' takes Triton on a CUDA device that can run it and says once why where it cannot; an
    explicit 'triton' that cannot run raises RuntimeError, an unknown name ValueError.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = why_not_triton(device, dtype, state_dim)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}. Use backend='auto' or 'torch'.")
    _say_once(f"lion_fast falls back to plain torch on this GPU: {reason}")
    return "torch"


def _solve(x, A, W, b, V, c, activation, max_iter, tol, damping, residual, save, backend):
    """`reference.solve` by `backend` ('torch' or 'triton'); p is [0, R] unless `save`."""
    args = (x, A, W, b, V, c, activation, max_iter, tol, damping, residual)
    if backend == "triton":
        from lion_kernels import solve as whole
        from lion_kernels import step

        on_chip = launch.why_not(x.dtype, A.shape[0]) is None
        return (whole.solve if on_chip else step.solve_wide)(*args, save=save)
    with torch.autocast(x.device.type, enabled=False):
        out, p, change, count = reference.solve(*args)
    return out, p if save else p.new_empty(0, p.shape[1]), change, count


def _solve_fake(x, A, W, b, V, c, activation, max_iter, tol, damping, residual, save, backend):
    rows = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(rows if save else 0, A.shape[0]),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def _adjoint(grad_out, x, p, A, W, V, activation, terms, tol, damping, residual, backend):
    """`reference.adjoint` by `backend` ('torch' or 'triton')."""
    args = (grad_out, x, p, A, W, V, activation, terms, tol, damping, residual)
    if backend == "triton":
        from lion_kernels import adjoint as whole
        from lion_kernels import step

        on_chip = launch.why_not(x.dtype, A.shape[0]) is None
        return (whole.adjoint if on_chip else step.adjoint_wide)(*args)
    with torch.autocast(x.device.type, enabled=False):
        return reference.adjoint(*args)


def _adjoint_fake(grad_out, x, p, A, W, V, activation, terms, tol, damping, residual, backend):
    acc = reference.accumulate_dtype(x.dtype)
    rows, (state, width) = x.shape[0], A.shape
    return (
        torch.empty_like(x),
        x.new_empty(state, width, dtype=acc),
        x.new_empty(state, state, dtype=acc),
        x.new_empty(state, dtype=acc),
        x.new_empty(width, state, dtype=acc),
        x.new_empty(width, dtype=acc),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def _define(name: str, schema: str, kernel: Callable, fake: Callable) -> Callable:
    torch.library.define(f"lion_kernels::{name}", schema)
    torch.library.impl(f"lion_kernels::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"lion_kernels::{name}", fake)
    return getattr(torch.ops.lion_kernels, name).default


solve = _define(
    "solve",
    "(Tensor x, Tensor A, Tensor W, Tensor b, Tensor V, Tensor c, str activation, int max_iter, float tol,"
    " float damping, bool residual, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _solve,
    _solve_fake,
)
adjoint = _define(
    "adjoint",
    "(Tensor grad_out, Tensor x, Tensor p, Tensor A, Tensor W, Tensor V, str activation, int terms,"
    " float tol, float damping, bool residual, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _adjoint,
    _adjoint_fake,
)
