"""The Triton kernels of `sparse`, and the product that the step kernels share with them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import launch_sparse, present, tuned
from lion_kernels.blocks import BlockPattern, BlockSparse
from lion_kernels.tile import as_operand, device_function

# Rows that one program of the sampled product sums up, and how many splits there are at most.
SPLIT_ROWS, MAX_SPLITS = 2048, 64


@device_function
def sparse_product(
    acc, a_ptr, a_rows, a_mask, values_ptr, starts_ptr, columns_ptr, row,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a w^T for the rows of a at offsets `a_rows` and row block `row` of a block-sparse w [N, K].

    One loop over slices of BLOCK_K of all listed blocks, so that the loads of the next overlap the product.
    """
    slices: tl.constexpr = BLOCK // BLOCK_K
    n = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_K)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    for s in range(first * slices, last * slices):
        e = s // slices
        inner = (s % slices) * BLOCK_K + j
        k = tl.load(columns_ptr + e) * BLOCK + inner
        a = tl.load(a_ptr + a_rows[:, None] + k[None, :], mask=a_mask[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(values_ptr + e * (BLOCK * BLOCK) + n[None, :] * BLOCK + inner[:, None])
        acc = tl.dot(as_operand(a, KIND), as_operand(w, KIND), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T"])
def _sparse_matmul_kernel(
    x_ptr, values_ptr, starts_ptr, columns_ptr, out_ptr,
    T,
    N: tl.constexpr, K: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x w^T for x [T, K] and a block-sparse w [N, K]: one block of [BLOCK_T, BLOCK] a program."""
    row = tl.program_id(0) % ROW_BLOCKS
    start = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64) * BLOCK_T
    i = tl.arange(0, BLOCK_T)
    valid = i < T - start
    n = row * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    acc = sparse_product(
        acc, x_ptr + start * K, i * K, valid, values_ptr, starts_ptr, columns_ptr, row,
        K, BLOCK, BLOCK_K, INPUT, PRECISION,
    )  # fmt: skip
    tl.store(out_ptr + start * N + i[:, None] * N + n[None, :], acc, mask=valid[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def _sampled_kernel(
    a_ptr, b_ptr, rows_ptr, columns_ptr, partial_ptr,
    T, SPLIT,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One kept block of a^T b over SPLIT rows; partial is [splits, kept, BLOCK, BLOCK]."""
    e = tl.program_id(0)
    split = tl.program_id(1)
    j = tl.arange(0, BLOCK)
    n = tl.load(rows_ptr + e) * BLOCK + j
    k = tl.load(columns_ptr + e) * BLOCK + j
    begin = split.to(tl.int64) * SPLIT
    i = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for offset in range(0, SPLIT, BLOCK_T):
        row = begin + offset + i
        valid = row < T
        a = tl.load(a_ptr + row[:, None] * N + n[None, :], mask=valid[:, None] & (n < N)[None, :], other=0.0)
        b = tl.load(b_ptr + row[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
        a, b = as_operand(a, INPUT), as_operand(b, INPUT)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    place = (split.to(tl.int64) * tl.num_programs(0) + e) * (BLOCK * BLOCK)
    tl.store(partial_ptr + place + j[:, None] * BLOCK + j[None, :], acc)


def matmul(x: Tensor, weight: BlockSparse) -> Tensor:
    """See `sparse.matmul`."""
    pattern = weight.pattern
    out = x.new_empty(len(x), pattern.shape[0])
    if out.numel() == 0:
        return out
    config = tuned.choose_sparse("matmul", pattern.block, x.dtype)
    constants = launch_sparse.matmul_constants(config, pattern.shape, present.numerics(x.dtype))
    with present.on_device(x):
        _sparse_matmul_kernel[(triton.cdiv(len(x), config.block_t) * constants["ROW_BLOCKS"],)](
            x_ptr=x.contiguous(), values_ptr=weight.to(x.dtype).values, starts_ptr=pattern.starts,
            columns_ptr=pattern.columns, out_ptr=out,
            T=len(x),
            **constants, **config.resources,
        )  # fmt: skip
    return out


def sampled(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """See `sparse.sampled`."""
    block, rows = pattern.block, len(a)
    if pattern.kept == 0 or rows == 0:
        return a.new_zeros(pattern.kept, block, block, dtype=torch.float32)
    config = tuned.choose_sparse("sampled", block, a.dtype)
    constants = launch_sparse.sampled_constants(config, pattern.shape, present.numerics(a.dtype))
    per_split = max(SPLIT_ROWS, triton.cdiv(rows, MAX_SPLITS))
    per_split = triton.cdiv(per_split, config.block_t) * config.block_t
    splits = triton.cdiv(rows, per_split)
    partial = a.new_empty(splits, pattern.kept, block, block, dtype=torch.float32)
    with present.on_device(a):
        _sampled_kernel[(pattern.kept, splits)](
            a_ptr=a.contiguous(), b_ptr=b.to(a.dtype).contiguous(), rows_ptr=pattern.rows,
            columns_ptr=pattern.columns, partial_ptr=partial,
            T=rows, SPLIT=per_split,
            **constants, **config.resources,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)
