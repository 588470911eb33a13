"""Block-sparse matrices and their products: dense x sparse, its transpose, sampled dense x dense.

A `BlockSparse` keeps the square blocks of a matrix that its `BlockPattern` lists, row by row. The pattern
is built once per mask, on the host; the values are gathered from a dense matrix by torch code, under
autograd where that is on. A block that is not listed costs nothing: it is not loaded and not multiplied.

The kernels run where the tokens are on CUDA, or in Triton's interpreter; elsewhere plain torch does,
which is also the reference of the tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_kernels import launch, present
from lion_kernels.blocks import BlockPattern, BlockSparse


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels serve these tokens."""
    runs = x.is_cuda or present.interpreted()
    return runs and x.dtype in launch.DTYPES and present.triton_missing() is None


def matmul_reference(x: Tensor, weight: BlockSparse) -> Tensor:
    """`matmul` in plain torch, summed in float32 (float64 for float64)."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(acc) @ weight.dense().to(acc).T).to(x.dtype)


def sampled_reference(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """`sampled` in plain torch."""
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    tiles = []
    for t, size, index in ((a, pattern.shape[0], pattern.rows), (b, pattern.shape[1], pattern.columns)):
        padded = F.pad(t.to(acc), (0, -size % pattern.block))
        tiles.append(padded.view(len(t), -(-size // pattern.block), pattern.block)[:, index.long()])
    return torch.einsum("tei,tej->eij", *tiles) * _inside(pattern, acc)


def _inside(pattern: BlockPattern, dtype: torch.dtype) -> Tensor:
    """1 where an entry of a kept block [kept, block, block] lies in the matrix, 0 outside."""
    j = torch.arange(pattern.block, device=pattern.rows.device)
    rows, columns = (
        index[:, None] * pattern.block + j < size
        for index, size in zip((pattern.rows, pattern.columns), pattern.shape, strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :]).to(dtype)


def matmul(x: Tensor, weight: BlockSparse) -> Tensor:
    """x weight^T for x [T, K] and weight [N, K]: [T, N] in x's dtype; `matmul(g, weight.T)` is g weight.

    The values take x's dtype; sums are float32. No autograd: see `linear`.
    """
    assert x.ndim == 2 and x.shape[1] == weight.shape[1], f"{list(x.shape)} does not meet {weight.shape}"
    if not has_kernels(x):
        return matmul_reference(x, weight)
    from lion_kernels import sparse_kernels

    return sparse_kernels.matmul(x, weight)


def sampled(a: Tensor, b: Tensor, pattern: BlockPattern) -> Tensor:
    """The kept blocks of a^T b for a [T, N] and b [T, K]: [kept, block, block] in float32 (float64).

    This is the gradient of the values of a weight [N, K] in b weight^T, for an upstream gradient a.
    Entries outside the matrix are zero. The rows are summed in an order that depends on T alone.
    """
    shape = (a.shape[1], b.shape[1])
    assert shape == pattern.shape and len(a) == len(b), (
        f"{shape} of {len(a)} rows; the mask is {pattern.shape}"
    )
    if not has_kernels(a):
        return sampled_reference(a, b, pattern)
    from lion_kernels import sparse_kernels

    return sparse_kernels.sampled(a, b, pattern)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, pattern):
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        return matmul(x, BlockSparse(pattern, values))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        dx = matmul(grad, BlockSparse(ctx.pattern, values).T) if ctx.needs_input_grad[0] else None
        dvalues = sampled(grad, x, ctx.pattern).to(values.dtype) if ctx.needs_input_grad[1] else None
        return dx, dvalues, None


def linear(x: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """x weight^T with gradients for x [..., K] and for the kept blocks `values` alone: [..., N].

    >>> from lion_kernels.blocks import find_pattern
    >>> pattern = find_pattern(torch.eye(32) > 0, 16)
    >>> values = pattern.gather(torch.eye(32)).requires_grad_()
    >>> out = linear(torch.ones(3, 32), values, pattern)
    >>> out.sum().backward()
    >>> out.sum().item(), values.grad.shape
    (96.0, torch.Size([2, 16, 16]))
    """
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), values, pattern)
    return out.reshape(*x.shape[:-1], pattern.shape[0])
