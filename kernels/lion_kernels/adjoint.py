"""The adjoint of the solve: one launch per tile for the input's gradient, then the weights' gradients.

`_adjoint_kernel` forms g = grad_out V, iterates y <- y + damping (g + (phi'(p) y) W - y) on chip, and
writes dx = t A (+ grad_out) with t = phi'(p) y, and the two R-wide factors t and z = phi(p). From them

    dA = t^T x    dW = t^T z    db = sum t    dV = grad_out^T z    dc = sum grad_out

by three matrix products, or by `_weight_grads_kernel`, which reads x and grad_out once and leaves
partial sums that `_sum_splits_kernel` adds in a fixed order. Both are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import launch, present, tuned
from lion_kernels.activations import activate, slope
from lion_kernels.reference import ADJOINT_FLOOR
from lion_kernels.tile import INFINITY, as_operand, device_function, stop_rows

EXPONENT = tl.constexpr(0x7F800000)


@device_function
def power_of_two(size):
    """The power of two below a positive float32, and its inverse; (1, 1) for zero and for huge."""
    bits = size.to(tl.int32, bitcast=True) & EXPONENT
    # Exponents 1 to 252 of 255, for which the inverse is a normal number too.
    bits = tl.where((bits > 0) & (bits < 0x7E800000), bits, 0x3F800000)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T", "terms"])
def _adjoint_kernel(
    grad_ptr, p_ptr, a_ptr, w_ptr, v_ptr, dx_ptr, t_ptr, z_ptr, change_ptr, count_ptr,
    T, terms, tol, damping,
    D: tl.constexpr, R: tl.constexpr, FLOOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, ACT: tl.constexpr, MATH: tl.constexpr, INPUT: tl.constexpr, LOOP: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, RESIDUAL: tl.constexpr, ONES: tl.constexpr,
    CHECK_EVERY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    i = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    valid = i < T - first
    grad_tile = grad_ptr + first * D

    g = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(
            grad_tile + i[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
        )
        v = tl.load(v_ptr + d[:, None] * R + r[None, :], mask=(d < D)[:, None] & (r < R)[None, :], other=0.0)
        g = tl.dot(as_operand(grad, INPUT), as_operand(v, INPUT), g, input_precision=PRECISION)
    # The iteration is linear in g. Rows near 1 keep small gradients out of float16's subnormal range;
    # a power of two changes no bit of the mantissa.
    scale, inverse = power_of_two(tl.max(tl.abs(g), axis=1))
    g *= inverse[:, None]

    state_mask = valid[:, None] & (r < R)[None, :]
    p = tl.load(p_ptr + first * R + i[:, None] * R + r[None, :], mask=state_mask, other=0.0).to(tl.float32)
    grad_phi = slope(p, ACT, MATH)
    # z goes out at once, so that it occupies no registers in the loop; the column after it holds ones.
    z_tile = z_ptr + first * (R + ONES)
    tl.store(z_tile + i[:, None] * (R + ONES) + r[None, :], activate(p, ACT, MATH), mask=state_mask)
    if ONES > 0:
        o = tl.arange(0, ONES)
        one = tl.where((o == 0)[None, :] & valid[:, None], 1.0, 0.0)
        tl.store(
            z_tile + i[:, None] * (R + ONES) + R + o[None, :], one, mask=valid[:, None] & (o < ONES)[None, :]
        )

    square = (r < R)[:, None] & (r < R)[None, :]
    w = as_operand(tl.load(w_ptr + r[:, None] * R + r[None, :], mask=square, other=0.0), LOOP)
    y = damping * g if DAMPED else g
    change = tl.full([BLOCK_T], INFINITY, tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    active = valid
    running = 1
    k = 0
    while (k < terms) & (running > 0):
        k += 1
        new = tl.dot(as_operand(grad_phi * y, LOOP), w, g, input_precision=PRECISION)
        count += active.to(tl.int32)
        was_active = active
        active, change, finite, running = stop_rows(
            new, y, active, change, (k % CHECK_EVERY == 0) | (k == terms), tol, FLOOR, CHECK_EVERY
        )
        if DAMPED:
            new = y + damping * (new - y)
        # A row takes its last step before it stops, unless that step was not finite.
        y = tl.where((was_active & finite)[:, None], new, y)

    t = grad_phi * y
    tl.store(change_ptr + first + i, change, mask=valid)
    tl.store(count_ptr + first + i, count, mask=valid)
    tl.store(t_ptr + first * R + i[:, None] * R + r[None, :], t * scale[:, None], mask=state_mask)

    t = as_operand(t, INPUT)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(a_ptr + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        dx = tl.dot(t, as_operand(a, INPUT), input_precision=PRECISION) * scale[:, None]
        tile = i[:, None] * D + d[None, :]
        mask = valid[:, None] & (d < D)[None, :]
        if RESIDUAL:
            dx += tl.load(grad_tile + tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + first * D + tile, dx, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _weight_grads_kernel(
    grad_ptr, x_ptr, t_ptr, z_ptr, partial_ptr,
    T,
    D: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over ROWS rows: dA, dV and dc of BLOCK_D columns; after these, dW and db of BLOCK_D columns.

    One split's partial sums are dA [R, D], dV [D, R], dc [D], dW [R, R] and db [R], one after the other.
    """
    first = tl.program_id(1).to(tl.int64) * ROWS
    last_column: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    state = i[:, None] * R + r[None, :]
    split_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * (2 * R * D + D + R * R + R)
    if tl.program_id(0) < last_column:
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        tile = i[:, None] * D + d[None, :]
        da = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        dc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, ROWS, BLOCK_T):
            row = first + start
            valid = (i < T - row)[:, None]
            t = tl.load(t_ptr + row * R + state, mask=valid & (r < R)[None, :], other=0.0)
            z = tl.load(z_ptr + row * R + state, mask=valid & (r < R)[None, :], other=0.0)
            x = tl.load(x_ptr + row * D + tile, mask=valid & (d < D)[None, :], other=0.0)
            grad = tl.load(grad_ptr + row * D + tile, mask=valid & (d < D)[None, :], other=0.0)
            da = tl.dot(tl.trans(as_operand(t, INPUT)), as_operand(x, INPUT), da, input_precision=PRECISION)
            dv = tl.dot(
                tl.trans(as_operand(z, INPUT)), as_operand(grad, INPUT), dv, input_precision=PRECISION
            )
            dc += grad.to(tl.float32)
        mask = (r < R)[:, None] & (d < D)[None, :]
        tl.store(split_ptr + r[:, None] * D + d[None, :], da, mask=mask)
        tl.store(split_ptr + R * D + d[None, :] * R + r[:, None], dv, mask=mask)
        tl.store(split_ptr + 2 * R * D + d, tl.sum(dc, axis=0), mask=d < D)
    else:
        n = (tl.program_id(0) - last_column) * BLOCK_D + tl.arange(0, BLOCK_D)
        tile = i[:, None] * R + n[None, :]
        dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        db = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, ROWS, BLOCK_T):
            row = first + start
            valid = (i < T - row)[:, None]
            t = tl.load(t_ptr + row * R + state, mask=valid & (r < R)[None, :], other=0.0)
            z = tl.load(z_ptr + row * R + tile, mask=valid & (n < R)[None, :], other=0.0)
            dw = tl.dot(tl.trans(as_operand(t, INPUT)), as_operand(z, INPUT), dw, input_precision=PRECISION)
            db += tl.load(t_ptr + row * R + tile, mask=valid & (n < R)[None, :], other=0.0).to(tl.float32)
        mask = (r < R)[:, None] & (n < R)[None, :]
        tl.store(split_ptr + 2 * R * D + D + r[:, None] * R + n[None, :], dw, mask=mask)
        tl.store(split_ptr + 2 * R * D + D + R * R + n, tl.sum(db, axis=0), mask=n < R)


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(
    partial_ptr, da_ptr, dv_ptr, dc_ptr, dw_ptr, db_ptr,
    splits,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of `_weight_grads_kernel` added split after split."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size: tl.constexpr = 2 * R * D + D + R * R + R
    total = tl.zeros([BLOCK], tl.float32)
    k = 0
    while k < splits:
        total += tl.load(partial_ptr + k.to(tl.int64) * size + n, mask=n < size, other=0.0)
        k += 1
    tl.store(da_ptr + n, total, mask=n < R * D)
    n -= R * D
    tl.store(dv_ptr + n, total, mask=(n >= 0) & (n < R * D))
    n -= R * D
    tl.store(dc_ptr + n, total, mask=(n >= 0) & (n < D))
    n -= D
    tl.store(dw_ptr + n, total, mask=(n >= 0) & (n < R * R))
    n -= R * R
    tl.store(db_ptr + n, total, mask=(n >= 0) & (n < R))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right in float32."""
    if left.is_cuda and left.numel() and left.dtype != torch.float32 and launch.MM_OUT_DTYPE:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return (left.T @ right).float()


def weight_grads_by_products(
    grad_out: Tensor, x: Tensor, t: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA, dW, db, dV, dc by three products.

    z [T, R + n] may carry a column of ones after its R columns, from which the sums come; without one
    they are sums of their own, which for float32 are more exact than a product in tf32.
    """
    state = t.shape[1]
    dA = _product(t, x)
    by_state = _product(t, z)
    by_width = _product(grad_out, z)
    if z.shape[1] == state:
        return dA, by_state, t.sum(0), by_width, grad_out.sum(0)
    return (
        dA,
        by_state[:, :state].contiguous(),
        by_state[:, state].contiguous(),
        by_width[:, :state].contiguous(),
        by_width[:, state].contiguous(),
    )


def weight_grads_by_splits(
    grad_out: Tensor, x: Tensor, t: Tensor, z: Tensor, config: launch.Config, rows_per_split: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA, dW, db, dV, dc in two launches that read x and grad_out once; z [T, R]."""
    (rows, width), state = x.shape, t.shape[1]
    splits = max(1, triton.cdiv(rows, rows_per_split))
    size = 2 * state * width + width + state * state + state
    partial = x.new_empty(splits, size, dtype=torch.float32)
    dA, dV = (x.new_empty(s, dtype=torch.float32) for s in ((state, width), (width, state)))
    dW, db, dc = (x.new_empty(s, dtype=torch.float32) for s in ((state, state), (state,), (width,)))
    kinds = present.numerics(x.dtype)
    constants = launch.weights_constants(config, width, state, kinds, rows_per_split)
    columns = triton.cdiv(width, config.block_d) + triton.cdiv(state, config.block_d)
    _weight_grads_kernel[(columns, splits)](
        grad_ptr=grad_out, x_ptr=x, t_ptr=t, z_ptr=z, partial_ptr=partial,
        T=rows,
        **constants, **config.resources,
    )  # fmt: skip
    _sum_splits_kernel[(triton.cdiv(size, launch.SUM_BLOCK),)](
        partial_ptr=partial, da_ptr=dA, dv_ptr=dV, dc_ptr=dc, dw_ptr=dW, db_ptr=db,
        splits=splits, D=width, R=state, BLOCK=launch.SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return dA, dW, db, dV, dc


def adjoint(
    grad_out: Tensor, x: Tensor, p: Tensor, A: Tensor, W: Tensor, V: Tensor,
    activation: str, terms: int, tol: float, damping: float, residual: bool,
    config: launch.Config | None = None, rows_per_split: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.adjoint`: dx in x's dtype; dA, dW, db, dV, dc in float32; residual and steps per row.

    `rows_per_split` fuses the weights' gradients in splits of so many rows, 0 takes matrix products,
    None what `launch.rows_per_split` says. Raises ValueError where `launch.why_not` has a reason.
    """
    launch.check_shapes(x, grad_out=grad_out, p=p, A=A, W=W, V=V)
    (rows, width), state = x.shape, A.shape[0]
    config = config or tuned.choose("adjoint", rows, width, state, x.dtype, x.device)
    if rows_per_split is None:
        rows_per_split = launch.rows_per_split(rows, width)
    ones = 0 if rows_per_split or x.dtype == torch.float32 else launch.ONES
    grad_out, x, p = (t.contiguous() for t in (grad_out, x, p))
    A, V = (t.to(x.dtype).contiguous() for t in (A, V))
    W = W.contiguous()
    dx = torch.empty_like(x)
    t = x.new_empty(rows, state)
    z = x.new_empty(rows, state + ones)
    change = x.new_empty(rows, dtype=torch.float32)
    count = x.new_empty(rows, dtype=torch.int32)
    kinds = present.numerics(x.dtype)
    constants = launch.loop_constants(
        config, width, state, kinds, activation, damping, ADJOINT_FLOOR, RESIDUAL=residual, ONES=ones
    )
    with present.on_device(x):
        if rows > 0:
            _adjoint_kernel[(triton.cdiv(rows, config.block_t),)](
                grad_ptr=grad_out, p_ptr=p, a_ptr=A, w_ptr=W, v_ptr=V, dx_ptr=dx, t_ptr=t, z_ptr=z,
                change_ptr=change, count_ptr=count,
                T=rows, terms=terms, tol=float(tol), damping=float(damping),
                **constants, **config.resources,
            )  # fmt: skip
        if rows_per_split:
            weights_config = tuned.choose("weights", rows, width, state, x.dtype, x.device)
            grads = weight_grads_by_splits(grad_out, x, t, z, weights_config, rows_per_split)
        else:
            grads = weight_grads_by_products(grad_out, x, t, z)
    return dx, *grads, change, count
