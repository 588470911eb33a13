"""What robust training is compared with: one-shot pruning and the lottery ticket."""

import copy

import pytest
import torch
from pruning_helpers import TwoEnds, backward, copies_of, flat, gradients_of, loud, matrices_of, trained

from lion_fast import LionLayer
from lion_fast.errors import OptionError
from lion_fast.pruning import iterative_magnitude, prune_once
from lion_fast.pruning.masks import count_kept


@pytest.mark.parametrize("criterion", ["magnitude", "random", "saliency"])
def test_one_shot(criterion):
    model = loud(TwoEnds())
    backward(model, 0)
    before, grads = copies_of(model), gradients_of(model)
    prune_once(model, 0.3, criterion=criterion, seed=3)
    masks = {k: model.get_buffer(f"{k}_mask") for k in before}
    assert flat(masks).sum() == count_kept(0.3, flat(masks).numel())
    assert all(torch.equal(p, before[k] * masks[k]) for k, p in matrices_of(model).items())
    if criterion == "random":
        again, other = loud(TwoEnds()), loud(TwoEnds())
        prune_once(again, 0.3, criterion="random", seed=3)
        prune_once(other, 0.3, criterion="random", seed=4)
        assert torch.equal(again.input_end.A_mask, model.input_end.A_mask)
        assert not torch.equal(other.input_end.A_mask, model.input_end.A_mask)
        assert all(0.2 < m.float().mean() < 0.4 for m in masks.values())
    else:
        score = flat(
            {k: b.abs() if criterion == "magnitude" else (b * grads[k]).abs() for k, b in before.items()}
        )
        assert score[flat(masks)].min() >= score[~flat(masks)].max()


def test_lottery_ticket_rewinds_and_nests():
    model = loud(TwoEnds())
    start = copy.deepcopy(model.state_dict())
    seen = []

    def train():
        seen.append(copies_of(model))
        optimizer = torch.optim.AdamW(trained(model), lr=0.05)
        for step in range(3):
            backward(model, step)
            optimizer.step()

    iterative_magnitude(model, train, keep=0.2, rounds=3)
    assert len(seen) == 3
    previous = None
    for k, weights in enumerate([*seen, copies_of(model)]):
        alive = flat(weights) != 0
        assert alive.sum() == count_kept(0.2 ** (k / 3), alive.numel())
        assert previous is None or not (alive & ~previous).any()
        for name, w in weights.items():
            assert torch.equal(w, start[name] * (w != 0))
        previous = alive
    assert torch.equal(model.head.weight, start["head.weight"])
    assert torch.equal(model.input_end.b, start["input_end.b"])


def test_rewinding_to_an_early_step():
    model, early = loud(TwoEnds()), loud(TwoEnds()).state_dict()
    iterative_magnitude(model, lambda: None, keep=0.5, rounds=1, rewind_to=early)
    for name, p in matrices_of(model).items():
        assert torch.equal(p, early[name] * (p != 0)) and 0 < (p != 0).sum()
    del early["head.weight"]
    with pytest.raises(OptionError, match="rewind_to lacks head"):
        iterative_magnitude(model, lambda: None, keep=0.5, rewind_to=early)


def test_what_is_refused():
    with pytest.raises(OptionError, match="needs gradients"):
        prune_once(LionLayer(8, 4), 0.5, criterion="saliency")
    with pytest.raises(OptionError, match="rounds"):
        iterative_magnitude(LionLayer(8, 4), lambda: None, keep=0.5, rounds=0)
