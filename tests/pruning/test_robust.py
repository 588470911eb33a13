"""Robust training: the update, the scores, the phases, going on from a state, two processes."""

import copy
import io
import json

import pytest
import torch
from pruning_helpers import (
    D,
    R,
    TwoEnds,
    backward,
    copies_of,
    flat,
    gradients_of,
    loud,
    matrices_of,
    robust,
    train,
    trained,
)
from torch import nn

from lion_fast import LionLayer
from lion_fast.errors import CheckpointError, OptionError
from lion_fast.pruning import RobustPruner, compact, prune_once

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
    pruner = robust(model, optimizer, total_steps=20, warmup=3, refresh=100, freeze=20, decay=0.7)
    expected = {}
    for step in range(9):
        backward(model, step)
        # Elementwise optimisers: the same gradients give critical entries the same bits in both.
        for p, q in zip(trained(model), trained(plain), strict=True):
            q.grad = p.grad.clone()
        state = {p: copy.deepcopy(optimizer.state.get(p)) for p in matrices_of(model).values()}
        grads, before = gradients_of(model), copies_of(model)
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
    pruner = robust(model, keep=0.25, warmup=0, freeze=9, scale_gradient=True)
    backward(model, 0)
    before, bias = copies_of(model), model.input_end.b.detach().clone()
    pruner.step()
    for key, p in matrices_of(model).items():
        mask = pruner.masks[key]
        torch.testing.assert_close(p[mask], (before[key] - 0.1 * 0.25 * p.grad)[mask])
    torch.testing.assert_close(model.input_end.b, bias - 0.1 * model.input_end.b.grad)


def test_the_learning_rate_of_a_group_and_of_now_scales_the_shrinking():
    model = loud(TwoEnds())
    ends = [{"params": end.parameters()} for end in (model.input_end, model.output_end)]
    optimizer = torch.optim.SGD(ends, lr=0.2)
    pruner = robust(model, optimizer, warmup=0, refresh=50, freeze=9, decay=0.5)
    for step, factor in enumerate((1.0, 0.3)):
        for group, lr in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = lr * factor
        backward(model, step)
        before = copies_of(model)
        pruner.step()
        for key, p in matrices_of(model).items():
            off = ~pruner.masks[key]
            lr = (0.1 if key.startswith("input") else 0.2) * factor
            w = before[key][off]
            torch.testing.assert_close(p[off], w.sign() * (w.abs() - 0.5 * lr).clamp_min(0))


@pytest.mark.parametrize("decay", [1e-4, 0.31])
def test_entries_off_the_mask_shrink_to_zero_and_the_report_says_how_many(decay):
    """Lambda near 1e-2 or more: with 1e-4 nothing decays in time, and the hard cut is a jump."""
    layer = loud(LionLayer(D, R))
    pruner = robust(layer, total_steps=60, warmup=0, refresh=90, freeze=60, decay=decay)
    train(layer, pruner, 60)
    off, told = layer.A[~pruner.masks["A"]], pruner.report()["matrices"]["A"]
    if decay < 1e-2:
        assert told["decayed"] < 0.02 and told["largest_off_mask"] > 0.2
    else:
        assert told["decayed"] == 1 and told["largest_off_mask"] == 0
        assert (off == 0).all() and not torch.signbit(off).any()


# -- scores and masks


def test_scores_are_running_means_of_saliency_and_masks_the_global_best():
    model = loud(TwoEnds())
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    pruner = robust(model, optimizer, keep=0.3, total_steps=12, warmup=4, refresh=4, freeze=12, ema=4)
    mean = {k: torch.zeros_like(p) for k, p in matrices_of(model).items()}
    for step in range(10):
        backward(model, step)
        for key, p in matrices_of(model).items():
            mean[key] = 0.75 * mean[key] + 0.25 * (p * p.grad).abs().detach()
        pruner.step()
        if step in (4, 8):
            assert pruner.refreshes == step // 4
            everything = flat(mean)
            count = -(-3 * everything.numel() // 10)
            threshold = everything.sort(descending=True).values[count - 1]
            for key, mask in pruner.masks.items():
                assert torch.equal(mask, mean[key] >= threshold)
            assert flat(pruner.masks).sum() == count
    assert set(pruner.masks) == {f"{end}_end.{name}" for end in ("input", "output") for name in "AWV"}


def test_the_report_shows_an_end_that_loses_almost_everything():
    model = loud(TwoEnds())
    model.input_end.V.data.mul_(1e-4)
    pruner = robust(model, torch.optim.SGD(trained(model), lr=0.01), total_steps=4, warmup=2)
    train(model, pruner, 3)
    shares = {k: m["share"] for k, m in pruner.report()["matrices"].items()}
    assert shares["input_end.A"] < 0.1 < 0.5 < shares["output_end.A"]


@pytest.mark.parametrize("regrow", [0.0, 0.2])
def test_zero_is_absorbing_without_regrowth(regrow):
    """|w dL/dw| of w = 0 is 0: the mask never takes it back while anything else scores."""
    torch.manual_seed(1)
    model = loud(TwoEnds())
    model.input_end.A.data[:3] = 0
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    pruner = robust(
        model, optimizer, total_steps=40, warmup=2, refresh=4, freeze=36, decay=1.0, regrow=regrow
    )
    # Zero from before the masks exist; held there, as the dense steps would move it.
    for step in range(40):
        backward(model, step)
        if step < 2:
            model.input_end.A.grad[:3] = 0
        pruner.step()
    assert pruner.masks["input_end.A"][:3].any() == bool(regrow)
    assert (model.input_end.A[:3] != 0).any() == bool(regrow)


def test_a_zero_read_out_makes_the_first_mask_arbitrary_and_says_so():
    layer = LionLayer(D, R)
    nn.init.zeros_(layer.V)
    pruner = robust(layer, total_steps=4, warmup=0)
    backward(layer, 0)
    with pytest.warns(UserWarning, match="A, W.*arbitrary.*V zero"):
        pruner.step()


@pytest.mark.parametrize("granularity", ["element", "unit", "block", "2:4"])
@pytest.mark.parametrize("criterion", ["saliency", "magnitude", "random"])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_every_granularity_and_criterion_trains(granularity, criterion, recurrence):
    layer = loud(LionLayer(32, 16, recurrence=recurrence))
    pruner = robust(
        layer, torch.optim.AdamW(layer.parameters(), lr=1e-2), total_steps=12, granularity=granularity,
        criterion=criterion, block=16, warmup=2, refresh=3, freeze=8, decay=1.0,
    )  # fmt: skip
    train(layer, pruner, 12)
    report = pruner.finalize()
    assert report["phase"] == "hard" and report["refreshes"] == 2
    for name, mask in layer.masks().items():
        assert (getattr(layer, name)[~mask] == 0).all()
        if granularity != "2:4":
            assert report["matrices"][name]["share"] == mask.float().mean()
    if granularity != "unit":
        # W of 16 x 16 is one block; a unit takes a quarter of W along.
        assert abs(report["kept_share"] - 0.5) < 0.15


@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_the_bound_holds_at_every_step_of_a_training_with_mask_changes(recurrence):
    model = loud(TwoEnds(recurrence=recurrence, gamma=0.7))
    ends = (model.input_end, model.output_end)
    for end in ends:
        (end.A if recurrence == "tied" else end.W).data.mul_(5)
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    pruner = robust(model, optimizer, keep=0.4, total_steps=20, warmup=2, refresh=2, freeze=16, decay=1.0)
    seen = []
    for step in range(20):
        backward(model, step)
        pruner.step()
        for end in ends:
            Wh = end.recurrence_matrix()
            assert torch.linalg.matrix_norm(Wh, 2) <= 0.7
            if step > 16 and recurrence == "free":
                assert (Wh[~end.W_mask] == 0).all()
        if pruner.masks:
            seen.append(flat(pruner.masks))
    assert any(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


# -- schedule, resume, report


def test_phases_refreshes_and_the_hard_cut():
    model = loud(TwoEnds())
    pruner = robust(
        model, torch.optim.Adam(trained(model), lr=1e-2), total_steps=20, warmup=0.2, refresh=3, freeze=0.6,
        hard=16, decay=0.1,
    )  # fmt: skip
    phases, masks = [], []
    for step in range(20):
        phases.append(pruner.phase)
        backward(model, step)
        pruner.step()
        masks.append({k: m.clone() for k, m in pruner.masks.items()})
        off = [p[~pruner.masks[k]] for k, p in matrices_of(model).items() if pruner.masks]
        assert (bool(off) and all((w == 0).all() for w in off)) == (step >= 16)
        assert bool(model.input_end.masks()) == (step >= 16)
    assert phases == ["dense"] * 4 + ["robust"] * 8 + ["frozen"] * 4 + ["hard"] * 4
    assert pruner.refreshes == 3
    assert all(torch.equal(flat(later), flat(masks[11])) for later in masks[12:])
    report = pruner.finalize()
    assert report["kept_share"] == pytest.approx(0.5, abs=1e-3)
    dense = sum(p.numel() for end in (model.input_end, model.output_end) for p in end.parameters())
    kept = dense - sum(m["total"] - m["kept"] for m in report["matrices"].values())
    head = sum(p.numel() for p in model.head.parameters())
    assert report["parameters"] == {"dense": dense, "kept": kept, "kept_with_head": kept + head}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("warmup", [0, 5])
def test_finalize_cuts_at_once_by_the_mask_or_by_the_scores_so_far(warmup):
    model = loud(TwoEnds())
    pruner = robust(model, warmup=warmup, freeze=9)
    train(model, pruner, 1)
    early, report = pruner.report(), pruner.finalize()
    assert report["kept_share"] == pytest.approx(0.5, abs=1e-3) and pruner.finalize() == report
    # Before the cut counts go by the mask.
    assert (early["parameters"] == report["parameters"]) == (warmup == 0)


@pytest.mark.parametrize("stop", [2, 6, 11, 17])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_gives_the_same_bits_in_every_phase(stop, optimizer):
    def make(model):
        return robust(
            model, OPTIMIZERS[optimizer](trained(model)), keep=0.4, total_steps=20, warmup=4, refresh=3,
            freeze=10, hard=14, decay=0.5, regrow=0.1,
        )  # fmt: skip

    model = loud(TwoEnds())
    first, second = copy.deepcopy(model), TwoEnds()
    whole, half, resumed = (make(m) for m in (model, first, second))
    train(model, whole, 20)
    train(first, half, stop)
    file = io.BytesIO()
    torch.save((first.state_dict(), half.optimizer.state_dict(), half.state_dict()), file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    train(first, half, 20, stop)  # what is saved is a copy

    second.load_state_dict(weights)
    resumed.optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    train(second, resumed, 20, stop)
    for other in (first, second):
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert whole.finalize() == resumed.finalize()


def test_a_state_of_another_pruner_is_refused():
    state = robust(TwoEnds()).state_dict()
    with pytest.raises(CheckpointError, match="keep was 0.5, now 0.4"):
        robust(TwoEnds(), keep=0.4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="do not fit"):
        robust(TwoEnds(state_dim=4)).load_state_dict(state)


def test_an_overflow_of_mixed_precision_does_not_enter_the_scores():
    model = loud(TwoEnds())
    pruner = robust(model, warmup=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(model, 0)
    grads, before = gradients_of(model), copies_of(model)
    for p in trained(model):
        p.grad.mul_(1024.0)
    scaler.scale(torch.ones(()))
    pruner.step(scaler)
    scaler.update()
    scores = pruner.state_dict()["scores"]
    for key, score in scores.items():
        torch.testing.assert_close(score, (before[key] * grads[key]).abs() / pruner.ema)
    backward(model, 1)
    for p in trained(model):
        p.grad.mul_(float("inf"))
    weights = copy.deepcopy(model.state_dict())
    pruner.step(scaler)
    assert all(torch.equal(s, scores[k]) for k, s in pruner.state_dict()["scores"].items())
    assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items())


# -- data parallelism


def _on_rank(rank, folder):
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for criterion in ("saliency", "random"):
        torch.manual_seed(0)
        model = loud(TwoEnds())
        net = DistributedDataParallel(model, broadcast_buffers=False)
        # The seed of a rank of its own: only the broadcast makes random masks agree.
        pruner = robust(
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
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    for criterion in ("saliency", "random"):
        (history, weights), (other, others) = (
            torch.load(tmp_path / f"{criterion}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert len(history) == 10 and history[-1]
        for mine, theirs in zip(history, other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mask, theirs[k]) for k, mask in mine.items())
        assert all(torch.equal(w, others[k]) for k, w in weights.items())


# -- refusals


@pytest.mark.parametrize(
    "options, key",
    [
        ({"granularity": "row"}, "granularity"),
        ({"criterion": "luck"}, "criterion"),
        ({"scope": "row"}, "scope"),
        ({"warmup": 1.5}, "warmup"),
        ({"refresh": 0}, "refresh"),
        ({"decay": -1.0}, "decay"),
        ({"regrow": 1.0}, "regrow"),
        ({"total_steps": 0}, "total_steps"),
        *(({"keep": value}, "keep") for value in (0, 1.5, True)),
        ({"granularity": "2:4", "keep": 0.4}, "keep must be 0.5"),
        ({"granularity": "block", "block": 8}, "block"),
        ({"granularity": "block", "block": 32}, r"do not fit A of shape \(16, 32\)"),
        ({"warmup": 9, "freeze": 5}, "phases"),
        ({"hard": 11}, "phases"),
        ({"regrow": 0.1, "criterion": "random"}, "regrow goes with"),
    ],
)
def test_options_out_of_range(options, key):
    with pytest.raises(OptionError, match=key):
        robust(LionLayer(32, 16), **options)


def test_what_cannot_be_pruned_is_refused():
    layer = LionLayer(32, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(OptionError, match=r"multiple of 4 entries; A is \(4, 6\)"):
        robust(LionLayer(6, 4), granularity="2:4")
    for target, key in ((nn.Linear(3, 3), "no LionLayer"), ([nn.Linear(3, 3)], "only LionLayer")):
        with pytest.raises(OptionError, match=key):
            RobustPruner(target, optimizer, keep=0.5, total_steps=10)
    with pytest.raises(OptionError, match="does not have A"):
        robust(layer, torch.optim.SGD([layer.b], lr=0.1))
    layer.V.requires_grad_(False)
    with pytest.raises(OptionError, match="V is frozen"):
        robust(layer)
    layer.V.requires_grad_()
    prune_once(layer, 0.5, granularity="unit")
    with pytest.raises(OptionError, match="pruned already"):
        robust(layer)
    small = compact(layer)
    for prune in (robust, lambda s: prune_once(s, 0.5)):
        with pytest.raises(OptionError, match="already compacted"):
            prune(small)
