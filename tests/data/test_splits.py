"""Splits and seeded draws: sizes, strata, reproducibility."""

import json

import pytest
import torch
from image_helpers import class_folders, refuses, sizes

from lion_fast.data import (
    draw_fraction,
    draw_long_tail,
    draw_per_class,
    draw_total,
    load_data,
    load_images,
    long_tail_counts,
)
from lion_fast.errors import DataError, OptionError


def test_folder_split_is_stratified_disjoint_and_complete(three):
    splits = load_data(three)
    # round(0.2 * n) of each class to test and as many to val
    assert splits.description["class_counts"] == {
        "train": {"cat": 12, "dog": 6, "eel": 3},
        "val": {"cat": 4, "dog": 2, "eel": 1},
        "test": {"cat": 4, "dog": 2, "eel": 1},
    }
    names = [set(s.names) for s in (splits.train, splits.val, splits.test)]
    everything = {p.relative_to(three).as_posix() for p in three.rglob("*.png")}
    assert names[0] | names[1] | names[2] == everything
    assert sum(map(len, names)) == len(everything) == 35
    assert splits.classes == ["cat", "dog", "eel"]
    for images in (splits.train, splits.val, splits.test):
        assert [splits.classes[k] for k in images.labels.tolist()] == [n.split("/")[0] for n in images.names]
    json.dumps(splits.description)


def test_split_is_reproducible_and_follows_the_seed(three, tmp_path):
    again = class_folders(tmp_path / "elsewhere" / "photos", {"cat": 20, "dog": 10, "eel": 5})
    first, second, other = load_data(three, seed=3), load_data(again, seed=3), load_data(three, seed=4)
    assert first.train.names == second.train.names and first.test.names == second.test.names
    assert first.description["fingerprint"] == second.description["fingerprint"]
    assert first.test.names != other.test.names
    # the same items on every machine and torch version
    assert first.description["fingerprint"][:16] == "86321a74048038d9"


def test_shares_and_exact_sizes(three):
    assert sizes(load_data(three, val=0, test=0)) == [35, 0, 0]
    assert load_data(three, val=0, test=0).val is None
    assert sizes(load_data(three, val=0, test=0.4)) == [21, 0, 14]
    splits = load_data(three, n_train=9, n_val=5, n_test=7)
    assert sizes(splits) == [9, 5, 7]
    assert splits.description["class_counts"]["test"] == {"cat": 4, "dog": 2, "eel": 1}
    refuses("36 images asked for, 35 available", three, n_test=36)
    refuses("leaves no training image", three, n_test=35)


def test_rare_classes_keep_a_training_image(tmp_path):
    root = class_folders(tmp_path / "d", {"a": 1, "b": 2, "c": 3, "d": 100})
    counts = load_data(root).description["class_counts"]
    assert counts["test"] == {"a": 0, "b": 1, "c": 1, "d": 20}
    assert counts["train"]["a"] == counts["train"]["b"] == 1
    assert counts["train"]["c"] + counts["val"]["c"] == 2 and counts["train"]["c"] >= 1


def test_a_part_that_no_class_can_spare_an_image_for_is_said(tmp_path, capsys):
    splits = load_data(class_folders(tmp_path / "single", {"a": 1, "b": 1}))
    assert sizes(splits) == [2, 0, 0]
    said = capsys.readouterr().err
    assert "no test part" in said and "no val part" in said


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_split_folders_are_used_as_they_are(tmp_path, val_name):
    for split, n in (("train", 6), (val_name, 2), ("test", 3)):
        class_folders(tmp_path / "d" / split, {"x": n, "y": n + 1})
    splits = load_data(tmp_path / "d")
    assert sizes(splits) == [13, 5, 7]
    assert splits.test.names[0] == "test/x/000.png"
    assert "train, val, test as the source has them" in splits.description["split"]
    assert sizes(load_data(tmp_path / "d", n_test=4)) == [13, 5, 4]


def test_missing_split_folders(tmp_path):
    for split in ("train", "test"):
        class_folders(tmp_path / "a" / split, {"x": 10, "y": 10})
    splits = load_data(tmp_path / "a", val=0.3)
    assert sizes(splits) == [14, 6, 20]
    assert all(n.startswith("train/") for n in splits.val.names)
    for split in ("train", "val"):
        class_folders(tmp_path / "b" / split, {"x": 10, "y": 10})
    splits = load_data(tmp_path / "b")
    assert sizes(splits) == [20, 20, 0] and splits.test is None


def test_a_class_may_be_called_train(tmp_path):
    splits = load_data(class_folders(tmp_path / "d", {"bus": 5, "train": 5}))
    assert splits.classes == ["bus", "train"] and sizes(splits) == [6, 2, 2]


@pytest.mark.parametrize("source", ["~nobody-of-that-name/photos", "x" * 5000, "nul\0"])
def test_places_that_cannot_be_are_one_error(source):
    refuses("neither", source)
    refuses("no source", "", error=OptionError)
    with pytest.raises(DataError):
        load_images(source)


def test_load_images_says_what_it_leaves_out(three, capsys):
    for i in range(30):
        (three / "dog" / f"cut{i}.png").write_bytes(b"no image")
    assert len(load_images(three)) == 35
    said = capsys.readouterr().err
    assert "30 image(s)" in said and "dog/cut0.png" in said and "25 more" in said


def test_load_images_takes_everything(three, tmp_path):
    images = load_images(three)
    assert len(images) == 35
    few = class_folders(tmp_path / "few", {"dog": 2})
    images = load_images(few, classes=["cat", "dog", "eel"])
    assert images.labels.tolist() == [1, 1] and images.counts() == {"cat": 0, "dog": 2, "eel": 0}
    with pytest.raises(DataError, match="no test part; it has: all"):
        load_images(three, split="test")
    with pytest.raises(DataError, match="class.*dog.*not among"):
        load_images(few, classes=["cat", "eel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 1.0}, "val .*n_val"),
        ({"test": -0.1}, "test"),
        ({"test": True}, "test"),
        ({"val": 0.5, "test": 0.5}, "must leave training images"),
        ({"n_per_class": 0}, "n_per_class"),
        ({"n_per_class": 2.0}, "n_per_class"),
        ({"imbalance": 0.5}, "imbalance"),
        ({"n_per_class": 2, "imbalance": 2.0}, "give it without imbalance and n_train"),
        ({"n_train": 0}, "number of images"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_options(three, options, message):
    refuses(message, three, **options, error=OptionError)


def test_draws_leave_val_and_test_alone(three):
    plain = load_data(three, seed=9)
    few = load_data(three, seed=9, n_per_class=3)
    tail = load_data(three, seed=9, imbalance=4)
    assert few.description["class_counts"]["train"] == {"cat": 3, "dog": 3, "eel": 3}
    assert tail.description["class_counts"]["train"] == {"cat": 12, "dog": 6, "eel": 3}
    assert "n_k = floor(12 * 4^(-k / 2))" in tail.description["draw"]
    for other in (few, tail):
        assert other.val.names == plain.val.names and other.test.names == plain.test.names
        assert set(other.train.names) <= set(plain.train.names)
    refuses("class 2 has 3", three, n_per_class=4)


# draws


LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 2, 0] * 20)  # 80, 40, 80 of the three classes


def test_draw_per_class_is_exact_seeded_and_nested():
    drawn = draw_per_class(LABELS, 7, seed=5)
    assert torch.bincount(LABELS[drawn]).tolist() == [7, 7, 7] and len(set(drawn.tolist())) == 21
    assert torch.equal(drawn, draw_per_class(LABELS, 7, seed=5))
    assert not torch.equal(drawn, draw_per_class(LABELS, 7, seed=6))
    assert set(drawn.tolist()) <= set(draw_per_class(LABELS, 8, seed=5).tolist())
    assert draw_per_class(LABELS, 40).numel() == 120
    with pytest.raises(DataError, match="class 1 has 40.*the most possible is 40"):
        draw_per_class(LABELS, 41)
    with pytest.raises(DataError, match="class 1 has 0"):
        draw_per_class(torch.tensor([0, 2, 2, 0]), 1)


def test_draw_covers_a_class_evenly():
    """Every item has the same chance; 400 seeds, mean 100 of 400, four standard deviations = 34.7."""
    hits = torch.zeros(40)
    for seed in range(400):
        hits[draw_per_class(torch.zeros(40, dtype=torch.int64), 10, seed)] += 1
    assert hits.sum() == 4000 and (hits - 100).abs().max() <= 34.7


def test_long_tail_counts_are_the_published_profile():
    # CIFAR-10-LT, imbalance 100: the list of Cui et al. and of every paper after it
    assert long_tail_counts([5000] * 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts([30] * 3, 1) == [30, 30, 30]
    # unequal classes: the largest profile that fits, here bound by class 0, then by class 1
    assert long_tail_counts([80, 40, 80], 100) == [80, 8, 1]
    assert long_tail_counts([80, 4, 80], 100) == [40, 4, 1]
    assert long_tail_counts([5, 5, 5, 5], 1e6) == [5, 1, 1, 1]


def test_draw_long_tail():
    drawn = draw_long_tail(LABELS, 100, seed=1)
    assert torch.bincount(LABELS[drawn]).tolist() == [80, 8, 1]
    assert torch.equal(drawn, draw_long_tail(LABELS, 100, seed=1))
    assert not torch.equal(drawn, draw_long_tail(LABELS, 100, seed=2))
    with pytest.raises(DataError, match="none of them empty"):
        draw_long_tail(torch.tensor([0, 2]), 2)
    with pytest.raises(OptionError, match="ratio of the largest to the smallest"):
        draw_long_tail(LABELS, float("nan"))


def test_draw_total_and_fraction():
    for total in (1, 7, 100, 199, 200):
        drawn = draw_total(LABELS, total, seed=2)
        counts = torch.bincount(LABELS[drawn], minlength=3)
        assert len(drawn) == total == len(set(drawn.tolist()))
        exact = torch.tensor([80.0, 40.0, 80.0]) * total / 200
        assert (counts - exact).abs().max() < 1
    assert torch.bincount(LABELS[draw_fraction(LABELS, 0.13)]).tolist() == [10, 5, 10]
