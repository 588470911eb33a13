"""The StateLayer beyond what it shares with the LionLayer: its steps, half types, and how it is pruned."""

import pytest
import torch
import torch.nn.functional as F
from equilibrium_helpers import rough
from kernel_helpers import torch_solve

from lion_fast.equilibrium.states import StateLayer
from lion_fast.pruning import RobustPruner, kept_shares, prune_once

D, R = 12, 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    layer, x = StateLayer(D, R), torch.randn(40, D)
    exact = layer(x)
    out, info = layer(x.to(dtype), return_info=True)
    assert out.dtype == dtype and info.residual.shape == (40,) and info.converged.all()
    # rounding of x and q, and the looser tolerance of half types, each within 1 / (1 - gamma)
    assert (out.float() - exact).norm() <= 5 * (4 * torch.finfo(dtype).eps + 1e-2) * exact.norm()


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_states_after_a_given_number_of_steps(damping):
    """Against the kernels' own reference in float64, with an identity in and out."""
    layer = rough(StateLayer(D, R, tol=0.0, max_iter=7, damping=damping).double())
    x, one = torch.randn(9, D, dtype=torch.float64), torch.eye(R, dtype=torch.float64)
    zero = torch.zeros(R, dtype=torch.float64)
    q = F.linear(x, layer.A, layer.b)
    expected, _ = torch_solve(q, one, layer.recurrence_matrix(), zero, one, zero, "tanh", 7, damping, False)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


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


def test_two_of_four_of_states_trained_robustly():
    layer = StateLayer(D, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    pruner = RobustPruner(layer, optimizer, keep=0.5, total_steps=8, granularity="2:4")
    for _ in range(8):
        layer(torch.randn(16, D)).square().sum().backward()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.finalize()["kept_share"] == 0.5
    assert kept_shares(layer) == {"A": 0.5, "W": 0.5}
