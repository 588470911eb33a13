"""Block-sparse products and steps against dense-with-zeros in float64, and torch in the tokens' dtype."""

import pytest
import torch
from kernel_helpers import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    assert_as_good_as_torch,
    double,
    error,
    problem,
    torch_adjoint,
    torch_gradients,
    torch_solve,
)

from lion_fast import LionLayer
from lion_fast.pruning import BlockSparseLayer, prune_once
from lion_kernels import reference, sparse, sparse_kernels
from lion_kernels.blocks import BlockSparse, find_pattern, to_blocks
from lion_kernels.step import adjoint_wide, solve_wide

NEVER = 0.0


def block_mask(shape, block, keep, seed=0):
    """A mask of entries in whole blocks; with a dead row and a dead column of blocks where there are some."""
    generator = torch.Generator().manual_seed(seed)
    grid = [-(-size // block) for size in shape]
    blocks = torch.rand(grid, generator=generator) < keep
    if 0 < keep < 1 and min(grid) > 2:
        blocks[1], blocks[:, 0] = False, False
    mask = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return mask[: shape[0], : shape[1]].to(DEVICE)


KEEPS = {"none dead": 1.0, "half": 0.5, "few": 0.2, "all dead": 0.0}
# Rows, N, K, block, keep: ragged in both directions, whole, a block larger than the matrix, no rows.
PRODUCTS = [
    *((70, 100, 72, 16, keep) for keep in KEEPS),
    (70, 100, 72, 32, "half"), (70, 100, 72, 64, "half"), (33, 64, 128, 32, "few"),
    (70, 64, 128, 64, "half"),
    (5, 10, 7, 16, "none dead"), (1, 48, 16, 16, "half"), (0, 32, 32, 32, "half"),
]  # fmt: skip
SOLVES = [
    *((block, "half", damping) for block in (16, 32, 64) for damping in (1.0, 0.7)),
    (32, "none dead", 1.0), (32, "few", 1.0), (32, "all dead", 1.0),
]  # fmt: skip


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("shape", [(100, 72), (64, 128), (10, 7), (16, 16)])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_format(keep, shape, block):
    matrix = torch.randn(shape, device=DEVICE, dtype=torch.float64)
    mask = block_mask(shape, block, KEEPS[keep])
    weight = to_blocks(matrix, mask, block)
    pattern = weight.pattern
    assert torch.equal(weight.dense(), matrix * mask)
    assert torch.equal(weight.T.dense(), (matrix * mask).T) and torch.equal(weight.T.T.dense(), matrix * mask)
    rows, columns = pattern.grid
    listed = []
    for i in range(rows):
        part = pattern.columns[pattern.starts[i] : pattern.starts[i + 1]].tolist()
        assert part == sorted(set(part))
        listed += [(i, j) for j in part]
    expected = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if mask[i * block : (i + 1) * block, j * block : (j + 1) * block].any()
    ]
    assert listed == expected == list(zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True))
    assert pattern.kept == len(expected) and pattern.sparsity == 1 - len(expected) / (rows * columns)
    assert pattern.starts.dtype == pattern.columns.dtype == torch.int32
    assert len(pattern.starts) == rows + 1


def test_values_are_gathered_under_autograd():
    mask = block_mask((40, 50), 16, 0.5)
    pattern = find_pattern(mask, 16)
    matrix = torch.randn(40, 50, device=DEVICE, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(40, 50, device=DEVICE, dtype=torch.float64)
    pattern.scatter(pattern.gather(matrix).sin()).mul(upstream).sum().backward()
    torch.testing.assert_close(matrix.grad, upstream * matrix.detach().cos() * mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, out, width, block, keep", PRODUCTS)
def test_products_equal_dense_with_zeros(rows, out, width, block, keep, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, g, matrix = (
        torch.randn(s, generator=generator).to(dtype).to(DEVICE)
        for s in ((rows, width), (rows, out), (out, width))
    )
    mask = block_mask((out, width), block, KEEPS[keep])
    dense, weight = matrix * mask, to_blocks(matrix, mask, block)
    # Summed in float32 whatever the dtype: torch on a CPU does the same for half precision.
    for got, left, right in (
        (sparse.matmul(x, weight), x, dense.T),
        (sparse.matmul(g, weight.T), g, dense),
    ):
        assert got.dtype == dtype and got.shape == (rows, right.shape[1])
        exact = left.double() @ right.double()
        assert_as_good_as_torch(got, left @ right, exact, "product")
    reference_ = sparse.matmul_reference(x, weight)
    assert_as_good_as_torch(reference_, x @ dense.T, x.double() @ dense.double().T, "the reference")
    pattern = weight.pattern
    got = sparse.sampled(g, x, pattern)
    exact = pattern.gather((g.double().T @ x.double()) * mask)
    assert got.shape == (pattern.kept, block, block) and got.dtype == torch.float32
    same = pattern.gather((g.float().T @ x.float()) * mask)
    assert_as_good_as_torch(got, same, exact, "sampled product")
    assert_as_good_as_torch(sparse.sampled_reference(g, x, pattern), same, exact, "its reference")


def test_many_rows_are_split_and_summed_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(sparse_kernels, "SPLIT_ROWS", 64)
    g, x = torch.randn(300, 40, device=DEVICE), torch.randn(300, 50, device=DEVICE)
    pattern = find_pattern(block_mask((40, 50), 16, 0.5), 16)
    got = sparse.sampled(g, x, pattern)
    exact = pattern.gather(g.double().T @ x.double())
    inside = pattern.gather(torch.ones(40, 50, device=DEVICE, dtype=torch.float64))
    assert error(got, exact * inside) < 1e-4
    assert torch.equal(got, sparse.sampled(g, x, pattern))


def test_gradients_of_the_linear_map_reach_kept_entries_only():
    mask = block_mask((40, 50), 16, 0.4)
    pattern = find_pattern(mask, 16)
    matrix = torch.randn(40, 50, device=DEVICE, requires_grad=True)
    x = torch.randn(3, 7, 50, device=DEVICE, requires_grad=True)
    upstream = torch.randn(3, 7, 40, device=DEVICE)
    out = sparse.linear(x, pattern.gather(matrix), pattern)
    got = torch.autograd.grad(out, [x, matrix], upstream)
    dense = (matrix * mask).double()
    expected = torch.autograd.grad(x.double() @ dense.T, [x, matrix], upstream.double())
    assert out.shape == (3, 7, 40) and error(out, x.double() @ dense.T) < 1e-5
    for ours, right in zip(got, expected, strict=True):
        assert error(ours, right) < 1e-4
    assert (got[1][~mask] == 0).all()


def sparse_problem(rows, width, state, block, keep, dtype=torch.float32, seed=0):
    """The arguments of a solve with masked A, W and V, and the same as blocks."""
    x, A, W, b, V, c = problem(rows, width, state, torch.float64, seed=seed)
    masks = [block_mask(t.shape, block, keep, seed + k) for k, t in enumerate((A, W, V))]
    A, W, V = (t * mask for t, mask in zip((A, W, V), masks, strict=True))
    # Masking can raise the norm.
    W = W * (0.8 / torch.linalg.matrix_norm(W, 2).clamp_min(0.8))
    dense = [t.to(dtype) for t in (x, A, W, b, V, c)]
    blocks = [to_blocks(dense[k], mask, block) for k, mask in zip((1, 2, 4), masks, strict=True)]
    return dense, [dense[0], blocks[0], blocks[1], dense[3], blocks[2], dense[5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block, keep, damping", SOLVES)
def test_a_block_sparse_solve_and_its_adjoint(block, keep, damping, dtype):
    dense, blocks = sparse_problem(37, 50, 72, block, KEEPS[keep], dtype)
    out, p, _, _ = solve_wide(*blocks, "gelu", 4, NEVER, damping, True)
    exact = torch_solve(*double(*dense), "gelu", 4, damping, True)
    same = torch_solve(*dense, "gelu", 4, damping, True)
    assert_as_good_as_torch(out, same[0], exact[0], "out")
    assert_as_good_as_torch(p, same[1], exact[1], "p")

    x, A, W, _, V, _ = blocks
    grad_out = torch.randn(37, 50, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    got = adjoint_wide(grad_out, x, p, A, W, V, "gelu", 2, NEVER, damping, True)
    given = (grad_out, x, p, *(dense[k] for k in (1, 2, 4)))
    exact = torch_adjoint(*double(*given), "gelu", 2, damping, True)
    by_torch = zip(*torch_gradients(*given, "gelu", 2, damping, True), strict=True)
    for name, ours, theirs, right in zip(GRADIENTS, got, by_torch, exact, strict=False):
        weight = {"dA": A, "dW": W, "dV": V}.get(name)
        if weight is not None:
            assert ours.shape == weight.values.shape
            theirs, right = [weight.pattern.gather(t) for t in theirs], weight.pattern.gather(right)
        assert_as_good_as_torch(ours, theirs, right, name)


@pytest.mark.parametrize("sparse_ones", ["A", "W", "V", "AV"])
def test_dense_and_block_sparse_matrices_mix(sparse_ones):
    dense, blocks = sparse_problem(40, 50, 70, 32, 0.5)
    mixed = [blocks[k] if "xAWbVc"[k] in sparse_ones and "xAWbVc"[k] in "AWV" else dense[k] for k in range(6)]
    out, p, _, _ = solve_wide(*mixed, "tanh", 5, NEVER, 1.0, False)
    exact = torch_solve(*double(*dense), "tanh", 5, 1.0, False)
    assert error(out, exact[0]) < 1e-5 and error(p, exact[1]) < 1e-5
    x, A, W, _, V, _ = mixed
    got = adjoint_wide(torch.ones_like(x), x, p, A, W, V, "tanh", 2, NEVER, 1.0, False)
    x, A_, W_, _, V_, _ = double(*dense)
    exact = torch_adjoint(torch.ones_like(x), x, p.double(), A_, W_, V_, "tanh", 2, 1.0, False)
    for ours, right, weight in zip(got, exact, (x, A, W, x, V, x), strict=False):
        right = weight.pattern.gather(right) if isinstance(weight, BlockSparse) else right
        assert error(ours, right) < 1e-4


def test_rows_stop_as_in_the_dense_solve():
    dense, blocks = sparse_problem(100, 40, 80, 16, 0.4)
    dense[0].mul_(torch.logspace(-4, 1, 100, device=DEVICE)[:, None])
    got = solve_wide(*blocks, "tanh", 40, 1e-4, 1.0, True)
    expected = reference.solve(*double(*dense), "tanh", 40, 1e-4, 1.0, True)
    borderline = (expected[2] / 1e-4 - 1).abs() < 0.01
    assert (borderline | (got[3] == expected[3])).all() and len(got[3].unique()) > 3
    same = got[3] == expected[3]
    assert error(got[0][same], expected[0][same]) < 1e-5


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="block"):
        find_pattern(torch.ones(16, 16, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match="boolean matrix"):
        find_pattern(torch.ones(16, 16), 16)
    dense, blocks = sparse_problem(4, 50, 70, 32, 0.5)
    other = to_blocks(dense[2], dense[2] != 0, 16)
    with pytest.raises(ValueError, match="one block size; got 16, 32"):
        solve_wide(blocks[0], blocks[1], other, *blocks[3:], "relu", 5, NEVER, 1.0, True)
    with pytest.raises(AssertionError, match=r"V must be \[50, 70\]"):
        solve_wide(*blocks[:4], blocks[4].T, blocks[5], "relu", 5, NEVER, 1.0, True)
    with pytest.raises(AssertionError, match="does not meet"):
        sparse.matmul(torch.ones(3, 5, device=DEVICE), blocks[1])
    with pytest.raises(AssertionError, match="the mask is"):
        sparse.sampled(torch.ones(3, 5, device=DEVICE), torch.ones(3, 5, device=DEVICE), blocks[1].pattern)


def test_the_layer_form_gives_what_the_dense_layer_gives():
    layer = LionLayer(40, 72, activation="tanh", max_iter=12, tol=1e-6, neumann_terms=2).to(DEVICE)
    with torch.no_grad():
        layer.V.mul_(30)
    prune_once(layer, 0.4, granularity="block", block=16)
    form = BlockSparseLayer(layer, 16)
    x = torch.randn(3, 7, 40, device=DEVICE, requires_grad=True)
    out, info = form(x, return_info=True)
    assert info.residual.shape == info.iterations.shape == (3, 7)
    upstream = torch.randn_like(out)
    names, inputs = ["x", *(n for n, _ in layer.named_parameters())], [x, *layer.parameters()]
    got = torch.autograd.grad(out, inputs, upstream)
    expected = layer(x)
    assert error(out, expected) < 1e-5
    for name, ours, right in zip(names, got, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert error(ours, right) < 1e-4, name
    for name, mask in layer.masks().items():
        assert (got[names.index(name)][~mask] == 0).all()
