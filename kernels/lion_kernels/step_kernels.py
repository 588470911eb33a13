"""The kernels of one fused iteration per launch; `step` says how they play together and launches them.

State planes: application n of the map reads plane (n - 1) % 2 and writes plane n % 2. A row that stopped
after application n is not written again, so both its last state and the state before it are still there.

`_product` is the one place that reads A, W and V. Where one is a `blocks.BlockSparse`, its loop over all
column blocks becomes one over the kept blocks of a row of blocks; the rest of a step stays as it is.
"""

import triton
import triton.language as tl

from lion_kernels.activations import activate, slope
from lion_kernels.sparse_kernels import sparse_product
from lion_kernels.tile import INFINITY, as_operand, device_function, finite_rows, hold

# A sum of squares cannot be negative: this part marks a row that was done before the launch.
DONE = tl.constexpr(-1.0)


@device_function
def _product(
    acc, a_ptr, a_rows, a_mask, b_ptr, starts_ptr, columns_ptr, block, n,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """acc + a b^T for the rows of a at offsets `a_rows` and the rows n of b [N, K], row block `block` of it.

    A SPARSE b is its kept blocks of BLOCK_N x BLOCK_N with their lists.
    """
    if SPARSE:
        return sparse_product(
            acc, a_ptr, a_rows, a_mask, b_ptr, starts_ptr, columns_ptr, block,
            K, BLOCK_N, BLOCK_K, KIND, PRECISION,
        )  # fmt: skip
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_rows[:, None] + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(as_operand(a, KIND), as_operand(b, KIND), acc, input_precision=PRECISION)
    return acc


@device_function
def _row_change(part_ptr, T, rows, valid, k, BLOCKS: tl.constexpr, FLOOR: tl.constexpr):
    """The relative change of application k per row, and whether the row took part in it.

    part is [2, 2, BLOCKS, T]: parity of the application, (|new - old|^2, |new|^2), column block, row.
    """
    part = part_ptr + (k % 2).to(tl.int64) * (2 * BLOCKS) * T + rows
    moved = tl.load(part, mask=valid, other=DONE)
    size = tl.load(part + BLOCKS * T, mask=valid, other=0.0)
    for block in tl.static_range(1, BLOCKS):
        moved += tl.load(part + block * T, mask=valid, other=DONE)
        size += tl.load(part + (BLOCKS + block) * T, mask=valid, other=0.0)
    change = tl.sqrt(tl.abs(moved)) / (tl.sqrt(size) + FLOOR)
    finite = (tl.abs(moved) < INFINITY) & (size < INFINITY)
    # NaN took part.
    return tl.where(finite, change, INFINITY), tl.where(moved < 0, 0, 1) > 0


@device_function
def _store_parts(part_ptr, T, rows, valid, active, block, k, new, old, BLOCKS: tl.constexpr):
    part = part_ptr + (k % 2).to(tl.int64) * (2 * BLOCKS) * T + block.to(tl.int64) * T + rows
    moved = tl.sum((new - old) * (new - old), axis=1)
    tl.store(part, tl.where(active, moved, DONE), mask=valid)
    tl.store(part + BLOCKS * T, tl.sum(new * new, axis=1), mask=valid)


@device_function
def _tile(T, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row tile and its first row, column block, rows within the tile, their mask, columns.

    The blocks of a tile run side by side. Only the first row is int64: offsets within a tile stay in one
    register each.
    """
    tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tile.to(tl.int64) * BLOCK_T
    i = tl.arange(0, BLOCK_T)
    return tile, block, first, i, i < T - first, block * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["T", "k"])
def step_fwd_kernel(
    x_ptr, weight_ptr, starts_ptr, columns_ptr, b_ptr, q_ptr, z_ptr, u_ptr, p_ptr, h_ptr, part_ptr,
    change_ptr, count_ptr, done_ptr,
    T, k, tol, damping,
    D: tl.constexpr, R: tl.constexpr, FLOOR: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, MATH: tl.constexpr,
    INPUT: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr, DAMPED: tl.constexpr,
    SPLIT: tl.constexpr, SAVE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Application k of z -> phi(z W^T + q); the FIRST one forms q = x A^T + b, the LAST one keeps p.

    u is z in the dtype of the products, in planes of its own where SPLIT; converting z on its way into a
    product would pass it through registers, which a pipelined wgmma may still read when they are reloaded.
    """
    tile, block, start, i, valid, n = _tile(T, BLOCKS, BLOCK_T, BLOCK_N)
    own = i[:, None] * R + n[None, :]
    inside = valid[:, None] & (n < R)[None, :]
    plane = ((k % 2).to(tl.int64) * T + start) * R
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if FIRST:
        active = valid
        acc = _product(
            acc, x_ptr + start * D, i * D, valid, weight_ptr, starts_ptr, columns_ptr, block, n,
            R, D, BLOCK_N, BLOCK_K, INPUT, PRECISION, SPARSE,
        )  # fmt: skip
        p = acc + tl.load(b_ptr + n, mask=n < R, other=0.0).to(tl.float32)[None, :]
        if not LAST:
            tl.store(q_ptr + start * R + own, p, mask=inside)
        z = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    else:
        if not LAST:
            if tl.load(done_ptr + tile) > 0:
                return
        change, took_part = _row_change(part_ptr, T, start + i, valid, k - 1, BLOCKS, FLOOR)
        fresh = valid & took_part
        if LAST:
            # In a finished tile no row is: its parts are of older applications.
            fresh = fresh.to(tl.int32) > tl.load(done_ptr + tile)
        active = fresh & (change > tol) & (change < INFINITY)
        stopped = fresh & ((change <= tol) | (change == INFINITY))
        if block == 0:
            tl.store(change_ptr + start + i, change, mask=stopped)
            tl.store(count_ptr + start + i, tl.zeros([BLOCK_T], tl.int32) + (k - 1), mask=stopped)
        if LAST:
            # Every row repeats its own last application, for the pre-activation that nobody stored.
            used = tl.load(count_ptr + start + i, mask=valid, other=0)
            used = tl.where(active, k, tl.where(stopped, k - 1, used))
            # The state of the first application is zero and is in no plane.
            moving = valid & (used > 1)
            read = 0
            state = (((used - 1) % 2).to(tl.int64) * T + start + i) * R
        else:
            if tl.max(active.to(tl.int32), axis=0) == 0:
                if block == 0:
                    tl.store(done_ptr + tile, 1)
                return
            moving = valid
            read = (((k - 1) % 2).to(tl.int64) * T + start) * R
            state = i * R
        acc = _product(
            acc, u_ptr + read, state, moving, weight_ptr, starts_ptr, columns_ptr, block, n,
            R, R, BLOCK_N, BLOCK_K, LOOP, PRECISION, SPARSE,
        )  # fmt: skip
        p = acc + tl.load(q_ptr + start * R + own, mask=inside, other=0.0).to(tl.float32)
        mask = moving[:, None] & (n < R)[None, :]
        z = tl.load(z_ptr + read + state[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)

    new = activate(p, ACT, MATH)
    _store_parts(part_ptr, T, start + i, valid, active, block, k, new, z, BLOCKS)
    if LAST:
        if SAVE:
            tl.store(p_ptr + start * R + own, hold(p, p_ptr.dtype.element_ty), mask=inside)
        # A sum that overflowed is no state, even where phi makes one of it: the read-out flags the row.
        tl.store(h_ptr + start * R + own, tl.where(tl.abs(p) < INFINITY, new, INFINITY), mask=inside)
    else:
        if DAMPED:
            new = z + damping * (new - z)
        keep = inside & active[:, None]
        tl.store(z_ptr + plane + own, new, mask=keep)
        if SPLIT:
            tl.store(u_ptr + plane + own, new, mask=keep)


@triton.jit(do_not_specialize=["T", "k"])
def step_finish_kernel(
    z_ptr, p_ptr, h_ptr, part_ptr, change_ptr, count_ptr,
    T, k,
    R: tl.constexpr, FLOOR: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, ACT: tl.constexpr, MATH: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """After the last application k: residual and steps of its rows; rows not finite fall back to z."""
    tile, block, start, i, valid, n = _tile(T, BLOCKS, BLOCK_T, BLOCK_N)
    change, took_part = _row_change(part_ptr, T, start + i, valid, k, BLOCKS, FLOOR)
    fresh = valid & took_part
    if block == 0:
        tl.store(change_ptr + start + i, change, mask=fresh)
        tl.store(count_ptr + start + i, tl.zeros([BLOCK_T], tl.int32) + k, mask=fresh)
    change = tl.where(fresh, change, tl.load(change_ptr + start + i, mask=valid, other=0.0))
    used = tl.where(fresh, k, tl.load(count_ptr + start + i, mask=valid, other=0))
    failed = valid & (change == INFINITY)
    if tl.max(failed.to(tl.int32), axis=0) > 0:
        state = (((used - 1) % 2).to(tl.int64) * T + start + i) * R
        mask = (failed & (used > 1))[:, None] & (n < R)[None, :]
        z = tl.load(z_ptr + state[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        own = i[:, None] * R + n[None, :]
        inside = failed[:, None] & (n < R)[None, :]
        if SAVE:
            tl.store(p_ptr + start * R + own, hold(z, p_ptr.dtype.element_ty), mask=inside)
        tl.store(h_ptr + start * R + own, activate(z, ACT, MATH), mask=inside)


@triton.jit(do_not_specialize=["T"])
def read_out_kernel(
    h_ptr, weight_ptr, starts_ptr, columns_ptr, c_ptr, x_ptr, out_ptr, change_ptr,
    T,
    D: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """out = (x +) h weight^T (+ c), for h [T, R] and weight [D, R]. With c, in the solve, the residual of a
    row is inf where out is not finite.
    """
    tile, block, start, i, valid, n = _tile(T, BLOCKS, BLOCK_T, BLOCK_N)
    own = i[:, None] * D + n[None, :]
    inside = valid[:, None] & (n < D)[None, :]
    out = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    out = _product(
        out, h_ptr + start * R, i * R, valid, weight_ptr, starts_ptr, columns_ptr, block, n,
        D, R, BLOCK_N, BLOCK_K, INPUT, PRECISION, SPARSE,
    )  # fmt: skip
    if BIAS:
        out += tl.load(c_ptr + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        out += tl.load(x_ptr + start * D + own, mask=inside, other=0.0).to(tl.float32)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start * D + own, out, mask=inside)
    if BIAS:
        # Every column block that finds one stores the same number.
        infinite = tl.full([BLOCK_T], INFINITY, tl.float32)
        tl.store(change_ptr + start + i, infinite, mask=valid & (finite_rows(out) == 0))


@triton.jit(do_not_specialize=["T", "k"])
def step_bwd_kernel(
    grad_ptr, weight_ptr, starts_ptr, columns_ptr, scale_ptr, p_ptr, g_ptr, y_ptr, u_ptr, part_ptr,
    change_ptr, count_ptr, done_ptr,
    T, k, tol, damping,
    D: tl.constexpr, R: tl.constexpr, FLOOR: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, MATH: tl.constexpr,
    INPUT: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr, DAMPED: tl.constexpr,
    FIRST: tl.constexpr, CHECK: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Application k of y -> g + (phi'(p) y) W; the FIRST launch, k = 0, forms g = grad V and y = damping g.

    u = phi'(p) y is the operand of the next product. CHECK is off for k = 1, before which no row can be
    done. The rows are scaled by a power of two, so that gradients of any size fit half-precision planes.
    """
    tile, block, start, i, valid, n = _tile(T, BLOCKS, BLOCK_T, BLOCK_N)
    own = i[:, None] * R + n[None, :]
    inside = valid[:, None] & (n < R)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    active = valid
    if FIRST:
        tile_ptr = grad_ptr + start * D
        acc = _product(
            acc, tile_ptr, i * D, valid, weight_ptr, starts_ptr, columns_ptr, block, n,
            R, D, BLOCK_N, BLOCK_K, INPUT, PRECISION, SPARSE,
        )  # fmt: skip
        g = acc / tl.load(scale_ptr + start + i, mask=valid, other=1.0)[:, None]
        tl.store(g_ptr + start * R + own, g, mask=inside)
        y = g
        if DAMPED:
            y = damping * g
    else:
        if CHECK:
            if tl.load(done_ptr + tile) > 0:
                return
            change, took_part = _row_change(part_ptr, T, start + i, valid, k - 1, BLOCKS, FLOOR)
            fresh = valid & took_part
            active = fresh & (change > tol) & (change < INFINITY)
            stopped = fresh & ((change <= tol) | (change == INFINITY))
            if block == 0:
                tl.store(change_ptr + start + i, change, mask=stopped)
                tl.store(count_ptr + start + i, tl.zeros([BLOCK_T], tl.int32) + (k - 1), mask=stopped)
            if tl.max(active.to(tl.int32), axis=0) == 0:
                if block == 0:
                    tl.store(done_ptr + tile, 1)
                return
        plane = (((k - 1) % 2).to(tl.int64) * T + start) * R
        acc = _product(
            acc, u_ptr + plane, i * R, valid, weight_ptr, starts_ptr, columns_ptr, block, n,
            R, R, BLOCK_N, BLOCK_K, LOOP, PRECISION, SPARSE,
        )  # fmt: skip
        new = acc + tl.load(g_ptr + start * R + own, mask=inside, other=0.0).to(tl.float32)
        old = tl.load(y_ptr + plane + own, mask=inside, other=0.0).to(tl.float32)
        _store_parts(part_ptr, T, start + i, valid, active, block, k, new, old, BLOCKS)
        y = new
        if DAMPED:
            y = old + damping * (new - old)
    plane = ((k % 2).to(tl.int64) * T + start) * R
    p = tl.load(p_ptr + start * R + own, mask=inside, other=0.0).to(tl.float32)
    keep = inside & active[:, None]
    tl.store(y_ptr + plane + own, y, mask=keep)
    tl.store(u_ptr + plane + own, slope(p, ACT, MATH) * y, mask=keep)


@triton.jit(do_not_specialize=["T", "k"])
def step_bwd_finish_kernel(
    p_ptr, scale_ptr, u_ptr, t_ptr, h_ptr, part_ptr, change_ptr, count_ptr, done_ptr,
    T, k,
    R: tl.constexpr, FLOOR: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, ACT: tl.constexpr, MATH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """After the last application k: t = phi'(p) y of every row's last finite y, and h = phi(p)."""
    tile, block, start, i, valid, n = _tile(T, BLOCKS, BLOCK_T, BLOCK_N)
    used = tl.zeros([BLOCK_T], tl.int32)
    change = tl.full([BLOCK_T], INFINITY, tl.float32)
    fresh = valid
    if STEPS:
        change, took_part = _row_change(part_ptr, T, start + i, valid, k, BLOCKS, FLOOR)
        # Launches that returned at the flag left older parts behind.
        fresh = (valid & took_part).to(tl.int32) > tl.load(done_ptr + tile)
        change = tl.where(fresh, change, tl.load(change_ptr + start + i, mask=valid, other=0.0))
        used = tl.where(fresh, k, tl.load(count_ptr + start + i, mask=valid, other=0))
    if block == 0:
        tl.store(change_ptr + start + i, change, mask=fresh)
        tl.store(count_ptr + start + i, used, mask=fresh)
    failed = (change == INFINITY) & (used > 0)
    plane = ((used - failed.to(tl.int32)) % 2).to(tl.int64)
    own = i[:, None] * R + n[None, :]
    inside = valid[:, None] & (n < R)[None, :]
    state = (plane * T + start + i) * R
    u = tl.load(u_ptr + state[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
    t = u * tl.load(scale_ptr + start + i, mask=valid, other=1.0)[:, None]
    tl.store(t_ptr + start * R + own, t, mask=inside)
    p = tl.load(p_ptr + start * R + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + start * R + own, activate(p, ACT, MATH), mask=inside)
