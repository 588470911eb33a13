"""Block patterns: which squares of a matrix are kept, and a matrix by its kept blocks."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = (16, 32, 64)


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
