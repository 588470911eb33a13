"""Generated tasks: the same pixels everywhere, labels that the pixels confirm, no cheap cue."""

import hashlib

import numpy as np
import pytest
import torch

from lion_fast.data import load_data, load_images
from lion_fast.data.structured import STRUCTURED

SHA256 = {
    "shapes-position": "6cc1dbdd8fd96ff6cd5093d72501ed30318420aad5e82a25f56057a4ea635905",
    "shapes-count": "4cdf801a4999289f5a375e4e7be088f9d094b442e9bcd0e1cb8caaf9e16e8a73",
    "shapes-connected": "db650517b0af12f317036c0007ddbf7081c1e528187190079ea143b19c1987e2",
}


def pixels_and_labels(name):
    images = load_images(name)
    return np.stack(images.stored()), images.labels.numpy()


@pytest.fixture(scope="module")
def lines():
    """Pixels, which are background (0), line (1) or mark (2), and labels."""
    pixels, labels = pixels_and_labels("shapes-connected")
    return pixels, np.stack([kinds(image) for image in pixels]), labels


def kinds(image):
    """The place of each pixel's colour among those of the picture, the most frequent first."""
    colour = image.astype(int) @ [1 << 16, 1 << 8, 1]
    _, which, counts = np.unique(colour, return_inverse=True, return_counts=True)
    return np.argsort(np.argsort(-counts))[which].reshape(colour.shape)


def parts(on):
    """The pixels of each piece of a mask, by flood fill over the four neighbours."""
    left, found = set(zip(*map(np.ndarray.tolist, np.nonzero(on)), strict=True)), []
    while left:
        todo = [left.pop()]
        piece = set(todo)
        while todo:
            y, x = todo.pop()
            new = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= new
            piece |= new
            todo += new
        found.append(piece)
    return found


@pytest.mark.parametrize("name", STRUCTURED)
def test_pixels_and_labels_are_the_same_on_every_machine(name):
    pixels, labels = pixels_and_labels(name)
    assert pixels.shape == (2000, 64, 64, 3) and pixels.dtype == np.uint8
    assert len(set(np.bincount(labels).tolist())) == 1
    assert hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest() == SHA256[name]


def test_a_generated_set_is_split_and_drawn_as_others_are():
    splits = load_data("shapes-position", n_per_class=5)
    assert set(splits.train.counts().values()) == {5} and splits.classes[5] == "row 2, column 2"
    assert len(splits.val) == len(splits.test) == 400 and splits.description["license"] == "CC0-1.0"


def test_the_label_of_connected_is_whether_a_flood_fill_joins_the_marks(lines):
    for kind, label in zip(*lines[1:], strict=True):
        marks = [sum(kind[y, x] == 2 for y, x in piece) for piece in parts(kind > 0)]
        assert sorted(marks) == ([0, 0, 32] if label else [0, 16, 16])


def test_nothing_cheap_tells_whether_the_marks_are_joined(lines):
    pixels, kind, labels = lines
    # as many pixels of background, lines and marks in every picture
    assert len({tuple(np.bincount(one.ravel())) for one in kind}) == 1
    colour = pixels.reshape(len(pixels), -1, 3)
    apart = np.array([np.ptp(np.argwhere(one == 2), axis=0) for one in kind])
    coarse = (kind > 0).reshape(-1, 8, 8, 8, 8).mean((2, 4)).reshape(len(kind), -1)
    for features in (np.c_[colour.mean(1), colour.std(1)], apart, coarse):
        assert abs(held_out(features, labels) - 0.5) < 0.06  # 3.8 standard deviations of chance


def held_out(features, labels):
    """Accuracy of least squares on products of two features, fitted on one half, on the other half."""
    features = (features - features.mean(0)) / features.std(0)
    if features.shape[1] < 10:
        products = (features[:, :, None] * features[:, None]).reshape(len(features), -1)
        features = np.concatenate([features, products], 1)
    x = torch.tensor(np.c_[features, np.ones(len(features))])
    y = torch.tensor(2.0 * labels - 1)
    half = len(x) // 2
    fitted = torch.linalg.lstsq(x[:half], y[:half, None], driver="gelsd").solution
    return ((x[half:] @ fitted).squeeze(1).sign() == y[half:]).double().mean().item()


def test_the_number_of_sprites_is_the_label():
    pixels, labels = pixels_and_labels("shapes-count")
    assert [len(sprites(image)) for image in pixels] == (labels + 1).tolist()


def test_one_cross_stands_in_the_cell_of_the_label():
    pixels, labels = pixels_and_labels("shapes-position")
    others = set()
    for image, label in zip(pixels, labels, strict=True):
        found = sprites(image)
        crosses = [cell for cell, on in found.items() if is_cross(on)]
        assert crosses == [label]
        others.add(len(found) - 1)
    assert others == set(range(3, 9))


def sprites(image):
    """{cell: which of its pixels are far from the background}, of the cells that have a sprite."""
    back = np.median(image.reshape(-1, 3), axis=0)
    on = (abs(image - back) > 30).any(-1)
    cells = on.reshape(4, 16, 4, 16).swapaxes(1, 2).reshape(16, 16, 16)
    return {k: cell for k, cell in enumerate(cells) if cell.any()}


def is_cross(on):
    """Whether the sprite is two bars of its own length, a third as wide, across each other."""
    y, x = np.nonzero(on)
    own = on[y.min() : y.max() + 1, x.min() : x.max() + 1]
    radius = len(own) // 2
    bar = abs(np.arange(-radius, radius + 1)) <= radius // 3
    return np.array_equal(own, bar[:, None] | bar)
