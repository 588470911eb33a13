"""Groups that stand in one part, domains to train and test on, and classes with few images."""

from collections import Counter

import pytest
import torch
from image_helpers import class_folders, refuses, sizes, write_csv, write_image

from lion_fast.data import (
    ArrayImages,
    ImageSet,
    draw_fraction,
    draw_per_class,
    draw_total,
    load_data,
    load_images,
)
from lion_fast.errors import DataError, OptionError
from lion_fast.training.settings import Settings

PARTS = ("train", "val", "test")


def listed(folder, rows, columns):
    """A CSV file of images that are made beside it; a row is the cells behind the path."""
    names = [f"{i:03d}.png" for i in range(len(rows))]
    for i, name in enumerate(names):
        write_image(folder / name, i)
    table = [(name, *row) for name, row in zip(names, rows, strict=True)]
    return write_csv(folder / "list.csv", table, ("path", *columns))


def groups_of(splits):
    return {part: set(getattr(splits, part).groups) for part in PARTS if getattr(splits, part)}


@pytest.fixture
def patients(tmp_path):
    """Ten patients with eight images each, half of the images of either class, and 40 images alone."""
    rows = [("ab"[i % 2], f"patient {k}") for k in range(10) for i in range(8)]
    rows += [("ab"[i % 2], f"alone {i}") for i in range(40)]
    return listed(tmp_path / "csv", rows, ("label", "group"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"test": 0.3, "val": 0.05}, {"n_test": 31, "n_val": 11}])
def test_a_group_stands_in_one_part(patients, seed, options):
    splits = load_data(patients, seed=seed, **options)
    parts = groups_of(splits)
    assert not parts["train"] & parts["test"] and not (parts["train"] | parts["test"]) & parts["val"]
    assert sum(sizes(splits)) == 120 and "whole groups" in splits.description["split"]
    wanted = [options.get(f"n_{part}") or round(120 * options.get(part, 0.2)) for part in ("val", "test")]
    assert sizes(splits)[1:] == wanted, "there are enough images that stand alone"
    for part in PARTS:
        assert abs(int(torch.diff(torch.bincount(getattr(splits, part).labels)))) <= 1
    again = load_data(patients, seed=seed, **options)
    assert again.description["fingerprint"] == splits.description["fingerprint"]


def test_groups_of_one_image_are_drawn_as_no_groups():
    labels = torch.arange(90) % 3
    alone = [f"g{i}" for i in range(90)]
    for draw, size in ((draw_fraction, 0.3), (draw_total, 31)):
        assert draw(labels, size, 5, alone).tolist() == draw(labels, size, 5).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share, expected", [(0.2, 10), (0.1, 10), (0.05, 10), (0.3, 20)])
def test_large_groups_come_as_near_as_they_can(seed, share, expected):
    """Five groups of ten images in each class: one of them where less was asked for; none is too few."""
    labels = torch.arange(100) // 50
    groups = (torch.arange(100) // 10).tolist()
    drawn = draw_fraction(labels, share, seed, groups)
    assert torch.bincount(labels[drawn]).tolist() == [expected] * 2
    assert set(Counter(groups[i] for i in drawn.tolist()).values()) == {10}


def test_a_class_in_one_group_stays_whole():
    drawn = draw_fraction(torch.tensor([0] * 6 + [1] * 6), 0.5, 0, ["x"] * 6 + list("abcdef"))
    assert min(drawn.tolist()) >= 6 and len(drawn) == 3


def test_few_shots_cut_groups_in_training_alone(patients):
    few, more = load_data(patients, n_per_class=4), load_data(patients, n_per_class=8)
    assert set(few.train.names) < set(more.train.names) and few.test.names == more.test.names
    assert few.train.counts() == {"a": 4, "b": 4}


def test_groups_and_domains_go_with_the_images():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8).numpy()
    images = ImageSet(ArrayImages(pixels), [0, 1, 1], ["a", "b"], groups=[7, 8, 9], domains="xyz")
    assert images.subset([2, 0]).groups == ["9", "7"] and images.subset([2, 0]).domains == ["z", "x"]
    plain = ImageSet(ArrayImages(pixels), [0, 1, 1], ["a", "b"])
    assert plain.groups is None and plain.subset([1]).domains is None
    assert ImageSet.join([images, plain]).groups is None
    assert ImageSet.join([images, images]).domains == list("xyzxyz")
    with pytest.raises(DataError, match="groups"):
        ImageSet(ArrayImages(pixels), [0, 1, 1], ["a", "b"], groups=["one"])


@pytest.mark.parametrize("column", ["group", "domain"])
def test_empty_cells_are_refused(tmp_path, column):
    refuses(f"line 3: the {column} is empty", listed(tmp_path, [("a", "x"), ("b", " ")], ("label", column)))


def test_groups_in_two_parts_of_a_list_are_refused(tmp_path):
    rows = [("ab"[i % 2], ("train", "test")[i // 6], f"g{i % 4}") for i in range(12)]
    refuses("4 group.*g0", listed(tmp_path, rows, ("label", "split", "group")))


# domains


@pytest.fixture
def vendors(tmp_path):
    """Each of 40 things drawn by two vendors, 20 by the first alone, 10 by the second alone."""
    rows = [("ab"[i % 2], f"thing {i}", vendor) for vendor in ("old", "new") for i in range(40)]
    rows += [("ab"[i % 2], f"thing {i}", "old") for i in range(40, 60)]
    rows += [("ab"[i % 2], f"thing {i}", "new") for i in range(60, 70)]
    return listed(tmp_path / "csv", rows, ("label", "group", "domain"))


def test_train_on_one_domain_and_test_on_the_other(vendors):
    splits = load_data(vendors, domain="old", test=0.25, val=0.2)
    # of the 40 in both, 10 are set aside; with the 10 of the other vendor alone they are tested
    assert sizes(splits) == [40, 10, 20] and len(splits.unused) == 40
    parts = groups_of(splits)
    assert not parts["train"] & parts["test"] and not (parts["train"] | parts["test"]) & parts["val"]
    assert set(splits.train.domains) == set(splits.val.domains) == {"old"}
    assert set(splits.test.domains) == {"new"}
    assert {f"thing {i}" for i in range(60, 70)} < parts["test"]
    assert splits.test.counts() == {"a": 10, "b": 10}
    assert "old" in splits.description["split"] and "10 of the 40" in splits.description["split"]
    assert sizes(load_data(vendors, domain="old", test=0)) == [48, 12, 10]
    assert sizes(load_data(vendors, domain="new", test=0.5, n_test=7, n_val=3)) == [27, 3, 7]
    settings = Settings.from_dict({"data": str(vendors), "domain": "old", "test": 0.25})
    assert settings.load_data().description["fingerprint"] == splits.description["fingerprint"]


def test_without_groups_the_other_domains_are_tested_whole(tmp_path):
    path = listed(tmp_path, [("ab"[i % 2], "xyz"[i % 3]) for i in range(30)], ("label", "domain"))
    splits = load_data(path, domain="y")
    assert sizes(splits) == [8, 2, 20] and set(splits.test.domains) == {"x", "z"}


def test_parts_of_a_list_stay_parts(tmp_path):
    rows = [("ab"[i % 2], ("train", "val", "test")[i % 3], "xy"[i // 12]) for i in range(24)]
    path = listed(tmp_path, rows, ("label", "split", "domain"))
    splits = load_data(path, domain="x")
    assert sizes(splits) == [4, 4, 4]
    assert [set(getattr(splits, part).domains) for part in PARTS] == [{"x"}, {"x"}, {"y"}]


def test_unknown_domains_are_refused(vendors, three, tmp_path):
    refuses("new, old", vendors, OptionError, domain="odd")
    refuses("no domains", three, OptionError, domain="odd")
    load_data(vendors).save(tmp_path / "split.csv")
    refuses("without domain", vendors, OptionError, domain="old", record=tmp_path / "split.csv")
    assert load_data(vendors, record=tmp_path / "split.csv").test.groups is not None
    assert len(load_images(vendors).domains) == 110


# classes with few images


def test_scarce_classes(tmp_path):
    folder = class_folders(tmp_path / "photos", {"cat": 20, "dog": 5})
    refuses('dog|class 1.*scarce="all"', folder, n_per_class=8)
    splits = load_data(folder, n_per_class=8, scarce="all")
    assert splits.train.counts() == {"cat": 8, "dog": 3} and "dog (3)" in splits.description["draw"]
    assert load_data(folder, n_per_class=3, scarce="all").description["draw"].count("all") == 0
    refuses("scarce", folder, OptionError, scarce="some")
    labels = torch.tensor([0, 0, 0, 1])
    assert labels[draw_per_class(labels, 2, scarce="all")].tolist() == [0, 0, 1]
