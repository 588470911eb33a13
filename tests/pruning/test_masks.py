"""Which entries a mask keeps, and what a layer does with its masks."""

import copy
import io
import pickle

import pytest
import torch
from pruning_helpers import D, R, TwoEnds, backward, loud, matrices_of, robust
from torch import nn
from torch.nn.utils import prune

from lion_fast import LionLayer, reference
from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import OptionError
from lion_fast.pruning import RobustPruner, compact, kept_shares, prune_once
from lion_fast.pruning.masks import count_kept, find_matrices, select


def scored(layer):
    """Its matrices, and random scores of them."""
    matrices = find_matrices({"": layer})
    return matrices, {m.full_name: torch.rand(m.parameter.shape) for m in matrices}


# -- which entries


@pytest.mark.parametrize(
    "keep, total, kept", [(0.5, 5, 3), (0.1, 30, 3), (0.7, 10, 7), (1.0, 7, 7), (1e-9, 7, 1)]
)
def test_the_kept_count_is_the_ceiling(keep, total, kept):
    assert count_kept(keep, total) == kept


@pytest.mark.parametrize("scope", ["global", "layer", "matrix"])
def test_the_scope_of_the_ranking(scope):
    """A matrix of small weights loses almost everything to those it is ranked with."""
    model = loud(TwoEnds())
    model.input_end.V.data.mul_(1e-4)
    prune_once(model, 0.5, scope=scope)
    kept, sizes = {}, {}
    for name, p in matrices_of(model).items():
        group = {"global": "", "layer": name.split(".")[0], "matrix": name}[scope]
        kept[group] = kept.get(group, 0) + int((p != 0).sum())
        sizes[group] = sizes.get(group, 0) + p.numel()
    assert len(sizes) == {"global": 1, "layer": 2, "matrix": 6}[scope]
    assert kept == {group: size // 2 for group, size in sizes.items()}
    assert (model.input_end.V_mask.float().mean() < 0.01) == (scope != "matrix")


def test_regrowth_takes_the_largest_gradients_and_keeps_the_count():
    matrices, scores = scored(loud(LionLayer(D, R)))
    growth = {name: torch.rand_like(score) for name, score in scores.items()}
    masks = select(matrices, scores, 0.5, growth=growth, regrow=0.25)
    score, grow, mask = (
        torch.cat([t[m.full_name].flatten() for m in matrices]) for t in (scores, growth, masks)
    )
    total = score.numel()
    best = score >= score.sort(descending=True).values[total // 2 - total // 8 - 1]
    assert mask.sum() == total // 2 and (best & ~mask).sum() == 0
    regrown = mask & ~best
    assert regrown.sum() == total // 8 and grow[regrown].min() > grow[~mask].max()


def test_units_keep_rows_and_columns_together():
    model = loud(TwoEnds())
    prune_once(model, 0.5, granularity="unit")
    total = 0
    for end in (model.input_end, model.output_end):
        units = end.A_mask.any(1)
        total += int(units.sum())
        assert torch.equal(end.A_mask, units[:, None].expand(R, end.dim))
        assert torch.equal(end.V_mask, units[None].expand(end.dim, R))
        assert torch.equal(end.W_mask, units[:, None] & units[None])
    assert total == R


def test_units_are_ranked_by_the_mean_of_what_belongs_to_them():
    matrices, scores = scored(LionLayer(D, R))
    masks = select(matrices, scores, 3 / 8, "unit")
    means = []
    for j in range(R):
        own = {k: torch.zeros_like(s, dtype=torch.bool) for k, s in scores.items()}
        own["A"][j], own["W"][j], own["W"][:, j], own["V"][:, j] = True, True, True, True
        means.append(torch.cat([scores[k][m] for k, m in own.items()]).mean())
    best = torch.stack(means).topk(3).indices.sort().values
    assert torch.equal(masks["A"].any(1).nonzero().squeeze(1), best)


@pytest.mark.parametrize("block", [16, 32])
def test_blocks_are_whole_with_ragged_edges(block):
    matrices, scores = scored(LionLayer(72, 40))
    masks = select(matrices, scores, 0.4, "block", block)
    means, kept = [], []
    for name, mask in masks.items():
        for i in range(0, mask.shape[0], block):
            for j in range(0, mask.shape[1], block):
                part = mask[i : i + block, j : j + block]
                assert part.all() or not part.any()
                means.append(scores[name][i : i + block, j : j + block].mean())
                kept.append(bool(part.all()))
    means, kept = torch.stack(means), torch.tensor(kept)
    assert kept.sum() == count_kept(0.4, len(kept)) and means[kept].min() > means[~kept].max()


# -- masks on the layer


def test_masking_raises_the_norm_and_the_bound_holds_all_the_same():
    layer = LionLayer(4, 2, gamma=0.8)
    W = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    layer.W.data.copy_(0.79 * W)
    assert torch.equal(layer.recurrence_matrix(), layer.W)
    layer.set_mask("W", torch.tensor([[True, True], [True, False]]))
    assert torch.linalg.matrix_norm(layer.W, 2) > 0.9
    assert torch.linalg.matrix_norm(layer.recurrence_matrix(), 2) <= 0.8


@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_masks_reach_every_use_of_a_matrix(recurrence):
    layer = loud(LionLayer(D, R, recurrence=recurrence, dtype=torch.float64))
    dense = copy.deepcopy(layer)
    prune_once(layer, 0.4)
    for name, mask in layer.masks().items():
        getattr(dense, name).data.mul_(mask)
        # An optimiser that knows nothing of masks moves the parameter; the layer does not see it.
        getattr(layer, name).data.add_(7.0 * ~mask)
    x = torch.randn(5, D, dtype=torch.float64)
    out = layer(x)
    assert torch.equal(out, dense(x))
    out.square().sum().backward()
    dense(x).square().sum().backward()
    for name, mask in layer.masks().items():
        grad = getattr(layer, name).grad
        assert (grad[~mask] == 0).all()
        torch.testing.assert_close(grad[mask], getattr(dense, name).grad[mask], rtol=1e-12, atol=1e-12)
    plain = reference.LionLayer(D, R, recurrence=recurrence, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x), out, rtol=1e-6, atol=1e-6)


def test_masks_survive_copies_pickles_state_dicts_and_moves():
    layer = loud(LionLayer(D, R))
    assert not any("mask" in key for key in layer.state_dict())
    prune_once(layer, 0.4)
    x = torch.randn(5, D)
    empty = LionLayer(D, R)
    empty.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    nested = nn.Sequential(LionLayer(D, R))
    nested.load_state_dict({f"0.{k}": v for k, v in torch.load(file, weights_only=True).items()})
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty, nested[0]):
        assert torch.equal(other(x), layer(x))
        assert all(torch.equal(mask, layer.masks()[name]) for name, mask in other.masks().items())
        assert len(other.masks()) == 3
    assert all(mask.dtype == torch.bool for mask in copy.deepcopy(layer).double().masks().values())
    with pytest.raises(RuntimeError, match="A_mask"):
        layer.load_state_dict(LionLayer(D, R).state_dict())
    for name in "AWV":
        layer.set_mask(name, None)
    layer.load_state_dict(LionLayer(D, R).state_dict())


def test_a_masked_layer_compiles_to_the_same():
    layer = loud(LionLayer(D, R))
    prune_once(layer, 0.4)
    x = torch.randn(5, D, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_fresh_optimiser_leaves_pruned_entries_at_zero():
    layer = loud(LionLayer(D, R))
    prune_once(layer, 0.3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        backward(layer, step)
        optimizer.step()
    assert all((getattr(layer, name)[~mask] == 0).all() for name, mask in layer.masks().items())


def test_the_pixel_end_of_a_cnn_is_pruned_by_entries():
    end = loud(PixelEnd(3, channels=4, gamma=0.5))
    optimizer = torch.optim.AdamW(end.parameters(), lr=1e-2)
    pruner = robust(end, optimizer, keep=0.3, total_steps=6, warmup=1, freeze=4)
    for step in range(6):
        end.zero_grad()
        torch.manual_seed(step)
        end(torch.randn(2, 3, 8, 8)).square().mean().backward()
        pruner.step()
        assert conv_norm_bound(end.recurrence_kernel(8, 8), 8, 8) <= 0.5 * (1 + 1e-3)
    assert pruner.report()["kept_share"] == pytest.approx(0.3, abs=0.01)
    dense = PixelEnd(3, channels=4, gamma=0.5)
    dense.load_state_dict({k: v for k, v in end.state_dict().items() if "mask" not in k})
    for name, mask in end.masks().items():
        getattr(end, name).data.add_(3.0 * ~mask)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(end(x), dense(x))
    with pytest.raises(OptionError, match="PixelEnd, which takes 'element' only"):
        prune_once(dense, 0.5, granularity="unit")


def test_masks_that_do_not_fit_are_refused():
    layer = LionLayer(32, 16)
    with pytest.raises(OptionError, match="boolean of shape"):
        layer.set_mask("A", torch.ones(3, 3))
    with pytest.raises(OptionError, match="'b' has no mask"):
        layer.set_mask("b", None)


@pytest.mark.parametrize("make", [LionLayer, StateLayer, PixelEnd])
def test_torch_prune_works_on_a_layer_and_ours_says_what_to_do(make):
    layer = loud(make(3, 4))
    x = torch.randn(2, 3, 5, 5) if make is PixelEnd else torch.randn(2, 3)
    held = [(layer, name) for name in layer.matrices]
    prune.global_unstructured(held, pruning_method=prune.L1Unstructured, amount=0.5)
    out, sizes = layer(x), [getattr(layer, name).numel() for name in layer.matrices]
    out.sum().backward()
    kept = sum(int((getattr(layer, name) != 0).sum()) for name in layer.matrices)
    assert kept == sum(sizes) - round(0.5 * sum(sizes))
    for call in (prune_once, kept_shares, compact if make is LionLayer else prune_once):
        with pytest.raises(OptionError, match="torch.nn.utils.prune"):
            call(layer, *([0.5] if call is prune_once else []))
    with pytest.raises(OptionError, match="torch.nn.utils.prune"):
        RobustPruner(layer, torch.optim.SGD(layer.parameters(), 0.1), keep=0.5, total_steps=10)
    for _, name in held:
        prune.remove(layer, name)
    assert torch.equal(layer(x), out)
    prune_once(layer, 0.25)
    assert set(layer.masks()) == set(layer.matrices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("granularity", ["element", "unit", "2:4"])
def test_what_is_not_finite_has_no_place_in_a_ranking(granularity, bad):
    layer = loud(LionLayer(8, 4))
    pruner = RobustPruner(
        layer, torch.optim.SGD(layer.parameters(), 0.1), keep=0.5, total_steps=4, granularity=granularity
    )
    layer(torch.randn(3, 8)).sum().backward()
    layer.A.grad[0, 0] = bad
    with pytest.raises(OptionError, match="A or its gradient"):
        prune_once(layer, 0.5, criterion="saliency", granularity=granularity)
    with torch.no_grad():
        layer.A[0, 0] = bad
    with pytest.raises(OptionError, match="A or its gradient"):
        prune_once(layer, 0.5, granularity=granularity)
    layer.A.grad.zero_()
    with pytest.raises(OptionError, match="A or its gradient"):
        pruner.step()
    with pytest.raises(OptionError, match="weights A hold"):
        compact(layer)
    assert not layer.masks()


@pytest.mark.parametrize("mask", [[True], torch.ones(4, 8), torch.ones(8, 4, dtype=torch.bool), "all"])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(OptionError, match="boolean of shape"):
        LionLayer(8, 4).set_mask("A", mask)


def test_seeds_that_torch_does_not_take_are_refused():
    for seed in (2**64, "a", 1.5, None):
        with pytest.raises(OptionError, match="seed"):
            prune_once(LionLayer(8, 4), 0.5, criterion="random", seed=seed)
