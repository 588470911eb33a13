"""Lists of published benchmarks, and what is wrong in them."""

import pytest
from image_helpers import birds, dogs, fgvc, refuses, sizes, vtab, write_image

from lion_fast.data import load_data, load_images


def test_vtab_task_folder(tmp_path):
    root = tmp_path / "vtab-1k" / "cifar"
    parts = {"train800": 8, "val200": 4, "train800val200": 12, "test": 6}
    vtab(root, {split: [i % 3 for i in range(n)] for split, n in parts.items()})
    splits = load_data(root)
    assert sizes(splits) == [8, 4, 6] and splits.classes == ["0", "1", "2"]
    assert splits.train.names[3] == "images/train800/000003.jpg" and splits.train.labels[3] == 0
    final = load_data(root, val=0)
    assert sizes(final) == [12, 0, 6] and final.train.names[0].startswith("images/train800val200/")
    (root / "val200.txt").write_text("images/val200/000000.jpg cat\n")
    refuses(r"val200.txt, line 1: expected 'path LABEL'", root)
    (root / "val200.txt").unlink()
    refuses(r"val200.txt is missing", root)


def test_fgvc_folder(tmp_path):
    root = tmp_path / "CUB"
    fgvc(root)
    splits = load_data(root, val=0.1)
    assert sizes(splits) == [18, 2, 6] and splits.classes == ["5", "6"]
    assert [int(n[0]) - 5 for n in splits.test.names] == splits.test.labels.tolist()
    (root / "test.json").write_text('["a.png"]')
    refuses(r"test.json is not a JSON object", root)


def test_vtab_without_its_test_list(tmp_path):
    root = tmp_path / "task"
    vtab(root, {"train800": [0, 1, 0], "val200": [1, 0]})
    vtab(root, {"test": [0, 1, 2]}, images=False)
    tune = load_data(root, test=0)  # none of the test images exists
    assert sizes(tune) == [3, 2, 0]
    assert tune.description["lists"] == {"train": "train800.txt", "val": "val200.txt"}
    assert tune.classes == ["0", "1", "2"]  # a class that only the test list has is a class
    assert len(load_images(root, split="val")) == 2
    refuses("3 of the 8 images listed by .* do not exist: images/test/000000.jpg", root)
    (root / "test.txt").write_text("\n")
    refuses("test.txt lists no images", root, test=0)


def test_birds_as_published(tmp_path):
    images = birds(tmp_path)
    splits = load_data(tmp_path, val=0.25)
    assert splits.classes == ["001.Bird_1", "002.Bird_2", "007.Bird_7"]
    assert sizes(splits) == [9, 3, 6] and splits.description["kind"].startswith("FGVC")
    assert sorted(splits.test.names) == sorted(name for name, _, train in images if not train)
    assert {splits.classes[k] for k in splits.test.labels.tolist()} == set(splits.classes)
    for part in (splits.train, splits.val, splits.test):
        assert [splits.classes[k] for k in part.labels.tolist()] == [n.split("/")[0] for n in part.names]
    shared = [
        name.replace("002.Bird_2/", "shared/a").replace("007.Bird_7/", "shared/b") for name, _, _ in images
    ]
    for i, name in enumerate(shared):  # two ids in one folder: the ids are the names
        write_image(tmp_path / "images" / name)
        shared[i] = f"{i + 1} {name}"
    (tmp_path / "images.txt").write_text("\n".join(shared))
    assert load_data(tmp_path).classes == ["1", "2", "7"]


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("image_class_labels.txt", "1 cat\n", "line 1: expected 'ID CLASS', got '1 cat'"),
        ("train_test_split.txt", "1 2\n", "line 1: expected 'ID 0 or 1', got '1 2'"),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "line 2: the image 1 is listed twice"),
        ("image_class_labels.txt", "1 1\n", "list different images: 10, 11, 12, 13, 14 and 12 more"),
        ("image_class_labels.txt", None, "image_class_labels.txt is missing"),
    ],
)
def test_birds_with_wrong_lists(tmp_path, file, text, match):
    birds(tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    refuses(match, tmp_path)


@pytest.mark.parametrize("where", ["", "lists"])
def test_stanford_dogs_as_published(tmp_path, where):
    dogs(tmp_path, where)
    splits = load_data(tmp_path, val=0.25)
    assert sizes(splits) == [6, 2, 4] and splits.classes == ["n01-Dog", "n02-Dog"]
    assert splits.test.labels.tolist() == [0, 0, 1, 1] and splits.test.names[3] == "n02-Dog/test_1.jpg"
    (tmp_path / where / "train_list.mat").write_bytes(b"no MATLAB file")
    refuses("train_list.mat is no list", tmp_path)
