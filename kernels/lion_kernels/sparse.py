"""Block-sparse matrices and their products: dense x sparse, its transpose, sampled dense x dense.

A `BlockSparse` keeps the square blocks of a matrix that its `BlockPattern` lists, row by row. The pattern
is built once per mask, on the host; the values are gathered from a dense matrix by torch code, under
autograd where that is on. A block that is not listed costs nothing: it is not loaded and not multiplied.

The kernels run where the tokens are on CUDA, or in Triton's interpreter; elsewhere plain torch does,
which is also the reference of the tests.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = (16, 32, 64)
# Rows that one program of the sampled product sums up, and how many splits there are at most.
SPLIT_ROWS, MAX_SPLITS = 2048, 64


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which `block` x `block` squares of a matrix of `shape` are kept.

    starts [row blocks + 1] and columns [kept], int32, list the column blocks of each row block, ascending;
    rows [kept] has the row block of each; order [kept] has the place of each block of the transposed
    pattern in this one. At the ragged edges blocks reach over the matrix; what lies outside is zero.
    """

    shape: tuple[int, int]
    block: int
    starts: Tensor
    columns: Tensor
    rows: Tensor
    order: Tensor

    @property
    def kept(self) -> int:
        """Number of kept blocks."""
        return self.columns.numel()

    @property
    def grid(self) -> tuple[int, int]:
        """Row blocks and column blocks."""
        return -(-self.shape[0] // self.block), -(-self.shape[1] // self.block)

    @property
    def sparsity(self) -> float:
        """The share of blocks that are not kept."""
        return 1 - self.kept / (self.grid[0] * self.grid[1])

    @functools.cached_property
    def transposed(self) -> "BlockPattern":
        """The pattern of the transpose."""
        rows = self.columns[self.order.long()]
        back = torch.empty_like(self.order)
        back[self.order.long()] = torch.arange(self.kept, dtype=back.dtype, device=back.device)
        return BlockPattern(
            self.shape[::-1],
            self.block,
            _starts(rows, self.grid[1]),
            self.rows[self.order.long()],
            rows,
            back,
        )

    def gather(self, matrix: Tensor) -> Tensor:
        """The kept blocks of a matrix of this shape: [kept, block, block], differentiable."""
        return _tiles(matrix, self.block)[self.rows.long(), self.columns.long()]

    def scatter(self, values: Tensor) -> Tensor:
        """The dense matrix with these blocks [kept, block, block], and zeros elsewhere."""
        tiles = values.new_zeros(*self.grid, self.block, self.block)
        tiles = tiles.index_put((self.rows.long(), self.columns.long()), values)
        whole = tiles.permute(0, 2, 1, 3).reshape(self.grid[0] * self.block, self.grid[1] * self.block)
        return whole[: self.shape[0], : self.shape[1]]


def _tiles(matrix: Tensor, block: int) -> Tensor:
    """[row blocks, column blocks, block, block], padded with zeros."""
    n, k = matrix.shape
    padded = F.pad(matrix, (0, -k % block, 0, -n % block))
    return padded.view(-(-n // block), block, -(-k // block), block).permute(0, 2, 1, 3)


def _starts(rows: Tensor, count: int) -> Tensor:
    """Where the entries of each of `count` row blocks begin, for sorted `rows`."""
    counts = torch.bincount(rows.long(), minlength=count)
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def find_pattern(mask: Tensor, block: int) -> BlockPattern:
    """The pattern that keeps every block of a boolean mask [N, K] with anything True in it.

    Waits for the device: make it once per mask. Raises ValueError for another block than 16, 32 or 64.

    >>> find_pattern(torch.eye(48) > 0, 16).columns.tolist()
    [0, 1, 2]
    """
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}; got {block!r}")
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"the mask must be a boolean matrix; got {mask.dtype} of shape {list(mask.shape)}")
    found = _tiles(mask.to(torch.uint8), block).amax((2, 3)) > 0
    rows, columns = (t.to(torch.int32) for t in found.nonzero(as_tuple=True))
    place = torch.zeros(found.shape, dtype=torch.int32, device=mask.device)
    place[found] = torch.arange(rows.numel(), dtype=torch.int32, device=mask.device)
    order = place.T[found.T]
    return BlockPattern(tuple(mask.shape), block, _starts(rows, found.shape[0]), columns, rows, order)


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """A matrix [N, K] by its kept blocks: values [kept, block, block]."""

    pattern: BlockPattern
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.pattern.shape

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def T(self) -> "BlockSparse":
        """The transpose [K, N], with values of its own."""
        return BlockSparse(self.pattern.transposed, self.values[self.pattern.order.long()].mT.contiguous())

    def to(self, dtype: torch.dtype) -> "BlockSparse":
        """The same matrix with contiguous values of `dtype`."""
        return BlockSparse(self.pattern, self.values.to(dtype).contiguous())

    def dense(self) -> Tensor:
        """The dense matrix."""
        return self.pattern.scatter(self.values)


def to_blocks(matrix: Tensor, mask: Tensor, block: int) -> BlockSparse:
    """The kept blocks of a dense matrix, by a boolean mask of its shape."""
    pattern = find_pattern(mask, block)
    return BlockSparse(pattern, pattern.gather(matrix))


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels serve these tokens."""
    from lion_kernels import launch, ops

    return (x.is_cuda or launch.interpreted()) and x.dtype in launch.DTYPES and ops._triton_missing() is None


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

    >>> pattern = find_pattern(torch.eye(32) > 0, 16)
    >>> values = pattern.gather(torch.eye(32)).requires_grad_()
    >>> out = linear(torch.ones(3, 32), values, pattern)
    >>> out.sum().backward()
    >>> out.sum().item(), values.grad.shape
    (96.0, torch.Size([2, 16, 16]))
    """
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), values, pattern)
    return out.reshape(*x.shape[:-1], pattern.shape[0])
