"""One fused iteration per launch, for states too wide to stay on chip.

A step launch forms p = z W^T + q for a [BLOCK_T, BLOCK_N] block and in the same kernel applies the
activation, the damping and the sums that the residual of a row needs. Those sums span the column blocks
of several programs, so each writes its part, and the next launch adds the parts in a fixed order before
its own product: a row that is done is then left alone, a tile of rows that is done sets a flag, and later
launches return at that flag. The host is never asked, the number of launches is max_iter, and no sum is
atomic, so the loop can be captured in a CUDA graph and repeats bit by bit.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lion_kernels import launch, launch_step, present, step_kernels, tuned
from lion_kernels.blocks import BlockSparse
from lion_kernels.reference import ADJOINT_FLOOR, STATE_FLOOR
from lion_kernels.sparse import sampled


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
        return tuned.choose_step(x.shape[0], x.shape[1], state, x.dtype, x.device, damping)
    if len(blocks) > 1:
        raise ValueError(f"A, W and V must have one block size; got {', '.join(map(str, sorted(blocks)))}")
    if reason := launch_step.why_not(x.dtype, state):
        raise ValueError(reason)
    return tuned.choose_sparse("step", blocks.pop(), x.dtype, damping)


def _read_out(h, weight, c, x, change, config, residual: bool) -> Tensor:
    """(x +) h weight^T (+ c) in x's dtype; with c, `change` becomes inf for rows where that is not finite."""
    out = torch.empty_like(x)
    rows, width = x.shape
    constants = launch_step.read_out_constants(
        config, width, h.shape[1], present.numerics(x.dtype),
        BIAS=c is not None, RESIDUAL=residual, SPARSE=_is_sparse(weight),
    )  # fmt: skip
    weight = _Weight.of(weight, x.dtype, x.new_empty(1, dtype=torch.int32))
    step_kernels.read_out_kernel[(triton.cdiv(rows, config.block_t) * constants["BLOCKS"],)](
        h_ptr=h, **weight._asdict(), c_ptr=weight.weight_ptr if c is None else c, x_ptr=x, out_ptr=out,
        change_ptr=change, T=rows,
        **constants, **config.resources,
    )  # fmt: skip
    return out


def solve_wide(
    x: Tensor, A: Tensor | BlockSparse, W: Tensor | BlockSparse, b: Tensor, V: Tensor | BlockSparse,
    c: Tensor,
    activation: str, max_iter: int, tol: float, damping: float, residual: bool, save: bool = True,
    config: launch_step.StepConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
    kinds, numerics = launch_step.plane_dtypes(x.dtype, damping, tol), present.numerics(x.dtype)
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
    given = (config, width, state, numerics, activation, damping, STATE_FLOOR)
    with present.on_device(x):
        for k in range(1, max_iter + 1):
            first, last = k == 1, k == max_iter
            step_kernels.step_fwd_kernel[grid](
                x_ptr=x, **(inject if first else recur)._asdict(), b_ptr=b, q_ptr=q, z_ptr=z, u_ptr=u,
                p_ptr=p, h_ptr=h, **records.pointers(), done_ptr=records.done,
                T=rows, k=k, tol=tol, damping=damping,
                **launch_step.step_constants(*given, FIRST=first, LAST=last, SAVE=save, SPLIT=u is not z),
                SPARSE=_is_sparse(A if first else W),
                **config.resources,
            )  # fmt: skip
        step_kernels.step_finish_kernel[grid](
            z_ptr=z, p_ptr=p, h_ptr=h, **records.pointers(),
            T=rows, k=max_iter,
            **launch_step.finish_constants(config, state, numerics, activation, STATE_FLOOR, SAVE=save),
            num_warps=config.num_warps,
        )  # fmt: skip
        out = _read_out(h, V, c, x, records.change, config, residual)
    return out, p, records.change, records.count


def _row_scales(grad_out: Tensor, V: Tensor | BlockSparse) -> Tensor:
    """A power of two per row, near the size of the entries of grad_out V; 1 for a row of zeros."""
    wide = torch.float64 if grad_out.dtype == torch.float32 else torch.float32  # squares stay in range
    norms = torch.linalg.vector_norm(grad_out, dim=1, dtype=wide).float()
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
    grad_out: Tensor, x: Tensor, p: Tensor, A: Tensor | BlockSparse, W: Tensor | BlockSparse,
    V: Tensor | BlockSparse,
    activation: str, terms: int, tol: float, damping: float, residual: bool,
    config: launch_step.StepConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.adjoint` by terms + 1 step launches: dx [T, D] in x's dtype, dA, dW, db, dV, dc in
    float32, residual [T] and steps [T].

    A, W and V may be block-sparse as in `solve_wide`; then dA, dW, dV are the gradients of their values.
    Raises ValueError as `solve_wide`.
    """
    launch.check_shapes(x, A=A, W=W, V=V, p=p, grad_out=grad_out)
    (rows, width), state = x.shape, A.shape[0]
    config = config or _choose(x, (A, W, V), state, damping)
    kinds, numerics = launch_step.plane_dtypes(x.dtype, damping, tol), present.numerics(x.dtype)
    grad_out, x, p = (t.contiguous() for t in (grad_out.to(x.dtype), x, p))
    records = _Rows(x, config, state)
    # [N, K] with K contiguous, as the product wants its second operand.
    inject, recur = (_Weight.of(t.T, d, records.done) for t, d in ((V, x.dtype), (W, kinds.operand)))
    scale = _row_scales(grad_out, V)
    g = x.new_empty(rows, state, dtype=torch.float32)
    y = x.new_empty(2, rows, state, dtype=kinds.state)
    u = x.new_empty(2, rows, state, dtype=kinds.operand)
    t, h = x.new_empty(rows, state), x.new_empty(rows, state)
    if rows > 0:
        grid = (records.tiles * records.blocks,)
        with present.on_device(x):
            given = (config, width, state, numerics, activation, damping, ADJOINT_FLOOR)
            for k in range(terms + 1):
                step_kernels.step_bwd_kernel[grid](
                    grad_ptr=grad_out, **(inject if k == 0 else recur)._asdict(), scale_ptr=scale, p_ptr=p,
                    g_ptr=g, y_ptr=y, u_ptr=u, **records.pointers(), done_ptr=records.done,
                    T=rows, k=k, tol=tol, damping=damping,
                    **launch_step.step_constants(*given, FIRST=k == 0, CHECK=k > 1),
                    SPARSE=_is_sparse(V if k == 0 else W),
                    **config.resources,
                )  # fmt: skip
            finish = launch_step.finish_constants(
                config, state, numerics, activation, ADJOINT_FLOOR, STEPS=terms > 0
            )
            step_kernels.step_bwd_finish_kernel[grid](
                p_ptr=p, scale_ptr=scale, u_ptr=u, t_ptr=t, h_ptr=h, **records.pointers(),
                done_ptr=records.done,
                T=rows, k=terms,
                **finish,
                num_warps=config.num_warps,
            )  # fmt: skip
            dx = _read_out(t, A.T, None, grad_out, records.change, config, residual)
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
