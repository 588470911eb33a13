"""Order and seeds: pure functions of seed, epoch, step and image."""

import random

import numpy as np
import pytest
import torch
from training_helpers import QUICK, random_splits, same_bits, tiny_model

from lion_fast.data import load_data, transforms
from lion_fast.training import Plan, TrainConfig, fit
from lion_fast.training.order import SeededItems


def test_an_epoch_is_a_permutation_and_another_one_each_time():
    plan = Plan(n=23, batch_size=8, epochs=3, seed=5)
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in plan.indices(step)] for e in range(plan.epochs)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(plan.indices(step)) for step in range(3)] == [8, 8, 7]
    assert Plan(n=23, batch_size=8, epochs=3, seed=5).indices(4) == plan.indices(4)
    assert Plan(n=23, batch_size=8, epochs=3, seed=6).indices(4) != plan.indices(4)


@pytest.mark.parametrize("processes,accumulation", [(1, 1), (2, 1), (1, 3), (2, 3), (5, 2)])
def test_shares_make_up_the_step_whoever_handles_them(processes, accumulation):
    whole = Plan(n=23, batch_size=8, epochs=2, seed=0)
    plan = Plan(n=23, batch_size=8, epochs=2, seed=0, processes=processes, accumulation=accumulation)
    for step in range(whole.steps):
        shares = [i for rank in range(processes) for share in plan.shares(step, rank) for i in share]
        assert shares == list(whole.indices(step))


def test_augmentation_is_a_function_of_seed_epoch_and_image(images):
    splits = load_data(images)
    view = splits.train.with_transform(transforms(tiny_model().backbone, True, "crop"))
    items = SeededItems(view, seed=3)
    first = items[(0, 4)][0]
    torch.manual_seed(99)
    random.seed(99)
    before = torch.get_rng_state()
    assert torch.equal(items[(0, 4)][0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(items[(1, 4)][0], first)
    assert not torch.equal(SeededItems(view, seed=4)[(0, 4)][0], first)


def test_workers_change_nothing(images, tmp_path):
    states = []
    for workers in (0, 2):
        model = tiny_model()
        config = TrainConfig(**QUICK, augment="crop", num_workers=workers)
        fit(model, load_data(images), config, tmp_path / str(workers))
        states.append(model.adapter_state_dict())
    assert same_bits(*states)


def test_the_callers_generators_come_back(tmp_path):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
