"""One fused iteration per launch, for states too wide to stay on chip.

A step launch forms p = z W^T + q for a [BLOCK_T, BLOCK_N] block and in the same kernel applies the
activation, the damping and the sums that the residual of a row needs. Those sums span the column blocks
of several programs, so each writes its part, and the next launch adds the parts in a fixed order before
its own product: a row that is done is then left alone, a tile of rows that is done sets a flag, and later
launches return at that flag. The host is never asked, the number of launches is max_iter, and no sum is
atomic, so the loop can be captured in a CUDA graph and repeats bit by bit.

State planes: application n of the map reads plane (n - 1) % 2 and writes plane n % 2. A row that stopped
after application n is not written again, so both its last state and the state before it are still there.

`_product` is the one place that reads A, W and V. Where one is a `sparse.BlockSparse`, its loop over all
column blocks becomes one over the kept blocks of a row of blocks; the rest of a step stays as it is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import launch, launch_sparse, launch_step
from lion_kernels.activations import activate, slope
from lion_kernels.device import device_function
from lion_kernels.solve import as_operand
from lion_kernels.sparse import BlockSparse, sampled
from lion_kernels.sparse_kernels import sparse_product

INFINITY = tl.constexpr(float("inf"))
# A sum of squares cannot be negative: this part marks a row that was done before the launch.
DONE = tl.constexpr(-1.0)


@device_function
def _product(
    acc,
    a_ptr,
    a_rows,
    a_mask,
    b_ptr,
    starts_ptr,
    columns_ptr,
    block,
    n,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    SPARSE: tl.constexpr,
):
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
    # NaN took part.
    return tl.where(change < INFINITY, change, INFINITY), tl.where(moved < 0, 0, 1) > 0


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
def _step_fwd_kernel(
    x_ptr,
    weight_ptr,
    starts_ptr,
    columns_ptr,
    b_ptr,
    q_ptr,
    z_ptr,
    u_ptr,
    p_ptr,
    h_ptr,
    part_ptr,
    change_ptr,
    count_ptr,
    done_ptr,
    T,
    k,
    tol,
    damping,
    D: tl.constexpr,
    R: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    MATH: tl.constexpr,
    INPUT: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
    DAMPED: tl.constexpr,
    SPLIT: tl.constexpr,
    SAVE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPARSE: tl.constexpr,
):
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
            tl.store(p_ptr + start * R + own, p, mask=inside)
        tl.store(h_ptr + start * R + own, new, mask=inside)
    else:
        if DAMPED:
            new = z + damping * (new - z)
        keep = inside & active[:, None]
        tl.store(z_ptr + plane + own, new, mask=keep)
        if SPLIT:
            tl.store(u_ptr + plane + own, new, mask=keep)


@triton.jit(do_not_specialize=["T", "k"])
def _step_finish_kernel(
    z_ptr,
    p_ptr,
    h_ptr,
    part_ptr,
    change_ptr,
    count_ptr,
    T,
    k,
    R: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACT: tl.constexpr,
    MATH: tl.constexpr,
    SAVE: tl.constexpr,
):
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
            tl.store(p_ptr + start * R + own, z, mask=inside)
        tl.store(h_ptr + start * R + own, activate(z, ACT, MATH), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _read_out_kernel(
    h_ptr,
    weight_ptr,
    starts_ptr,
    columns_ptr,
    c_ptr,
    x_ptr,
    out_ptr,
    T,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """out = (x +) h weight^T (+ c), for h [T, R] and weight [D, R]."""
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
    tl.store(out_ptr + start * D + own, out, mask=inside)


@triton.jit(do_not_specialize=["T", "k"])
def _step_bwd_kernel(
    grad_ptr,
    weight_ptr,
    starts_ptr,
    columns_ptr,
    scale_ptr,
    p_ptr,
    g_ptr,
    y_ptr,
    u_ptr,
    part_ptr,
    change_ptr,
    count_ptr,
    done_ptr,
    T,
    k,
    tol,
    damping,
    D: tl.constexpr,
    R: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    MATH: tl.constexpr,
    INPUT: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
    DAMPED: tl.constexpr,
    FIRST: tl.constexpr,
    CHECK: tl.constexpr,
    SPARSE: tl.constexpr,
):
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
def _step_bwd_finish_kernel(
    p_ptr,
    scale_ptr,
    u_ptr,
    t_ptr,
    h_ptr,
    part_ptr,
    change_ptr,
    count_ptr,
    done_ptr,
    T,
    k,
    R: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACT: tl.constexpr,
    MATH: tl.constexpr,
    STEPS: tl.constexpr,
):
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


class _Rows:
    """The per-row bookkeeping of one solve: parts of the sums, residual, steps, finished tiles."""

    def __init__(self, x: Tensor, config: launch_step.StepConfig, state: int):
        self.tiles = triton.cdiv(x.shape[0], config.block_t)
        self.blocks = triton.cdiv(state, config.block_n)
        floats = {"dtype": torch.float32}
        self.part = x.new_empty(2, 2, self.blocks, x.shape[0], **floats)
        self.change = x.new_empty(x.shape[0], **floats)
        self.count = x.new_empty(x.shape[0], dtype=torch.int32)
        self.done = x.new_zeros(max(self.tiles, 1), dtype=torch.int32)

    def pointers(self) -> dict[str, Tensor]:
        return {"part_ptr": self.part, "change_ptr": self.change, "count_ptr": self.count}


class _Weight(NamedTuple):
    """A dense or block-sparse matrix as a launch takes it; a dense one's lists are not read."""

    weight_ptr: Tensor
    starts_ptr: Tensor
    columns_ptr: Tensor

    @classmethod
    def of(cls, matrix: Tensor | BlockSparse, dtype: torch.dtype, none: Tensor) -> "_Weight":
        """`none` is any int32 tensor of the device."""
        if isinstance(matrix, BlockSparse):
            return cls(matrix.to(dtype).values, matrix.pattern.starts, matrix.pattern.columns)
        return cls(matrix.to(dtype).contiguous(), none, none)


def _is_sparse(matrix: Tensor | BlockSparse) -> bool:
    return isinstance(matrix, BlockSparse)


def _choose(x: Tensor, weights: tuple[Tensor | BlockSparse, ...], state: int, damping: float):
    """The tile: where something is block-sparse its blocks are the columns of a tile."""
    blocks = {w.pattern.block for w in weights if isinstance(w, BlockSparse)}
    if not blocks:
        return launch_step.choose(x.shape[0], x.shape[1], state, x.dtype, x.device, damping)
    if len(blocks) > 1:
        raise ValueError(f"A, W and V must have one block size; got {', '.join(map(str, sorted(blocks)))}")
    if reason := launch_step.why_not(x.dtype, state):
        raise ValueError(reason)
    return launch_sparse.choose("step", blocks.pop(), x.dtype, x.device, damping)


def _read_out(h, weight, c, x, config, residual: bool) -> Tensor:
    """(x +) h weight^T (+ c) in x's dtype."""
    out = torch.empty_like(x)
    rows, width = x.shape
    constants = launch_step.read_out_constants(
        config, width, h.shape[1], launch_step.numerics(x.dtype), c is not None, residual, _is_sparse(weight)
    )
    weight = _Weight.of(weight, x.dtype, x.new_empty(1, dtype=torch.int32))
    _read_out_kernel[(triton.cdiv(rows, config.block_t) * constants["BLOCKS"],)](
        h_ptr=h,
        **weight._asdict(),
        c_ptr=weight.weight_ptr if c is None else c,
        x_ptr=x,
        out_ptr=out,
        T=rows,
        **constants,
        **config.resources,
    )
    return out


def solve_wide(
    x: Tensor,
    A: Tensor | BlockSparse,
    W: Tensor | BlockSparse,
    b: Tensor,
    V: Tensor | BlockSparse,
    c: Tensor,
    activation: str,
    max_iter: int,
    tol: float,
    damping: float,
    residual: bool,
    save: bool = True,
    config: launch_step.StepConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.solve` by max_iter step launches: out [T, D], p [T, R] ([0, R] unless `save`),
    residual [T] and steps [T].

    Each of A, W and V may be block-sparse, with one block size, which is then the tile's width: a block
    that is not kept is not loaded and not multiplied. No launch depends on what the host knows of an
    earlier one, so a call can be captured in a CUDA graph.
    Raises ValueError for a dtype or state width that `launch_step.why_not` refuses, or several block sizes.
    """
    launch.check_shapes(x, A=A, W=W, b=b, V=V, c=c)
    (rows, width), state = x.shape, A.shape[0]
    config = config or _choose(x, (A, W, V), state, damping)
    kinds, numerics = launch_step.plane_dtypes(x.dtype, damping, tol), launch_step.numerics(x.dtype)
    x = x.contiguous()
    b, c = b.contiguous(), c.contiguous()
    p = x.new_empty(rows if save else 0, state)
    if rows == 0:
        return torch.empty_like(x), p, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32)

    records = _Rows(x, config, state)
    q = x.new_empty(rows, state, dtype=torch.float32)
    z = x.new_empty(2, rows, state, dtype=kinds.state)
    u = z if kinds.operand == kinds.state else torch.empty_like(z, dtype=kinds.operand)
    h = x.new_empty(rows, state)
    inject, recur = (_Weight.of(t, d, records.done) for t, d in ((A, x.dtype), (W, kinds.operand)))
    grid = (records.tiles * records.blocks,)
    with launch.on_device(x):
        for k in range(1, max_iter + 1):
            first, last = k == 1, k == max_iter
            _step_fwd_kernel[grid](
                x_ptr=x,
                **(inject if first else recur)._asdict(),
                b_ptr=b,
                q_ptr=q,
                z_ptr=z,
                u_ptr=u,
                p_ptr=p,
                h_ptr=h,
                **records.pointers(),
                done_ptr=records.done,
                T=rows,
                k=k,
                tol=tol,
                damping=damping,
                **launch_step.forward_constants(
                    config,
                    width,
                    state,
                    numerics,
                    activation,
                    damping,
                    save,
                    first,
                    last,
                    u is not z,
                    _is_sparse(A if first else W),
                ),  # fmt: skip
                **config.resources,
            )
        _step_finish_kernel[grid](
            z_ptr=z,
            p_ptr=p,
            h_ptr=h,
            **records.pointers(),
            T=rows,
            k=max_iter,
            **launch_step.finish_constants(config, state, numerics, activation, save),
            num_warps=config.num_warps,
        )
        out = _read_out(h, V, c, x, config, residual)
    return out, p, records.change, records.count


def _row_scales(grad_out: Tensor, V: Tensor | BlockSparse) -> Tensor:
    """A power of two per row, near the size of the entries of grad_out V; 1 for a row of zeros."""
    norms = torch.linalg.vector_norm(grad_out, dim=1, dtype=torch.float32)
    values = V.values if isinstance(V, BlockSparse) else V
    root = (V.shape[0] * V.shape[1]) ** 0.5
    size = norms * torch.linalg.vector_norm(values, dtype=torch.float32) / root
    size = torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))
    # Below 2^-126 the reciprocal overflows float32.
    return torch.exp2(torch.log2(size).round().clamp(-120, 120))


def _sum_products(a: Tensor, b: Tensor, weight: Tensor | BlockSparse) -> Tensor:
    """a^T b in float32 for [T, m] and [T, n]; of a block-sparse `weight` its kept blocks alone."""
    if isinstance(weight, BlockSparse):
        return sampled(a, b, weight.pattern)
    if a.dtype == torch.float32:
        return a.T @ b
    if a.is_cuda and launch.MM_OUT_DTYPE:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()


def adjoint_wide(
    grad_out: Tensor,
    x: Tensor,
    p: Tensor,
    A: Tensor | BlockSparse,
    W: Tensor | BlockSparse,
    V: Tensor | BlockSparse,
    activation: str,
    terms: int,
    tol: float,
    damping: float,
    residual: bool,
    config: launch_step.StepConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.adjoint` by terms + 1 step launches: dx [T, D] in x's dtype, dA, dW, db, dV, dc in
    float32, residual [T] and steps [T].

    A, W and V may be block-sparse as in `solve_wide`; then dA, dW, dV are the gradients of their values.
    Raises ValueError as `solve_wide`.
    """
    launch.check_shapes(x, A=A, W=W, V=V, p=p, grad_out=grad_out)
    (rows, width), state = x.shape, A.shape[0]
    config = config or _choose(x, (A, W, V), state, damping)
    kinds, numerics = launch_step.plane_dtypes(x.dtype, damping, tol), launch_step.numerics(x.dtype)
    grad_out, x, p = (t.contiguous() for t in (grad_out.to(x.dtype), x, p))
    records = _Rows(x, config, state)
    # [N, K] with K contiguous, as the product wants its second operand.
    inject, recur = (_Weight.of(t.T, d, records.done) for t, d in ((V, x.dtype), (W, kinds.operand)))
    scale = _row_scales(grad_out, V) if x.dtype != torch.float32 else x.new_ones(rows)
    g = x.new_empty(rows, state, dtype=torch.float32)
    y = x.new_empty(2, rows, state, dtype=kinds.state)
    u = x.new_empty(2, rows, state, dtype=kinds.operand)
    t, h = x.new_empty(rows, state), x.new_empty(rows, state)
    if rows > 0:
        grid = (records.tiles * records.blocks,)
        with launch.on_device(x):
            for k in range(terms + 1):
                _step_bwd_kernel[grid](
                    grad_ptr=grad_out,
                    **(inject if k == 0 else recur)._asdict(),
                    scale_ptr=scale,
                    p_ptr=p,
                    g_ptr=g,
                    y_ptr=y,
                    u_ptr=u,
                    **records.pointers(),
                    done_ptr=records.done,
                    T=rows,
                    k=k,
                    tol=tol,
                    damping=damping,
                    **launch_step.backward_constants(
                        config,
                        width,
                        state,
                        numerics,
                        activation,
                        damping,
                        k == 0,
                        k > 1,
                        _is_sparse(V if k == 0 else W),
                    ),  # fmt: skip
                    **config.resources,
                )
            _step_bwd_finish_kernel[grid](
                p_ptr=p,
                scale_ptr=scale,
                u_ptr=u,
                t_ptr=t,
                h_ptr=h,
                **records.pointers(),
                done_ptr=records.done,
                T=rows,
                k=terms,
                **launch_step.backward_finish_constants(config, state, numerics, activation, terms),
                num_warps=config.num_warps,
            )
            dx = _read_out(t, A.T, None, grad_out, config, residual)
    else:
        dx = torch.empty_like(x)
    return (
        dx,
        _sum_products(t, x, A),
        _sum_products(t, h, W),
        t.sum(0, dtype=torch.float32),
        _sum_products(grad_out, h, V),
        grad_out.sum(0, dtype=torch.float32),
        records.change,
        records.count,
    )
