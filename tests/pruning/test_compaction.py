"""Compaction: dead units taken out, the same outputs."""

import pytest
import torch
from pruning_helpers import EXACT, D, R, TwoEnds, loud
from torch import nn

from lion_fast import LionLayer
from lion_fast.errors import OptionError
from lion_fast.pruning import compact, compact_model, prune_once


def dead_layer(dtype=torch.float64, **options):
    """Of 10 units 3 are pruned, 1 has no read-out or outgoing link, 2 are constant (one feeds the other)."""
    layer = loud(LionLayer(D, 10, dtype=dtype, **EXACT, **options))
    units = torch.ones(10, dtype=torch.bool)
    units[[1, 4, 9]] = False
    with torch.no_grad():
        layer.A[~units], layer.V[:, ~units] = 0, 0
        layer.V[:, 2] = 0
        layer.A[[5, 6]] = 0
        if layer.W is not None:
            layer.W[~units], layer.W[:, ~units] = 0, 0
            layer.W[:, 2] = 0
            layer.W[[5, 6]] = 0
            layer.W[6, 5] = 0.4
    return layer


def assert_same(small, layer):
    x = torch.randn(9, D, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("gamma", [0.05, 0.9])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_compacted_layer_gives_the_same(recurrence, activation, gamma, dtype, tolerance):
    layer = dead_layer(dtype, recurrence=recurrence, activation=activation, gamma=gamma)
    small = compact(layer)
    assert small.state_dim == small.A.shape[0] == 4 and small.compacted_from == 10
    assert type(small) is LionLayer and small.b.shape == (4,) and small.V.shape == (D, 4)
    x = torch.randn(3, 7, D, dtype=dtype)
    out = layer(x)
    assert (small(x) - out).abs().max() <= tolerance * out.abs().max()
    live = torch.tensor([0, 3, 7, 8])
    Wh = layer.recurrence_matrix()[live][:, live]
    torch.testing.assert_close(small.recurrence_matrix(), Wh, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.linalg.matrix_norm(small.recurrence_matrix(), 2) <= gamma
    # The gradient of the tokens is the same too: it flows through live units only.
    grads = []
    for each in (layer, small):
        x_ = x.clone().requires_grad_()
        each(x_).sin().sum().backward()
        grads.append(x_.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=20 * tolerance)


def test_the_bound_that_is_at_work_is_kept_where_dead_units_carried_it():
    """The dropped unit's row is all of the norm: without it the bound of the rest would let go."""
    layer = LionLayer(D, 6, dtype=torch.float64, gamma=0.5, **EXACT)
    with torch.no_grad():
        layer.W[2] *= 50
        layer.W[:, 2] = 0
        layer.V[:, 2] = 0
        layer.V.mul_(30)
    small = compact(layer)
    kept = [0, 1, 3, 4, 5]
    assert small.state_dim == 5 and (small.W.abs() < 0.2 * layer.W[kept][:, kept].abs()).all()
    assert_same(small, layer)


@pytest.mark.parametrize("dead, others, recurrence", [(0.03, 0.3, "tied"), (50.0, 0.5, "free")])
def test_a_tied_layer_becomes_free_only_where_its_scale_would_change(dead, others, recurrence):
    layer = loud(LionLayer(D, 6, recurrence="tied", dtype=torch.float64, gamma=0.9, **EXACT))
    with torch.no_grad():
        layer.V.mul_(0.3)
        layer.V[:, 2] = 0
        layer.A.mul_(others)
        layer.A[2] *= dead / others
    small = compact(layer)
    assert small.recurrence == recurrence
    assert_same(small, layer)


def test_links_between_dead_units_do_not_keep_them():
    layer = loud(LionLayer(D, 6, dtype=torch.float64, **EXACT))
    with torch.no_grad():
        # 1 and 2 feed each other and themselves, and reach no output; 4 and 5 feed each other constants.
        layer.V[:, [1, 2]] = 0
        layer.W[:, [1, 2]] = 0
        layer.W[[1, 1, 2, 2], [1, 2, 1, 2]] = 0.3
        layer.A[[4, 5]] = 0
        layer.W[[4, 5]] = 0
        layer.W[[4, 5], [5, 4]] = torch.tensor([0.4, -0.5], dtype=torch.float64)
        layer.b[[4, 5]] = 1.0
    small = compact(layer)
    assert small.state_dim == 2
    assert_same(small, layer)


def test_edge_cases_of_compaction():
    layer = loud(LionLayer(D, 4))
    same = compact(layer)
    assert same.state_dim == 4 and same.compacted_from is None and same is not layer
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), layer.parameters(), strict=True))

    nn.init.zeros_(layer.V)
    none = compact(layer)
    x = torch.randn(5, D)
    assert none.state_dim == 1 and torch.equal(none(x), layer(x))

    one_step = loud(LionLayer(D, 4, max_iter=1, dtype=torch.float64))
    one_step.A.data[2] = 0
    one_step.W.data[2] = 0
    assert compact(one_step).state_dim == 4  # nothing has come through W after one application
    one_step.W.data[:, 2] = 0
    small = compact(one_step)
    assert small.state_dim == 3
    assert_same(small, one_step)

    slow = loud(LionLayer(D, 4, gamma=0.9999))
    slow.A.data[1], slow.b.data[1] = 0, 1
    slow.W.data.zero_()[1, 1] = 1
    assert compact(slow).state_dim == 4  # a constant that does not come to rest in time stays

    frozen = loud(LionLayer(D, 4)).requires_grad_(False).eval()
    rng = torch.get_rng_state()
    frozen.V[:, 1] = 0
    frozen.W[:, 1] = 0
    small = compact(frozen)
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_unit_pruning_compacts_and_element_masks_are_cut_to_size():
    model = loud(TwoEnds(**EXACT)).double()
    prune_once(model, 0.5, granularity="unit")
    x = torch.randn(6, D, dtype=torch.float64)
    out = model(x)
    changed = compact_model(model)
    assert changed.keys() == {"input_end", "output_end"} and sum(new for _, new in changed.values()) == R
    assert not model.input_end.masks() and not model.output_end.masks()
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-12)

    layer = dead_layer()
    prune_once(layer, 0.2)
    small = compact(layer)
    assert 0 < small.state_dim < 10 and small.masks()
    assert_same(small, layer)
    for name, mask in small.masks().items():
        assert torch.equal(getattr(small, name) != 0, mask)


def test_what_cannot_be_compacted_is_refused():
    with pytest.raises(OptionError, match="only a LionLayer"):
        compact(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="compact"):
        compact_model(LionLayer(32, 16))
