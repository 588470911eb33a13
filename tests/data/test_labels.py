"""Labels meet class names: in every layout, and however they are written."""

import json

import numpy as np
import pytest
import torch
from image_helpers import birds, class_folders, dogs, fgvc, refuses, vtab, write_csv, write_image

from lion_fast.data import ArrayImages, ImageSet, draw_per_class, draw_total, load_data, load_images
from lion_fast.errors import DataError, OptionError


def listed(folder, labels):
    """A CSV file of one image for each label."""
    rows = [(write_image(folder / f"{i}.png", i).name, label) for i, label in enumerate(labels)]
    return write_csv(folder / "t.csv", rows)


def parts(root):
    for part in ("train", "test"):
        class_folders(root / part, {"cat": 2, "dog": 2, "eel": 2})


LAYOUTS = {
    "folders": lambda root: class_folders(root, {"cat": 2, "dog": 2, "eel": 2}),
    "part folders": parts,
    "CSV": lambda root: listed(root, ["cat", "dog", "eel", "dog"]),
    "CSV of integers": lambda root: listed(root, [2, 0, 1, 1]),
    "VTAB": lambda root: vtab(root, {name: [2, 0, 1] for name in ("train800", "val200", "test")}),
    "FGVC": fgvc,
    "birds": birds,
    "dogs": dogs,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_meet_classes_by_name(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "d")
    source = tmp_path / "d" / "t.csv" if "CSV" in layout else tmp_path / "d"

    def told(images):
        return {n: images.classes[k] for n, k in zip(images.names, images.labels.tolist(), strict=True)}

    plain = load_images(source)
    right, names = told(plain), plain.classes
    assert set(right.values()) == set(names)
    for classes in (names[::-1], [*names, "other"], ["other", *names[::-1]]):
        images = load_images(source, classes=classes)
        assert images.classes == classes and told(images) == right
        assert load_data(source, classes=classes).classes == classes
    with pytest.raises(DataError, match=f"{names[0]}.*not among"):
        load_images(source, classes=names[1:])


def test_integers_among_the_names_are_names(tmp_path):
    images = load_images(listed(tmp_path, [1, 1, 2, 2]), classes=["1", "2", "3"])
    assert images.counts() == {"1": 2, "2": 2, "3": 0}
    # where no class is an integer they count the classes
    images = load_images(tmp_path / "t.csv", classes=["cat", "dog", "eel"])
    assert images.counts() == {"cat": 0, "dog": 2, "eel": 2}
    refuses("1.*not among", tmp_path / "t.csv", classes=["0", "cat", "2"])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["00", "01", "10", "01"], ["00", "01", "10"]),  # names of one width
        (["٠", "١", "٠", "١"], ["٠", "١"]),  # digits of another script are names
        (["nan", "inf", "nan"], ["inf", "nan"]),
        (["0", "1", "2", "10"], None),
        (["00", "0", "1", "01"], None),
        (["0", "1", "0_1"], None),
        (["0", "1", "+1"], None),
        (["0", "1", "١"], None),
        (["0", "1", "1e0"], None),
        (["0.0", "1.0"], None),
        (["1_0", "0"], None),
        (["0", "1000000000"], None),  # no list as long as the largest
        (["0", "9" * 5000], None),
    ],
)
def test_what_an_integer_is(tmp_path, labels, classes):
    table = listed(tmp_path, labels)
    if classes is None:
        refuses("labels", table)
    else:
        assert load_images(table).classes == classes
    given = sorted(set(labels))[::-1]  # a model's names, whatever they look like
    images = load_images(table, classes=given)
    assert [given[k] for k in images.labels.tolist()] == labels


@pytest.mark.parametrize(
    "classes", [["k0", "k0"], [], ["a", ""], ["a", " "], [1, 2], "ab", 7, ["a", None], {"a": 1}]
)
@pytest.mark.parametrize("source", ["folder", "digits"])
def test_classes_must_be_names(tmp_path, classes, source):
    folder = class_folders(tmp_path / "d", {"a": 2, "b": 2})
    for load in (load_data, load_images):
        with pytest.raises(OptionError, match="classes"):
            load(folder if source == "folder" else source, classes=classes)


def test_classes_that_look_alike_are_named(tmp_path, capsys):
    load_images(listed(tmp_path / "a", ["Cat", "dog", "cat"]))
    assert "'Cat' and 'cat'" in capsys.readouterr().err
    load_images(listed(tmp_path / "b", ["caf\u00e9", "dog", "cafe\u0301"]))
    assert r"'cafe\u0301' and 'caf\xe9'" in capsys.readouterr().err
    load_images(class_folders(tmp_path / "c", {"cat": 1, "cat ": 1}))
    assert "'cat' and 'cat '" in capsys.readouterr().err
    load_images(class_folders(tmp_path / "d", {"cat": 1, "1e5": 1, "caf\u00e9, old": 1}))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("label", ["-1", "1.0", "00", "0_1", "²", "1000000000", "4000000", "x"])
def test_labels_of_a_vtab_list(tmp_path, label):
    vtab(tmp_path, {name: [0, 1] for name in ("train800", "val200", "test")})
    lines = (tmp_path / "train800.txt").read_text().splitlines()
    (tmp_path / "train800.txt").write_text(f"{lines[0].split()[0]} {label}\n{lines[1]}\n")
    refuses("label", tmp_path)


def test_vtab_labels_from_one_are_said(tmp_path, capsys):
    vtab(tmp_path, {name: [1, 2] for name in ("train800", "val200", "test")})
    assert load_data(tmp_path).classes == ["0", "1", "2"]
    assert "none of the lists has the label(s) 0" in capsys.readouterr().err


@pytest.mark.parametrize("label", [True, 1.0, -1, "01", "1.5", "x", None, [1], {"a": 1}, 10**30])
def test_class_ids_of_a_json_list(tmp_path, label):
    write_image(tmp_path / "a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps({"a.png": label}))
    refuses("train.json", tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "[1]", "5", "null", "{", "", '{"a.png": 1, "a.png": 2}', "[" * 100_000]
)
def test_json_that_is_no_list_of_images(tmp_path, text):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    (tmp_path / "train.json").write_text(text)
    refuses("a.png|train.json|no images", tmp_path)


@pytest.mark.parametrize("label", [1.5, -1.0, float("nan"), 1e12])
def test_class_ids_of_a_matlab_list(tmp_path, label):
    savemat = pytest.importorskip("scipy.io").savemat
    dogs(tmp_path)
    names = np.empty((1, 1), dtype=object)
    names[0, 0] = np.array(["n01-Dog/train_0.jpg"])
    savemat(tmp_path / "train_list.mat", {"file_list": names, "labels": np.array([[label]])})
    refuses("train_list.mat is no list", tmp_path)


@pytest.mark.parametrize(
    "labels", [[0.5, 1.2], [True, False], [-1, 0], [0, 10**9], [0, 10**30], ["a", "b"], [[0], [1]], [None, 0]]
)
def test_labels_of_a_set_are_whole_numbers(labels):
    images = ArrayImages(np.zeros((2, 4, 4), np.uint8))
    for use in (lambda: ImageSet(images, labels, ["a", "b"]), lambda: draw_per_class(labels, 1)):
        with pytest.raises(DataError, match="labels"):
            use()
    for dtype in (torch.int32, torch.uint8):
        assert ImageSet(images, torch.tensor([0, 1], dtype=dtype), ["a", "b"]).labels.dtype == torch.int64
        assert draw_total(torch.tensor([0, 1], dtype=dtype), 2).tolist() == [0, 1]
