"""The one boundary between the layer and its kernels: two opaque custom ops.

`solve` and `adjoint` run the Triton kernels or the plain-torch reference, by `backend`. Being custom
ops they are single nodes for `torch.compile`, and their outputs never alias an input.
"""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from lion_kernels import reference

BACKENDS = ("auto", "torch", "triton")


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def why_not_triton(device: torch.device, dtype: torch.dtype, state_dim: int) -> str | None:
    """The reason why the Triton kernels cannot serve this call, or None."""
    from lion_kernels import launch

    if reason := _triton_missing():
        return reason
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tokens are on {device.type}, and the kernels need a CUDA device"
    return launch.why_not(dtype, state_dim)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


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


@torch.library.custom_op("lion_kernels::solve", mutates_args=())
def solve(
    x: Tensor,
    A: Tensor,
    W: Tensor,
    b: Tensor,
    V: Tensor,
    c: Tensor,
    activation: str,
    max_iter: int,
    tol: float,
    damping: float,
    residual: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.solve` by `backend` ('torch' or 'triton'); p is [0, R] unless `save`."""
    args = (x, A, W, b, V, c, activation, max_iter, tol, damping, residual)
    if backend == "triton":
        from lion_kernels import solve as kernel

        return kernel.solve(*args, save=save)
    with torch.autocast(x.device.type, enabled=False):
        out, p, change, count = reference.solve(*args)
    return out, p if save else p.new_empty(0, p.shape[1]), change, count


@solve.register_fake
def _(x, A, W, b, V, c, activation, max_iter, tol, damping, residual, save, backend):
    rows = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(rows if save else 0, A.shape[0]),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


@torch.library.custom_op("lion_kernels::adjoint", mutates_args=())
def adjoint(
    grad_out: Tensor,
    x: Tensor,
    p: Tensor,
    A: Tensor,
    W: Tensor,
    V: Tensor,
    activation: str,
    terms: int,
    tol: float,
    damping: float,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.adjoint` by `backend` ('torch' or 'triton')."""
    args = (grad_out, x, p, A, W, V, activation, terms, tol, damping, residual)
    if backend == "triton":
        from lion_kernels import adjoint as kernel

        return kernel.adjoint(*args)
    with torch.autocast(x.device.type, enabled=False):
        return reference.adjoint(*args)


@adjoint.register_fake
def _(grad_out, x, p, A, W, V, activation, terms, tol, damping, residual, backend):
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


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "the implicit gradient of an equilibrium cannot be differentiated a second time; "
        "write the iteration out as a loop under autograd where second derivatives matter"
    )


adjoint.register_autograd(_no_second_derivative)
