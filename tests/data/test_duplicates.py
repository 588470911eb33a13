"""Images that stand in two parts or two classes are found, said and named; classes that a part lacks too."""

import numpy as np
import pytest
from image_helpers import refuses, write_noise
from PIL import Image

from lion_fast.data import ArrayImages, ImageSet, load_data
from lion_fast.data.duplicates import find_duplicates
from lion_fast.errors import OptionError


def smooth(path, seed, size=(60, 48)):
    """A photograph of sorts: random colours, smooth over the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image


@pytest.fixture
def parts(tmp_path):
    """train, val and test folders of two classes with 3 images each, no two alike."""
    for p, part in enumerate(("train", "val", "test")):
        for k, name in enumerate("ab"):
            for i in range(3):
                smooth(tmp_path / "d" / part / name / f"{i}.png", 100 * p + 10 * k + i)
    return tmp_path / "d"


def test_the_same_content_under_another_name(parts, capsys):
    clean = load_data(parts, strict=True).description["duplicates"]
    assert clean == {"by": "content", "across": NONE, "labels": NONE}
    copy = (parts / "train" / "a" / "0.png").read_bytes()
    (parts / "test" / "a" / "copy.png").write_bytes(copy)
    (parts / "train" / "a" / "within.png").write_bytes(copy)
    (parts / "train" / "b" / "other.png").write_bytes((parts / "train" / "a" / "1.png").read_bytes())
    splits = load_data(parts)
    found = splits.description["duplicates"]
    (across,), (labels,) = found["across"]["images"], found["labels"]["images"]
    assert across == "train/a/0.png (train) = train/a/within.png (train) = test/a/copy.png (test)"
    assert labels == "train/a/1.png (a) = train/b/other.png (b)"
    assert (found["across"]["count"], found["labels"]["count"]) == (1, 1)
    said = capsys.readouterr().err
    assert "copy.png" in said and "other.png" in said
    refuses("copy.png", parts, strict=True)
    assert len(splits.test) == 7  # they stay
    assert load_data(parts, duplicates="none", strict=True).description["duplicates"]["across"] == NONE
    refuses("content, near, none", parts, duplicates="pixels", error=OptionError)


NONE = {"count": 0, "images": []}


def test_many_are_counted_and_a_few_named(parts):
    for i in range(8):
        write_noise(parts / "train" / "a" / f"n{i}.png", 1000 + i)
        (parts / "val" / "a" / f"m{i}.png").write_bytes((parts / "train" / "a" / f"n{i}.png").read_bytes())
    for i in range(20):
        (parts / "test" / "b" / f"many{i}.png").write_bytes((parts / "test" / "b" / "0.png").read_bytes())
    found = load_data(parts).description["duplicates"]
    assert found["across"]["count"] == 8 and len(found["across"]["images"]) == 5
    assert found["labels"] == NONE  # 21 times the same, in one part and class


@pytest.mark.parametrize("seed", range(3))
def test_nearly_the_same(parts, seed):
    image = smooth(parts / "train" / "a" / "0.png", 7 + seed)
    image.save(parts / "test" / "a" / "anew.jpg", quality=60)
    image.resize((30, 24)).save(parts / "val" / "a" / "smaller.png")
    image.point(lambda value: value // 2).save(parts / "val" / "b" / "darker.png")
    assert load_data(parts).description["duplicates"]["across"] == NONE
    found = load_data(parts, duplicates="near").description["duplicates"]
    (across,) = found["across"]["images"]
    assert {"train/a/0.png", "test/a/anew.jpg", "val/a/smaller.png"} == set(across.split()[0:9:3])
    assert found["labels"] == NONE


@pytest.mark.parametrize("how", ["content", "near"])
def test_pixels_in_memory_and_images_that_were_left_out(how):
    array = np.random.default_rng(0).integers(0, 256, (8, 20, 20), dtype=np.uint8)
    array[5], array[6], array[7] = array[0], 0, 0
    there = np.arange(8) < 6
    images = ImageSet(ArrayImages(array, there), [0, 0, 1, 1, 0, 1, 0, 1], ["a", "b"])
    found = find_duplicates(
        {"train": images.subset(range(4)), "val": None, "test": images.subset(range(4, 8))}, how
    )
    assert found["across"] == {"count": 1, "images": ["0 (train) = 5 (test)"]}
    assert found["labels"]["images"] == ["0 (a) = 5 (b)"]


def test_a_part_that_lacks_classes_is_said(tmp_path, capsys):
    for k in range(12):
        for i in range(4):
            write_noise(tmp_path / "d" / f"c{k:02d}" / f"{i}.png", 10 * k + i, (12, 10))
    splits = load_data(tmp_path / "d", n_train=5)
    said = capsys.readouterr().err
    assert sum(not n for n in splits.train.counts().values()) == 7
    assert "7 of 12 classes have no train image: c05" in said and "no val image" not in said
    load_data(tmp_path / "d", n_train=12, n_val=3, seed=1)
    assert "9 of 12 classes have no val image" in capsys.readouterr().err
