"""The whole equilibrium solve in one launch: x is read, the state iterates on chip, out is written.

One program owns BLOCK_T token rows. It forms q = x A^T + b in float32 registers, iterates
z <- z + damping (phi(z W^T + q) - z) without touching memory until every row of its tile is done,
and streams (x +) z V^T + c out. Each row stops by its own residual and then keeps its state, so the
result of a row does not depend on the rows it shares a tile with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import launch, present, tuned
from lion_kernels.activations import activate
from lion_kernels.reference import STATE_FLOOR
from lion_kernels.tile import INFINITY, as_operand, finite_rows, hold, stop_rows


@triton.jit(do_not_specialize=["T", "max_iter"])
def _solve_fwd_kernel(
    x_ptr,
    a_ptr,
    w_ptr,
    b_ptr,
    v_ptr,
    c_ptr,
    out_ptr,
    p_ptr,
    change_ptr,
    count_ptr,
    T,
    max_iter,
    tol,
    damping,
    D: tl.constexpr,
    R: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACT: tl.constexpr,
    MATH: tl.constexpr,
    INPUT: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
    DAMPED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SAVE: tl.constexpr,
    CARRY: tl.constexpr,
    CHECK_EVERY: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    i = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    valid = i < T - first
    x_tile = x_ptr + first * D

    # Columns beyond R are zero in A, W, V and b, and phi(0) = 0: the padded state is exactly zero.
    b = tl.load(b_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    q = tl.zeros([BLOCK_T, BLOCK_R], tl.float32) + b[None, :]
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_tile + i[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        a = tl.load(a_ptr + r[None, :] * D + d[:, None], mask=(r < R)[None, :] & (d < D)[:, None], other=0.0)
        q = tl.dot(as_operand(x, INPUT), as_operand(a, INPUT), q, input_precision=PRECISION)

    square = (r < R)[:, None] & (r < R)[None, :]
    w = as_operand(tl.load(w_ptr + r[None, :] * R + r[:, None], mask=square, other=0.0), LOOP)  # W^T
    z = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    change = tl.full([BLOCK_T], INFINITY, tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    active = valid
    running = 1
    if CARRY:
        p = q
    k = 0
    while (k < max_iter) & (running > 0):
        k += 1
        pre = tl.dot(as_operand(z, LOOP), w, q, input_precision=PRECISION)
        new = activate(pre, ACT, MATH)
        if CARRY:
            p = pre
        count += active.to(tl.int32)
        active, change, _, running = stop_rows(
            new, z, active, change, (k % CHECK_EVERY == 0) | (k == max_iter), tol, FLOOR, CHECK_EVERY
        )
        # The state before the last application is kept: its pre-activation is the one to save.
        proceed = active & (k < max_iter)
        if DAMPED:
            new = z + damping * (new - z)
        z = tl.where(proceed[:, None], new, z)

    if not CARRY:
        p = tl.dot(as_operand(z, LOOP), w, q, input_precision=PRECISION)
    p = tl.where((change < INFINITY)[:, None], p, z)
    finite = finite_rows(p)
    tl.store(count_ptr + first + i, count, mask=valid)
    if SAVE:
        tl.store(
            p_ptr + first * R + i[:, None] * R + r[None, :], hold(p, p_ptr.dtype.element_ty),
            mask=valid[:, None] & (r < R)[None, :],
        )  # fmt: skip

    h = as_operand(activate(p, ACT, MATH), INPUT)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = tl.load(v_ptr + d[None, :] * R + r[:, None], mask=(d < D)[None, :] & (r < R)[:, None], other=0.0)
        c = tl.load(c_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        out = tl.dot(h, as_operand(v, INPUT), input_precision=PRECISION) + c[None, :]
        tile = i[:, None] * D + d[None, :]
        mask = valid[:, None] & (d < D)[None, :]
        if RESIDUAL:
            out += tl.load(x_tile + tile, mask=mask, other=0.0).to(tl.float32)
        out = out.to(out_ptr.dtype.element_ty)
        finite = tl.minimum(finite, finite_rows(out))
        tl.store(out_ptr + first * D + tile, out, mask=mask)
    tl.store(change_ptr + first + i, tl.where(finite > 0, change, INFINITY), mask=valid)


def solve(
    x: Tensor, A: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor,
    activation: str, max_iter: int, tol: float, damping: float, residual: bool, save: bool = True,
    config: launch.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.solve` in one launch: out [T, D], p [T, R] ([0, R] unless `save`), residual and steps [T].

    Raises ValueError for a dtype or state width that `launch.why_not` refuses.
    """
    launch.check_shapes(x, A=A, W=W, b=b, V=V, c=c)
    (rows, width), state = x.shape, A.shape[0]
    config = config or tuned.choose("solve", rows, width, state, x.dtype, x.device)
    x = x.contiguous()
    A, V = (t.to(x.dtype).contiguous() for t in (A, V))
    W, b, c = (t.contiguous() for t in (W, b, c))
    out = torch.empty_like(x)
    p = x.new_empty(rows if save else 0, state)
    change = x.new_empty(rows, dtype=torch.float32)
    count = x.new_empty(rows, dtype=torch.int32)
    kinds = present.numerics(x.dtype)
    constants = launch.loop_constants(
        config, width, state, kinds, activation, damping, STATE_FLOOR,
        RESIDUAL=residual, SAVE=save, CARRY=config.carry,
    )  # fmt: skip
    if rows > 0:
        with present.on_device(x):
            _solve_fwd_kernel[(triton.cdiv(rows, config.block_t),)](
                x_ptr=x, a_ptr=A, w_ptr=W, b_ptr=b, v_ptr=V, c_ptr=c, out_ptr=out, p_ptr=p,
                change_ptr=change, count_ptr=count,
                T=rows, max_iter=max_iter, tol=float(tol), damping=float(damping),
                **constants, **config.resources,
            )  # fmt: skip
    return out, p, change, count
