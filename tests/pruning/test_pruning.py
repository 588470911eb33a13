"""Robust training and its traps, masks, baselines, compaction; packing is in test_packing.py."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_fast import LionLayer, pruning, reference
from lion_fast.errors import CheckpointError, OptionError
from lion_fast.pruning import RobustPruner, compact, compact_model, iterative_magnitude, prune_once
from lion_fast.pruning.masks import count_kept, find_layers, find_matrices, select

D, R = 12, 8


class TwoEnds(nn.Module):
    """Two ends of different widths around a frozen map, and a head."""

    def __init__(self, state_dim=R, **options):
        super().__init__()
        self.input_end = LionLayer(D, state_dim, **options)
        self.body = nn.Linear(D, 2 * D).requires_grad_(False)
        self.output_end = LionLayer(2 * D, state_dim, **options)
        self.head = nn.Linear(2 * D, 3)

    def forward(self, x):
        return self.head(self.output_end(self.body(self.input_end(x))))


def loud(module):
    """Weights large enough that every end matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad and not name.startswith("head"):
                p.copy_(0.3 * torch.randn_like(p))
    return module


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, D, generator=generator), torch.randint(3, (16,), generator=generator)
    for p in model.parameters():
        p.grad = None
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def matrices_of(model):
    return {m.full_name: m.parameter for m in find_matrices(find_layers(model))}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


# -- the update


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_critical_entries_get_the_optimisers_update_and_others_only_shrink(name):
    model = loud(TwoEnds())
    plain = copy.deepcopy(model)
    optimizer, twin = OPTIMIZERS[name](trained(model)), OPTIMIZERS[name](trained(plain))
    pruner = RobustPruner(
        model, optimizer, keep=0.5, total_steps=20, warmup=3, refresh=100, freeze=20, decay=0.7
    )
    expected = {}
    for step in range(9):
        backward(model, step)
        # Elementwise optimisers: the same gradients give critical entries the same bits in both.
        for p, q in zip(trained(model), trained(plain), strict=True):
            q.grad = p.grad.clone()
        state = {p: copy.deepcopy(optimizer.state.get(p)) for p in matrices_of(model).values()}
        grads = {k: p.grad.clone() for k, p in matrices_of(model).items()}
        before = {k: p.detach().clone() for k, p in matrices_of(model).items()}
        pruner.step()
        twin.step()
        lr = optimizer.param_groups[0]["lr"]
        assert bool(pruner.masks) == (step >= 3)
        for key, p in matrices_of(model).items():
            q = matrices_of(plain)[key]
            mask = pruner.masks.get(key, torch.ones_like(p, dtype=torch.bool))
            assert torch.equal(p[mask], q[mask])
            assert torch.equal(p.grad, grads[key])
            if step >= 3:
                w = expected.setdefault(key, before[key])
                w = w.sign() * (w.abs() - lr * 0.7).clamp_min(0)
                expected[key] = w
                assert torch.equal(p[~mask], w[~mask])
                for slot, value in optimizer.state[p].items():
                    if torch.is_tensor(value) and value.shape == p.shape:
                        assert torch.equal(value[~mask], state[p][slot][~mask]), slot
                        assert not torch.equal(value[mask], state[p][slot][mask])
        assert torch.equal(model.head.weight, plain.head.weight)
        assert torch.equal(model.input_end.b, plain.input_end.b)


def test_gradients_scaled_by_keep():
    model = loud(TwoEnds())
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    pruner = RobustPruner(model, optimizer, keep=0.25, total_steps=9, warmup=0, freeze=9, scale_gradient=True)
    backward(model, 0)
    before = {k: p.detach().clone() for k, p in matrices_of(model).items()}
    bias = model.input_end.b.detach().clone()
    pruner.step()
    for key, p in matrices_of(model).items():
        mask = pruner.masks[key]
        torch.testing.assert_close(p[mask], (before[key] - 0.1 * 0.25 * p.grad)[mask])
    torch.testing.assert_close(model.input_end.b, bias - 0.1 * model.input_end.b.grad)


def test_the_learning_rate_of_a_group_and_of_now_scales_the_shrinking():
    model = loud(TwoEnds())
    optimizer = torch.optim.SGD(
        [{"params": model.input_end.parameters(), "lr": 0.1}, {"params": model.output_end.parameters()}],
        lr=0.2,
    )
    pruner = RobustPruner(
        model, optimizer, keep=0.5, total_steps=9, warmup=0, refresh=50, freeze=9, decay=0.5
    )
    for step, factor in enumerate((1.0, 0.3)):
        for group, lr in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = lr * factor
        backward(model, step)
        before = {k: p.detach().clone() for k, p in matrices_of(model).items()}
        pruner.step()
        for key, p in matrices_of(model).items():
            off = ~pruner.masks[key]
            lr = (0.1 if key.startswith("input") else 0.2) * factor
            w = before[key][off]
            torch.testing.assert_close(p[off], w.sign() * (w.abs() - 0.5 * lr).clamp_min(0))


def test_a_shrinking_entry_stops_at_zero_and_does_not_change_sign():
    layer = loud(LionLayer(D, R))
    sign = layer.A.detach().sign()
    pruner = RobustPruner(
        layer, torch.optim.SGD(layer.parameters(), lr=0.1), keep=0.5, total_steps=60, warmup=0, refresh=90,
        freeze=60, decay=0.31,
    )  # fmt: skip
    for _ in range(60):
        layer.zero_grad()
        layer(torch.randn(4, D)).square().sum().backward()
        pruner.step()
    off = ~pruner.masks["A"]
    assert (layer.A[off] == 0).all() and not torch.signbit(layer.A[off]).any()
    assert pruner.report()["matrices"]["A"]["decayed"] == 1
    assert (layer.A[~off].sign() == sign[~off]).any()


def test_too_small_a_decay_is_seen_in_the_report():
    """Lambda near 1e-2 or more: with 1e-4 nothing decays in time, and the hard cut is a jump."""
    reports = {}
    for decay in (1e-4, 1.0):
        torch.manual_seed(0)
        layer = loud(LionLayer(D, R))
        pruner = RobustPruner(
            layer, torch.optim.SGD(layer.parameters(), lr=0.01), keep=0.5, total_steps=100, warmup=10,
            freeze=100, refresh=200, decay=decay,
        )  # fmt: skip
        for step in range(100):
            torch.manual_seed(step)
            layer.zero_grad()
            layer(torch.randn(4, D)).square().mean().backward()
            pruner.step()
        reports[decay] = pruner.report()["matrices"]["A"]
    assert reports[1e-4]["decayed"] < 0.02 and reports[1e-4]["largest_off_mask"] > 0.2
    assert reports[1.0]["decayed"] > 0.98 and reports[1.0]["largest_off_mask"] < 0.1


# -- scores and masks


def test_scores_are_running_means_of_saliency_and_masks_the_global_best():
    model = loud(TwoEnds())
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    pruner = RobustPruner(model, optimizer, keep=0.3, total_steps=12, warmup=4, refresh=4, freeze=12, ema=4)
    mean = {k: torch.zeros_like(p) for k, p in matrices_of(model).items()}
    for step in range(10):
        backward(model, step)
        for key, p in matrices_of(model).items():
            mean[key] = 0.75 * mean[key] + 0.25 * (p * p.grad).abs().detach()
        pruner.step()
        if step in (4, 8):
            assert pruner.refreshes == step // 4
            everything = torch.cat([m.flatten() for m in mean.values()])
            count = -(-3 * everything.numel() // 10)
            threshold = everything.sort(descending=True).values[count - 1]
            for key, mask in pruner.masks.items():
                assert torch.equal(mask, mean[key] >= threshold)
            assert sum(int(m.sum()) for m in pruner.masks.values()) == count
    assert set(pruner.masks) == {f"{end}_end.{name}" for end in ("input", "output") for name in "AWV"}


def test_the_ratio_is_global_and_the_report_shows_an_end_that_loses_almost_everything():
    model = TwoEnds()
    with torch.no_grad():
        for p in model.input_end.parameters():
            p.mul_(1e-3)
    prune_once(model, 0.5)
    report = {name: int(mask.sum()) / mask.numel() for name, mask in model.input_end.masks().items()}
    assert max(report["A"], report["W"]) < 0.01
    model = loud(TwoEnds())
    model.input_end.V.data.mul_(1e-4)
    pruner = RobustPruner(model, torch.optim.SGD(trained(model), lr=0.01), keep=0.5, total_steps=4, warmup=2)
    for step in range(3):
        backward(model, step)
        pruner.step()
    shares = {k: m["share"] for k, m in pruner.report()["matrices"].items()}
    assert shares["input_end.A"] < 0.1 < 0.5 < shares["output_end.A"]
    for scope, names in (("layer", 2), ("matrix", 6)):
        model = loud(TwoEnds())
        model.input_end.V.data.mul_(1e-4)
        prune_once(model, 0.5, scope=scope)
        kept = {k: int((p != 0).sum()) for k, p in matrices_of(model).items()}
        sizes = {k: p.numel() for k, p in matrices_of(model).items()}
        groups = {} if names == 2 else {k: [k] for k in kept}
        for key in kept:
            groups.setdefault(key.split(".")[0] if names == 2 else key, []).append(key)
        for group in groups.values():
            assert sum(kept[k] for k in group) == sum(sizes[k] for k in group) // 2


@pytest.mark.parametrize(
    "keep, total, kept", [(0.5, 5, 3), (0.1, 30, 3), (0.7, 10, 7), (1.0, 7, 7), (1e-9, 7, 1)]
)
def test_the_kept_count_is_the_ceiling(keep, total, kept):
    assert count_kept(keep, total) == kept


def test_zero_is_absorbing_without_regrowth():
    """|w dL/dw| of w = 0 is 0: the mask never takes it back while anything else scores."""
    for regrow in (0.0, 0.2):
        torch.manual_seed(1)
        model = loud(TwoEnds())
        model.input_end.A.data[:3] = 0
        pruner = RobustPruner(
            model, torch.optim.Adam(trained(model), lr=1e-2), keep=0.5, total_steps=40, warmup=2, refresh=4,
            freeze=36, decay=1.0, regrow=regrow,
        )  # fmt: skip
        # Zero from before the masks exist; held there, as the dense steps would move it.
        for step in range(40):
            backward(model, step)
            if step < 2:
                model.input_end.A.grad[:3] = 0
            pruner.step()
        kept = int(pruner.masks["input_end.A"][:3].sum())
        if regrow:
            assert kept > 0 and (model.input_end.A[:3] != 0).any()
        else:
            assert kept == 0 and (model.input_end.A[:3] == 0).all()


def test_regrowth_takes_the_largest_gradients_and_keeps_the_count():
    layers = {"": loud(LionLayer(D, R))}
    matrices = find_matrices(layers)
    scores = {m.full_name: torch.rand(m.parameter.shape) for m in matrices}
    growth = {m.full_name: torch.rand(m.parameter.shape) for m in matrices}
    masks = select(matrices, scores, 0.5, growth=growth, regrow=0.25)
    score, grow, mask = (
        torch.cat([t[m.full_name].flatten() for m in matrices]) for t in (scores, growth, masks)
    )
    total = score.numel()
    best = score >= score.sort(descending=True).values[total // 2 - total // 8 - 1]
    assert mask.sum() == total // 2 and (best & ~mask).sum() == 0
    regrown = mask & ~best
    assert regrown.sum() == total // 8 and grow[regrown].min() > grow[~mask].max()


def test_a_zero_read_out_makes_the_first_mask_arbitrary_and_says_so():
    layer = LionLayer(D, R)
    nn.init.zeros_(layer.V)
    pruner = RobustPruner(
        layer, torch.optim.SGD(layer.parameters(), lr=0.1), keep=0.5, total_steps=4, warmup=0
    )
    layer(torch.randn(4, D)).square().sum().backward()
    with pytest.warns(UserWarning, match="A, W, V scores above zero|A, W.*arbitrary.*V zero"):
        pruner.step()


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
    layer = LionLayer(D, R)
    matrices = find_matrices({"": layer})
    scores = {m.full_name: torch.rand(m.parameter.shape) for m in matrices}
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
    layer = LionLayer(72, 40)
    matrices = find_matrices({"": layer})
    scores = {m.full_name: torch.rand(m.parameter.shape) for m in matrices}
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


def test_two_of_four():
    layer = LionLayer(12, 8)
    prune_once(layer, 0.5, granularity="2:4")
    for name, mask in layer.masks().items():
        groups = mask.reshape(-1, 4)
        assert (groups.sum(1) == 2).all(), name
    score = torch.randn(16, 12).abs()
    matrices = find_matrices({"": layer})
    scores = {m.full_name: torch.rand(m.parameter.shape) for m in matrices}
    mask = select(matrices, scores, 0.5, "2:4")["A"].reshape(-1, 4)
    score = scores["A"].reshape(-1, 4)
    assert (score.masked_fill(~mask, 2).min(1).values >= score.masked_fill(mask, -1).max(1).values).all()


@pytest.mark.parametrize("granularity", ["element", "unit", "block", "2:4"])
@pytest.mark.parametrize("criterion", ["saliency", "magnitude", "random"])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_every_granularity_and_criterion_trains(granularity, criterion, recurrence):
    layer = loud(LionLayer(32, 16, recurrence=recurrence))
    pruner = RobustPruner(
        layer, torch.optim.AdamW(layer.parameters(), lr=1e-2), keep=0.5, total_steps=12,
        granularity=granularity, criterion=criterion, block=16, warmup=2, refresh=3, freeze=8, decay=1.0,
    )  # fmt: skip
    for step in range(12):
        layer.zero_grad()
        torch.manual_seed(step)
        layer(torch.randn(8, 32)).square().mean().backward()
        pruner.step()
    report = pruner.finalize()
    assert report["phase"] == "hard" and report["refreshes"] == 2
    for name, mask in layer.masks().items():
        assert (getattr(layer, name)[~mask] == 0).all()
        if granularity != "2:4":
            assert report["matrices"][name]["share"] == mask.float().mean()
    if granularity != "unit":
        # W of 16 x 16 is one block; a unit takes a quarter of W along.
        assert abs(report["kept_share"] - 0.5) < 0.15


# -- contraction


def test_masking_raises_the_norm_and_the_bound_holds_all_the_same():
    layer = LionLayer(4, 2, gamma=0.8)
    W = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    layer.W.data.copy_(0.79 * W)
    assert torch.equal(layer.recurrence_matrix(), layer.W)
    layer.set_mask("W", torch.tensor([[True, True], [True, False]]))
    assert torch.linalg.matrix_norm(layer.W, 2) > 0.9
    assert torch.linalg.matrix_norm(layer.recurrence_matrix(), 2) <= 0.8


@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_the_bound_holds_at_every_step_of_a_training_with_mask_changes(recurrence):
    model = loud(TwoEnds(recurrence=recurrence, gamma=0.7))
    with torch.no_grad():
        for end in (model.input_end, model.output_end):
            (end.A if recurrence == "tied" else end.W).mul_(5)
    pruner = RobustPruner(
        model, torch.optim.SGD(trained(model), lr=0.01), keep=0.4, total_steps=20, warmup=2, refresh=2,
        freeze=16, decay=1.0,
    )  # fmt: skip
    seen = []
    for step in range(20):
        backward(model, step)
        pruner.step()
        for end in (model.input_end, model.output_end):
            Wh = end.recurrence_matrix()
            assert torch.linalg.matrix_norm(Wh, 2) <= 0.7
            if pruner.phase == "hard" and recurrence == "free" and step > 16:
                assert (Wh[~end.W_mask] == 0).all()
        seen.append(torch.cat([m.flatten() for m in pruner.masks.values()]) if pruner.masks else None)
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


# -- schedule, resume, report


def test_phases_refreshes_and_the_hard_cut():
    model = loud(TwoEnds())
    pruner = RobustPruner(
        model, torch.optim.Adam(trained(model), lr=1e-2), keep=0.5, total_steps=20, warmup=0.2, refresh=3,
        freeze=0.6, hard=16, decay=0.1,
    )  # fmt: skip
    phases, masks = [], []
    for step in range(20):
        phases.append(pruner.phase)
        backward(model, step)
        pruner.step()
        masks.append({k: m.clone() for k, m in pruner.masks.items()})
        zeros = [
            bool((p[~pruner.masks[k]] == 0).all()) if pruner.masks else False
            for k, p in matrices_of(model).items()
        ]
        assert all(zeros) == (step >= 16)
        assert bool(model.input_end.masks()) == (step >= 16)
    assert phases == ["dense"] * 4 + ["robust"] * 8 + ["frozen"] * 4 + ["hard"] * 4
    assert pruner.refreshes == 3
    last = masks[11]
    for later in masks[12:]:
        assert all(torch.equal(later[k], last[k]) for k in last)
    report = pruner.finalize()
    assert report["kept_share"] == pytest.approx(0.5, abs=1e-3)
    parameters = report["parameters"]
    dense = sum(p.numel() for end in (model.input_end, model.output_end) for p in end.parameters())
    dropped = sum(m["total"] - m["kept"] for m in report["matrices"].values())
    head = sum(p.numel() for p in model.head.parameters())
    assert parameters == {"dense": dense, "kept": dense - dropped, "kept_with_head": dense - dropped + head}
    assert json.loads(json.dumps(report)) == report


def test_counts_before_the_hard_cut_go_by_the_mask():
    model = loud(TwoEnds())
    pruner = RobustPruner(
        model, torch.optim.SGD(trained(model), lr=0.1), keep=0.5, total_steps=9, warmup=0, freeze=9
    )
    backward(model, 0)
    pruner.step()
    early = pruner.report()["parameters"]
    assert early == pruner.finalize()["parameters"] and early["kept"] < early["dense"]


def test_finalize_before_the_first_mask_cuts_by_the_scores_so_far():
    model = loud(TwoEnds())
    pruner = RobustPruner(model, torch.optim.SGD(trained(model), lr=0.1), keep=0.5, total_steps=9, warmup=5)
    backward(model, 0)
    pruner.step()
    assert pruner.finalize()["kept_share"] == pytest.approx(0.5, abs=1e-3)
    assert pruner.finalize() == pruner.finalize()


@pytest.mark.parametrize("stop", [2, 6, 11, 17])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_gives_the_same_bits_in_every_phase(stop, optimizer):
    options = dict(keep=0.4, total_steps=20, warmup=4, refresh=3, freeze=10, hard=14, decay=0.5, regrow=0.1)

    def run(model, pruner, start, end):
        for step in range(start, end):
            backward(model, step)
            pruner.step()

    model = loud(TwoEnds())
    first = copy.deepcopy(model)
    whole = RobustPruner(model, OPTIMIZERS[optimizer](trained(model)), **options)
    run(model, whole, 0, 20)
    half = RobustPruner(first, OPTIMIZERS[optimizer](trained(first)), **options)
    run(first, half, 0, stop)
    file = io.BytesIO()
    torch.save((first.state_dict(), half.optimizer.state_dict(), half.state_dict()), file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    run(first, half, stop, 20)  # what is saved is a copy

    second = TwoEnds()
    resumed = RobustPruner(second, OPTIMIZERS[optimizer](trained(second)), **options)
    second.load_state_dict(weights)
    resumed.optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    run(second, resumed, stop, 20)
    for other in (first, second):
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert whole.finalize() == resumed.finalize()


def test_a_state_of_another_pruner_is_refused():
    model = TwoEnds()
    make = lambda model, **o: RobustPruner(  # noqa: E731
        model, torch.optim.SGD(trained(model), lr=0.1), **{"keep": 0.5, "total_steps": 9} | o
    )
    state = make(model).state_dict()
    with pytest.raises(CheckpointError, match="keep was 0.5, now 0.4"):
        make(model, keep=0.4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="do not fit"):
        make(TwoEnds(state_dim=4)).load_state_dict(state)


def test_an_overflow_of_mixed_precision_does_not_enter_the_scores():
    model = loud(TwoEnds())
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    pruner = RobustPruner(model, optimizer, keep=0.5, total_steps=9, warmup=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(model, 0)
    grads = {k: p.grad.clone() for k, p in matrices_of(model).items()}
    for p in trained(model):
        p.grad.mul_(1024.0)
    scaler.scale(torch.ones(()))
    before = {k: p.detach().clone() for k, p in matrices_of(model).items()}
    pruner.step(scaler)
    scaler.update()
    for key, score in pruner.state_dict()["scores"].items():
        torch.testing.assert_close(score, (before[key] * grads[key]).abs() / pruner.ema)
    backward(model, 1)
    for p in trained(model):
        p.grad.mul_(float("inf"))
    scores = pruner.state_dict()["scores"]
    weights = copy.deepcopy(model.state_dict())
    pruner.step(scaler)
    assert all(torch.equal(s, scores[k]) for k, s in pruner.state_dict()["scores"].items())
    assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items())


# -- masks on the layer


def test_masks_reach_every_use_of_a_matrix():
    for recurrence in ("free", "tied"):
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
    for _ in range(3):
        layer.zero_grad()
        layer(torch.randn(4, D)).square().sum().backward()
        optimizer.step()
    assert all((getattr(layer, name)[~mask] == 0).all() for name, mask in layer.masks().items())


def test_the_pixel_end_of_a_cnn_is_pruned_by_entries():
    from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound

    end = loud(PixelEnd(3, channels=4, gamma=0.5))
    pruner = RobustPruner(
        end, torch.optim.AdamW(end.parameters(), lr=1e-2), keep=0.3, total_steps=6, warmup=1, freeze=4
    )
    for step in range(6):
        end.zero_grad()
        torch.manual_seed(step)
        end(torch.randn(2, 3, 8, 8)).square().mean().backward()
        pruner.step()
        assert conv_norm_bound(end.recurrence_kernel(8, 8), 8, 8) <= 0.5 * (1 + 1e-3)
    assert pruner.report()["kept_share"] == pytest.approx(0.3, abs=0.01)
    dense = PixelEnd(3, channels=4, gamma=0.5)
    dense.load_state_dict({k: v for k, v in end.state_dict().items() if "mask" not in k})
    with torch.no_grad():
        for name, mask in end.masks().items():
            getattr(end, name).add_(3.0 * ~mask)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(end(x), dense(x))
    with pytest.raises(OptionError, match="PixelEnd, which takes 'element' only"):
        prune_once(dense, 0.5, granularity="unit")


# -- baselines


@pytest.mark.parametrize("criterion", ["magnitude", "random", "saliency"])
def test_one_shot(criterion):
    model = loud(TwoEnds())
    backward(model, 0)
    before = {k: p.detach().clone() for k, p in matrices_of(model).items()}
    grads = {k: p.grad.clone() for k, p in matrices_of(model).items()}
    prune_once(model, 0.3, criterion=criterion, seed=3)
    masks = {
        f"{end}_end.{k}": m
        for end in ("input", "output")
        for k, m in getattr(model, f"{end}_end").masks().items()
    }
    flat = torch.cat([m.flatten() for m in masks.values()])
    assert flat.sum() == count_kept(0.3, flat.numel())
    assert all(torch.equal(p, before[k] * masks[k]) for k, p in matrices_of(model).items())
    if criterion == "random":
        again, other = loud(TwoEnds()), loud(TwoEnds())
        prune_once(again, 0.3, criterion="random", seed=3)
        prune_once(other, 0.3, criterion="random", seed=4)
        assert torch.equal(again.input_end.A_mask, model.input_end.A_mask)
        assert not torch.equal(other.input_end.A_mask, model.input_end.A_mask)
        assert all(0.2 < m.float().mean() < 0.4 for m in masks.values())
    else:
        score = {k: b.abs() if criterion == "magnitude" else (b * grads[k]).abs() for k, b in before.items()}
        kept = torch.cat([score[k][m] for k, m in masks.items()])
        assert kept.min() >= torch.cat([score[k][~m] for k, m in masks.items()]).max()


def test_lottery_ticket_rewinds_and_nests():
    model = loud(TwoEnds())
    start = copy.deepcopy(model.state_dict())
    seen = []

    def train():
        seen.append({k: p.detach().clone() for k, p in matrices_of(model).items()})
        optimizer = torch.optim.AdamW(trained(model), lr=0.05)
        for step in range(3):
            backward(model, step)
            optimizer.step()

    iterative_magnitude(model, train, keep=0.2, rounds=3)
    assert len(seen) == 3
    total = sum(p.numel() for p in matrices_of(model).values())
    previous = None
    for k, weights in enumerate([*seen, {k: p.detach() for k, p in matrices_of(model).items()}]):
        alive = torch.cat([(w != 0).flatten() for w in weights.values()])
        assert alive.sum() == count_kept(0.2 ** (k / 3), total)
        assert previous is None or not (alive & ~previous).any()
        for name, w in weights.items():
            assert torch.equal(w, start[name] * (w != 0))
        previous = alive
    assert torch.equal(model.head.weight, start["head.weight"])
    assert torch.equal(model.input_end.b, start["input_end.b"])


def test_rewinding_to_an_early_step():
    model = loud(TwoEnds())
    early = copy.deepcopy(loud(TwoEnds()).state_dict())
    iterative_magnitude(model, lambda: None, keep=0.5, rounds=1, rewind_to=early)
    for name, p in matrices_of(model).items():
        assert torch.equal(p, early[name] * (p != 0)) and 0 < (p != 0).sum()
    with pytest.raises(OptionError, match="rewind_to lacks head"):
        iterative_magnitude(
            model, lambda: None, keep=0.5, rewind_to={k: v for k, v in early.items() if "head" not in k}
        )


# -- data parallelism


def _two_processes(rank: int, port: str, folder: str) -> None:
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for criterion in ("saliency", "random"):
        torch.manual_seed(0)
        model = loud(TwoEnds())
        net = DistributedDataParallel(model, broadcast_buffers=False)
        # The seed of a rank of its own: only the broadcast makes random masks agree.
        pruner = RobustPruner(
            model, torch.optim.AdamW(trained(model), lr=1e-2), keep=0.4, total_steps=10, warmup=2, refresh=2,
            freeze=7, decay=1.0, criterion=criterion, seed=rank,
        )  # fmt: skip
        history = []
        for step in range(10):
            net.zero_grad()
            torch.manual_seed(100 * step + rank)
            nn.functional.cross_entropy(net(torch.randn(8, D)), torch.randint(3, (8,))).backward()
            pruner.step()
            history.append({k: m.clone() for k, m in pruner.masks.items()})
        pruner.finalize()
        torch.save((history, model.state_dict()), f"{folder}/{criterion}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_same_masks(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code = "import sys, test_pruning as t; t._two_processes(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
    here = str(Path(__file__).parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, str(tmp_path)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": here + os.pathsep + os.environ.get("PYTHONPATH", ""),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for criterion in ("saliency", "random"):
        (history, weights), (other, others) = (
            torch.load(tmp_path / f"{criterion}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert len(history) == 10 and history[-1]
        for mine, theirs in zip(history, other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mask, theirs[k]) for k, mask in mine.items())
        assert all(torch.equal(w, others[k]) for k, w in weights.items())


# -- compaction

EXACT = {"tol": 0.0, "max_iter": 200, "backward": "exact"}


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
            layer.W[5] = 0
            layer.W[6] = 0
            layer.W[6, 5] = 0.4
    return layer


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
    x = torch.randn(9, D, dtype=torch.float64)
    small = compact(layer)
    assert (
        small.state_dim == 5
        and (small.W.abs() < 0.2 * layer.W[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]].abs()).all()
    )
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-12)


def test_a_tied_layer_becomes_free_only_where_its_scale_would_change():
    for boost, recurrence in ((0.1, "tied"), (50.0, "free")):
        layer = loud(LionLayer(D, 6, recurrence="tied", dtype=torch.float64, gamma=0.9, **EXACT))
        with torch.no_grad():
            layer.V.mul_(0.3)
            layer.V[:, 2] = 0
            layer.A[2] *= boost
            layer.A[[0, 1, 3, 4, 5]] *= 1.0 if boost < 1 else 0.5
            if boost < 1:
                layer.A.mul_(0.3)
        small = compact(layer)
        assert small.recurrence == recurrence
        x = torch.randn(9, D, dtype=torch.float64)
        torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-12)


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
    x = torch.randn(9, D, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-12)


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
    x = torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(small(x), one_step(x), rtol=0, atol=1e-12)

    dead_layer_ = loud(LionLayer(D, 4)).requires_grad_(False).eval()
    rng = torch.get_rng_state()
    dead_layer_.V[:, 1] = 0
    dead_layer_.W[:, 1] = 0
    small = compact(dead_layer_)
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
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-12)
    for name, mask in small.masks().items():
        assert torch.equal(getattr(small, name) != 0, mask)


# -- errors


def test_what_cannot_be_pruned_is_refused():
    def make(layer, **options):
        return RobustPruner(
            layer, torch.optim.SGD(layer.parameters(), lr=0.1), **{"keep": 0.5, "total_steps": 10} | options
        )

    layer = LionLayer(32, 16)
    wrong = {"granularity": "row", "criterion": "luck", "scope": "row", "warmup": 1.5, "refresh": 0}
    wrong |= {"decay": -1.0, "regrow": 1.0, "total_steps": 0}
    for options, message in (
        *(({name: value}, name) for name, value in wrong.items()),
        *(({"keep": value}, "keep") for value in (0, 1.5, True)),
        ({"granularity": "2:4", "keep": 0.4}, "keep must be 0.5"),
        ({"granularity": "block", "block": 8}, "block"),
        ({"granularity": "block", "block": 32}, r"32 x 32 do not fit A of shape \(16, 32\)"),
        ({"warmup": 9, "freeze": 5}, "phases"),
        ({"hard": 11}, "phases"),
        ({"regrow": 0.1, "criterion": "random"}, "regrow goes with"),
    ):
        with pytest.raises(OptionError, match=message):
            make(layer, **options)
    with pytest.raises(OptionError, match=r"multiple of 4 entries; A is \(4, 6\)"):
        make(LionLayer(6, 4), granularity="2:4")
    with pytest.raises(OptionError, match="no LionLayer to prune"):
        make(nn.Linear(3, 3))
    with pytest.raises(OptionError, match="Linear; only LionLayer"):
        pruning.RobustPruner(
            [nn.Linear(3, 3)], torch.optim.SGD(layer.parameters(), lr=0.1), keep=0.5, total_steps=10
        )
    with pytest.raises(OptionError, match="the optimizer does not have A"):
        RobustPruner(layer, torch.optim.SGD([layer.b], lr=0.1), keep=0.5, total_steps=10)
    layer.V.requires_grad_(False)
    with pytest.raises(OptionError, match="V is frozen"):
        make(layer)
    layer.V.requires_grad_()
    prune_once(layer, 0.5, granularity="unit")
    with pytest.raises(OptionError, match="pruned already"):
        make(layer)
    small = compact(layer)
    for prune in (make, lambda s: prune_once(s, 0.5)):
        with pytest.raises(OptionError, match="already compacted"):
            prune(small)
    with pytest.raises(OptionError, match="only a LionLayer can be compacted"):
        compact(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="compact"):
        compact_model(layer)
    with pytest.raises(OptionError, match="boolean of shape"):
        layer.set_mask("A", torch.ones(3, 3))
    with pytest.raises(OptionError, match="'b' has no mask"):
        layer.set_mask("b", None)
    with pytest.raises(OptionError, match="needs gradients"):
        prune_once(LionLayer(8, 4), 0.5, criterion="saliency")
    with pytest.raises(OptionError, match="rounds must be"):
        iterative_magnitude(LionLayer(8, 4), lambda: None, keep=0.5, rounds=0)


# -- storage


def quarter_of_blocks(layer):
    """W keeps 9 of its 36 blocks of 32; A and V keep all, so that no unit is dead."""
    blocks = torch.zeros(36, dtype=torch.bool)
    blocks[torch.randperm(36)[:9]] = True
    layer.set_mask("W", blocks.view(6, 6).repeat_interleave(32, 0).repeat_interleave(32, 1))


def test_storage_is_dense_without_a_measurement_and_says_why():
    assert pruning.measured_crossovers() == {}
    form = pruning.choose_storage(LionLayer(64, 128))
    assert form.name == "dense" and "bound by reading and writing the tokens" in form.reason
    wide = LionLayer(32, 192)
    assert pruning.choose_storage(wide) == ("dense", "the recurrence has no zeros", None)
    quarter_of_blocks(wide)
    form = pruning.choose_storage(wide)
    assert form.name == "dense" and "no measurement for this device (cpu)" in form.reason


def test_storage_follows_measured_crossovers():
    wide = LionLayer(32, 192)
    quarter_of_blocks(wide)
    entries = [{"state_dim": 128, "block": 32, "from_sparsity": 0.5}]
    assert pruning.choose_storage(wide, crossovers={"cpu": {"block-sparse": entries}})[::2] == (
        "block-sparse",
        32,
    )
    # The widest measurement that is not wider than the layer decides.
    entries.append({"state_dim": 192, "block": 32, "from_sparsity": 0.9})
    entries.append({"state_dim": 512, "block": 32, "from_sparsity": 0.1})
    form = pruning.choose_storage(wide, crossovers={"cpu": {"block-sparse": entries}})
    assert form.name == "dense" and "75% of the blocks of 32 are dead, it pays from 90% on" in form.reason
    half = LionLayer(32, 192)
    prune_once(half, 0.5, granularity="2:4")
    assert pruning.choose_storage(half, crossovers={"cpu": {"2:4": [{"state_dim": 192}]}}).name == "2:4"
    assert pruning.choose_storage(half, crossovers={"cpu": {"2:4": [{"state_dim": 256}]}}).name == "dense"


def test_dead_units_are_compacted_whatever_was_measured():
    for state, keep, text in ((64, 0.5, "32 columns in place of 64"), (64, 0.9, "smaller and not faster")):
        layer = LionLayer(16, state)
        prune_once(layer, keep, granularity="unit")
        form = pruning.choose_storage(layer)
        assert form.name == "compact" and text in form.reason
    model = TwoEnds()
    assert {name: form["name"] for name, form in pruning.describe_storage(model).items()} == {
        "input_end": "dense",
        "output_end": "dense",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_sparse_storage_without_kernels(dtype):
    layer = loud(LionLayer(40, 72, max_iter=200, tol=1e-12, backward="exact", gamma=0.5, dtype=dtype))
    with pytest.raises(OptionError, match="no masks"):
        pruning.BlockSparseLayer(layer, 16)
    layer.set_mask("W", torch.rand(72, 72) < 0.5)
    with pytest.raises(OptionError, match="block must be one of 16, 32, 64; got 8"):
        pruning.BlockSparseLayer(layer, 8)
    with pytest.raises(OptionError, match="recurrence='free'"):
        pruning.BlockSparseLayer(LionLayer(8, 8, recurrence="tied"))
    form = pruning.BlockSparseLayer(layer, 16)
    prune_once(layer, 0.3, granularity="block", block=16)
    form.refresh()
    x = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, 40, dtype=dtype)
    inputs = [x, *layer.parameters()]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(form(x), layer(x), rtol=0, atol=tolerance)
    got, expected = (torch.autograd.grad(each(x), inputs, upstream) for each in (form, layer))
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=tolerance * max(1, right.abs().max()))
    assert "_patterns" not in form.state_dict() and len(list(form.parameters())) == 5
    with pytest.raises(ValueError, match="width 40"):
        form(torch.randn(2, 39, dtype=dtype))
