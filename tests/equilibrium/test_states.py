"""The StateLayer: an equilibrium whose states are its output."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import torch_solve
from state_helpers import PHI, assert_close_each, gradients, rough, unrolled

from lion_fast import LionLayer, reference
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import ConvergenceError, OptionError
from lion_fast.pruning import RobustPruner, count_parameters, kept_shares, prune_once
from lion_fast.pruning.blocksparse import BlockSparseLayer

D, R = 12, 5


@pytest.mark.parametrize("activation", PHI)
def test_states_and_exact_gradients_are_those_of_the_unrolled_formula(activation):
    options = {"tol": 1e-14, "max_iter": 400, "gamma": 0.9, "backward": "exact"}
    layer = rough(StateLayer(D, R, activation=activation, **options).double())
    assert torch.linalg.matrix_norm(layer.W, 2) > 0.9  # so the bound is in the graph
    x = torch.randn(3, 4, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, R, dtype=torch.float64)
    out, expected = layer(x), unrolled(layer, x)
    assert out.shape == (3, 4, R) and torch.allclose(out, expected, rtol=0, atol=1e-12)
    assert_close_each(gradients(layer, out, upstream, x), gradients(layer, expected, upstream, x), 1e-9)


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
def test_one_step_has_its_own_gradient(backward):
    """max_iter=1 is phi(x A^T + b): the gradient of that, in every mode, and none for W."""
    layer = rough(StateLayer(D, R, max_iter=1, backward=backward).double())
    x = torch.randn(3, 4, D, dtype=torch.float64, requires_grad=True)
    upstream, given = torch.randn(3, 4, R, dtype=torch.float64), (x, layer.A, layer.b)
    out, expected = layer(x), torch.tanh(x @ layer.A.T + layer.b)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(out, [*given, layer.W], upstream)
    assert_close_each(found[:3], torch.autograd.grad(expected, given, upstream), 1e-12)
    assert not found[3].any()


@pytest.mark.parametrize("backward", ["neumann", "exact", "phantom"])
@pytest.mark.parametrize(
    "kind, recurrence",
    [(k, r) for k in (LionLayer, reference.LionLayer) for r in ("free", "tied")]
    + [(BlockSparseLayer, "free")],
)
def test_one_step_of_a_layer_has_its_own_gradient(kind, recurrence, backward):
    made = reference.LionLayer if kind is reference.LionLayer else LionLayer
    layer = rough(
        made(32, 32, recurrence=recurrence, activation="tanh", max_iter=1, backward=backward).double()
    )
    if kind is BlockSparseLayer:
        prune_once(layer, 0.9, granularity="block", block=16, criterion="magnitude")
    net = BlockSparseLayer(layer, block=16) if kind is BlockSparseLayer else layer
    x, upstream = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    A, V = layer.masked("A"), layer.masked("V")
    expected = x + torch.tanh(x @ A.T + layer.b) @ V.T + layer.c
    given = (layer.A, layer.b, layer.V, layer.c)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(net(x), given, upstream)
    assert_close_each(found, torch.autograd.grad(expected, given, upstream), 1e-12)
    if recurrence == "free":
        assert not torch.autograd.grad(net(x), layer.W, upstream)[0].any()


def test_a_gradient_has_no_more_terms_than_there_were_recurrences():
    """Two applications pass one recurrence: one Neumann term, however many are asked for."""
    x, upstream = torch.randn(6, D, dtype=torch.float64), torch.randn(6, R, dtype=torch.float64)
    layers = [StateLayer(D, R, max_iter=2, neumann_terms=terms).double() for terms in (1, 8)]
    layers[1].load_state_dict(rough(layers[0]).state_dict())
    one, eight = (gradients(layer, layer(x), upstream) for layer in layers)
    assert all(torch.equal(a, b) for a, b in zip(one, eight, strict=True))


@pytest.mark.parametrize("backward, terms", [("jfb", 0), ("neumann", 0), ("neumann", 3), ("neumann", 8)])
def test_truncated_gradients_are_the_series(backward, terms):
    """dq = g (I + J + ... + J^k) slope, from dense Jacobians per token."""
    options = {"tol": 1e-14, "max_iter": 400, "backward": backward, "neumann_terms": terms}
    layer = rough(StateLayer(D, R, **options).double())
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, R, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), [x, layer.A, layer.b], g)
    z, Wh = unrolled(layer, x).detach(), layer.recurrence_matrix().detach()
    slope = 1 - z**2
    dq = []
    for i in range(6):
        J = slope[i][:, None] * Wh  # dz'/dz
        series = sum(torch.linalg.matrix_power(J, k) for k in range(terms + 1))
        dq.append((g[i] @ series) * slope[i])
    dq = torch.stack(dq)
    assert_close_each(found, (dq @ layer.A, dq.T @ x, dq.sum(0)), 1e-10)


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_bound_holds_for_whatever_weights(activation, scale):
    lipschitz = {"gelu": 1.1290, "silu": 1.0999}.get(activation, 1.0)
    layer = StateLayer(D, 16, activation=activation, gamma=0.7)
    layer.W.data.mul_(scale)
    norm = torch.linalg.matrix_norm(layer.recurrence_matrix().double(), 2)
    assert norm * lipschitz <= 0.7 * (1 + 1e-4)
    if scale == 1e-3:
        assert torch.equal(layer.recurrence_matrix(), layer.W)


def test_counts_shapes_and_dtypes():
    layer = StateLayer(D, R)
    assert sum(p.numel() for p in layer.parameters()) == R * D + R * R + R
    for lead in ((), (1,), (0,), (2, 3), (2, 0, 3)):
        assert layer(torch.randn(*lead, D)).shape == (*lead, R)
    exact = layer(torch.randn(40, D, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(40, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        out, info = layer(x, return_info=True)
        assert out.dtype == dtype and info.residual.shape == (40,) and info.converged.all()
        # rounding of x and q, and the looser tolerance of half types, each within 1 / (1 - gamma)
        assert (out.float() - exact).norm() <= 5 * (4 * torch.finfo(dtype).eps + 1e-2) * exact.norm()


def test_autocast_changes_nothing():
    layer, x = rough(StateLayer(D, R)), torch.randn(6, D)
    upstream = torch.randn(6, R)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert torch.equal(mixed, plain)
    for found, expected in zip(
        gradients(layer, mixed, upstream), gradients(layer, plain, upstream), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim must be a whole number"),
        ({"state_dim": 2.0}, "state_dim must be a whole number"),
        ({"state_dim": True}, "state_dim must be a whole number"),
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": "a"}, "gamma"),
        ({"activation": "elu"}, "activation must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"max_iter": 0}, "max_iter"),
        ({"damping": 0.0}, "damping"),
        ({"backward": "bptt"}, "backward must be one of"),
        ({"neumann_terms": -1}, "neumann_terms"),
        ({"tol": -1.0}, "tol"),
        ({"on_failure": "shrug"}, "on_failure must be one of"),
        ({"recurrence": "tied"}, "recurrence"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        StateLayer(**{"dim": D, "state_dim": R} | options)


def test_bad_input_and_failures():
    layer = StateLayer(D, R)
    for wrong in (torch.randn(3, D + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"width {D}"):
            layer(wrong)
    with pytest.raises(TypeError):
        layer(torch.ones(3, D, dtype=torch.long))
    with pytest.raises(RuntimeError):
        StateLayer(D, R, backend="triton")(torch.randn(3, D))
    stuck = rough(StateLayer(D, R, max_iter=1, on_failure="raise"))
    with pytest.raises(ConvergenceError, match="Raise max_iter"):
        stuck(torch.randn(3, D))
    with pytest.warns(UserWarning):
        rough(StateLayer(D, R, max_iter=1, on_failure="warn"))(torch.randn(3, D))


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_states_after_a_given_number_of_steps(damping):
    """Against the kernels' own reference in float64, with an identity in and out."""
    layer = rough(StateLayer(D, R, tol=0.0, max_iter=7, damping=damping).double())
    x, one = torch.randn(9, D, dtype=torch.float64), torch.eye(R, dtype=torch.float64)
    zero = torch.zeros(R, dtype=torch.float64)
    q = F.linear(x, layer.A, layer.b)
    expected, _ = torch_solve(q, one, layer.recurrence_matrix(), zero, one, zero, "tanh", 7, damping, False)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    torch._dynamo.reset()
    layer = rough(StateLayer(D, R))
    x, upstream = torch.randn(2, 8, D, requires_grad=True), torch.randn(2, 8, R)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    out = compiled(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    assert_close_each(gradients(layer, out, upstream, x), gradients(layer, expected, upstream, x), 1e-4)


def test_units_of_states_are_ranked_by_their_row_of_a_and_row_and_column_of_w():
    layer = rough(StateLayer(D, R))
    A, W = layer.A.detach().abs(), layer.W.detach().abs()
    mean = [(A[i].sum() + W[i].sum() + W[:, i].sum() - W[i, i]).item() / (D + 2 * R - 1) for i in range(R)]
    best = sorted(range(R), key=lambda i: -mean[i])[:3]
    b = layer.b.detach().clone()
    prune_once(layer, 0.6, granularity="unit")
    for i in range(R):
        kept = i in best
        assert bool((layer.A[i] != 0).all()) is kept and bool((layer.A[i] == 0).all()) is not kept
        for j in range(R):
            assert (layer.W[i, j] != 0).item() is (kept and j in best)
    assert torch.equal(layer.b, b)  # biases are exempt
    x = torch.randn(4, D)
    dead = [i for i in range(R) if i not in best]
    torch.testing.assert_close(layer(x)[:, dead], torch.tanh(b[dead]).expand(4, -1))
    # the kept ones are the small layer's
    small = StateLayer(D, 3, tol=1e-7)
    small.load_state_dict({"A": layer.A[best], "W": layer.recurrence_matrix()[best][:, best], "b": b[best]})
    layer.tol = 1e-7
    torch.testing.assert_close(layer(x)[:, best], small(x), rtol=0, atol=1e-5)


def test_blocks_and_two_of_four_of_states():
    layer = rough(StateLayer(64, 32))
    expected = {name: getattr(layer, name).detach().abs() for name in "AW"}
    prune_once(layer, 0.5, granularity="2:4")
    for name, values in expected.items():
        groups = values.reshape(-1, 4)
        best = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, 1).indices, True)
        assert torch.equal(layer.masks()[name], best.view_as(values))
    layer = rough(StateLayer(64, 32))
    prune_once(layer, 0.5, granularity="block", block=16)
    kept = torch.cat([m.unfold(0, 16, 16).unfold(1, 16, 16).flatten() for m in layer.masks().values()])
    tiles = kept.view(-1, 16 * 16).float().mean(1)
    assert ((tiles == 0) | (tiles == 1)).all() and tiles.sum() == (2 * 4 + 2 * 2) / 2
    assert layer(torch.randn(3, 64)).shape == (3, 32)


@pytest.mark.parametrize("granularity", ["element", "unit", "2:4"])
def test_robust_training_of_states(granularity):
    layer = StateLayer(D, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    pruner = RobustPruner(layer, optimizer, keep=0.5, total_steps=8, granularity=granularity)
    for _ in range(8):
        layer(torch.randn(16, D)).square().sum().backward()
        pruner.step()
        optimizer.zero_grad()
    report = pruner.finalize()
    if granularity == "unit":
        assert [m["kept"] for m in report["matrices"].values()] == [4 * D, 4 * 4]
    else:
        assert report["kept_share"] == 0.5
    assert count_parameters(layer)["kept"] == sum(m["kept"] for m in report["matrices"].values()) + 8
    assert set(kept_shares(layer)) == {"A", "W"}
