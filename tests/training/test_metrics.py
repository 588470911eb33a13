"""Evaluation, prediction and the measurement of memory."""

from collections import Counter

import numpy as np
import pytest
import torch
from training_helpers import Tensors, random_splits, tiny_model

from lion_fast.data import load_data, load_images, transforms
from lion_fast.errors import DataError, OptionError
from lion_fast.training import PeakMemory, evaluate, predict, predict_files


def test_metrics_against_counting_by_hand():
    """Logits chosen so that every number can be counted."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    guesses = [0, 0, 0, 1, 1, 2, 0]
    logits = torch.nn.functional.one_hot(torch.tensor(guesses), 4).float() * 2

    class Given(torch.nn.Module):
        num_classes = 4

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    metrics = evaluate(Given(), Tensors(logits, labels), batch_size=3)
    assert metrics.accuracy == 4 / 7
    assert metrics.recall == [3 / 4, 1 / 2, None, 0.0]
    assert metrics.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    right, wrong = -np.log(np.e**2 / (np.e**2 + 3)), -np.log(1 / (np.e**2 + 3))
    assert metrics.loss == pytest.approx((4 * right + 3 * wrong) / 7, rel=1e-6)
    counted = Counter(zip(labels.tolist(), guesses, strict=True))
    assert all(metrics.confusion[i][j] == counted[(i, j)] for i in range(4) for j in range(4))
    assert (metrics.n, metrics.counts) == (7, [4, 2, 0, 1])


def test_evaluation_refuses_labels_out_of_range_and_nothing():
    splits = random_splits()
    splits.val.labels[2] = 3
    with pytest.raises(DataError, match="label 3 is out of range: the model has 3 classes, 0 to 2"):
        evaluate(tiny_model(), splits.val)
    with pytest.raises(DataError, match="no images"):
        evaluate(tiny_model(), Tensors(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.long)))


def test_image_sets_without_a_transform_get_the_backbones(images):
    model, splits = tiny_model(), load_data(images)
    view = transforms(model.backbone)
    assert splits.test.transform is None
    given, own = evaluate(model, splits.test.with_transform(view)), evaluate(model, splits.test)
    assert own.confusion == given.confusion and own.loss == given.loss
    assert torch.equal(predict(model, splits.test), predict(model, splits.test.with_transform(view)))
    mirrored = splits.test.with_transform(lambda image: view(image).flip(0))
    assert evaluate(model, mirrored).loss != own.loss, "a transform that is there is kept"


def test_evaluation_refuses_images_of_other_classes(images):
    model, splits = tiny_model(), load_data(images)
    fewer = load_images(images, classes=splits.classes[::-1])
    evaluate(model, fewer.subset([0]))  # no names of its own: the numbers must do
    model.classes = splits.classes
    for other in (fewer, torch.utils.data.Subset(fewer, [0, 1])):
        with pytest.raises(DataError, match="classes=model.classes"):
            evaluate(model, other)
    with pytest.raises(DataError, match="3 classes and the model 4 outputs"):
        evaluate(tiny_model(num_classes=4), splits.test)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 2.5}, {"num_workers": -1}])
def test_loading_options_are_checked(wrong, images):
    name = next(iter(wrong))
    for call, items in (
        (evaluate, random_splits().val),
        (predict, torch.rand(2, 3, 32, 32)),
        (predict_files, []),
    ):
        with pytest.raises(OptionError, match=name):
            call(tiny_model(), items, **wrong)


def test_peak_memory_sees_an_allocation_that_is_gone_again():
    with PeakMemory("cpu") as memory:
        x = torch.ones(16 * 2**20)
        del x
    assert 60e6 < memory.bytes < 90e6
    assert "resident memory" in memory.how
