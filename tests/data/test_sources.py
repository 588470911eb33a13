"""Sources of a user: class folders, CSV lists, lists of published benchmarks, and their bad inputs."""

import json

import numpy as np
import pytest
from image_helpers import class_folders, refuses, sizes, write_image, write_noise

from lion_fast.data import load_data, load_images
from lion_fast.errors import DataError, OptionError


def write_csv(path, rows, header=("path", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (header, *rows)))
    return path


def test_csv_in_another_directory(three, tmp_path, monkeypatch):
    files = sorted(three.rglob("*.png"))
    rows = [(f"../photos/{p.relative_to(three).as_posix()}", p.parent.name) for p in files]
    table = write_csv(tmp_path / "lists" / "all.csv", rows)
    monkeypatch.chdir("/")
    splits = load_data(table)
    assert sizes(splits) == [21, 7, 7] and splits.classes == ["cat", "dog", "eel"]
    image, label = splits.train[20]
    assert image.size == (12, 10) and splits.train.names[20].startswith(f"../photos/{splits.classes[label]}/")


def test_csv_split_column_absolute_paths_bom_and_extra_columns(three):
    files = sorted(three.rglob("*.png"))
    parts = ("train", "validation", "TEST")
    rows = [(i % 3, "note", p, " " + parts[i % 3]) for i, p in enumerate(files)]
    table = write_csv(three / "t.csv", rows, ("Label", "remark", "path", "split"))
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    splits = load_data(table, classes=["a", "b", "c"])
    assert sizes(splits) == [12, 12, 11] and splits.classes == ["a", "b", "c"]
    assert set(splits.val.labels.tolist()) == {1}


def test_csv_integer_labels_are_ordered_as_numbers(tmp_path):
    rows = [(write_image(tmp_path / f"{k}_{i}.png", k).name, k) for k in range(12) for i in range(2)]
    splits = load_data(write_csv(tmp_path / "t.csv", rows), val=0, test=0)
    assert splits.classes == [str(k) for k in range(12)]
    assert [int(n.split("_")[0]) for n in splits.train.names] == splits.train.labels.tolist()


BAD_CSV = [
    ("path,label\n0.png,0\n1.png,2", None, "without gaps; none is 1"),
    ("path,label\n0.png,-1\n1.png,0", None, r"out of range 0\.\.0: -1"),
    ("path,label\n0.png,0\n1.png,3", ["a", "b"], r"out of range 0\.\.1: 3"),
    ("path,label\n0.png,0.5\n1.png,1", None, r"got the numbers 0\.5"),
    ("path,label\n0.png,0\n1.png,cat", None, r"integer labels \(0\) with names \(cat\)"),
    ("path,label\n0.png,cat\n1.png,dog", ["cat", "cow"], r"class\(es\) dog"),
    ("path,label\n0.png,\n1.png,dog", None, "line 2: the label is empty"),
    ("path,label\n0.png,a\n,b", None, "line 3: the path is empty"),
    ("path,label\n0.png,a\n1.png,a", None, "one class only"),
    ("path,label\n0.png,a\n0.png,b", None, r"lists 0\.png twice"),
    ("path,label\n", None, "lists no images"),
    ("path,label\n" + "".join(f"gone{i}.png,{i % 2}\n" for i in range(7)), None, "7 of the 7.*gone4.*2 more"),
    ("file,label\n0.png,a", None, r"column\(s\) path; its first line gives file, label"),
    ("path;label\n0.png;0", None, r"column\(s\) path, label.*comma-separated"),
    ("", None, "gives nothing"),
    (b"\xff\xfe\x00path", None, "not a UTF-8"),
    ("path,label,split\n0.png,a,holdout", None, "line 2: split.*'holdout'"),
    ("path,label,split\n0.png,a,test\n1.png,b,test", None, "no train split"),
]


@pytest.mark.parametrize(("content", "classes", "message"), BAD_CSV)
def test_bad_csv(tmp_path, content, classes, message):
    for k in range(2):
        write_image(tmp_path / f"{k}.png", k)
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, tmp_path / "t.csv", classes=classes)


# folders and images


def test_debris_and_an_empty_class_of_the_val_split_are_fine(three, tmp_path):
    for name in ("__MACOSX/cat", ".thumbnails", "__background__"):
        write_image(three / name / "1.png")
    assert load_data(three).classes == ["__background__", "cat", "dog", "eel"]
    class_folders(tmp_path / "d" / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "d" / "val", {"a": 2, "b": 0})
    assert load_data(tmp_path / "d").description["class_counts"]["val"] == {"a": 2, "b": 0}


def test_bad_folders(tmp_path):
    refuses("neither an existing folder.*fashion-mnist, mnist-5k, elpv, digits", tmp_path / "nowhere")
    refuses("did you mean 'mnist-5k'", "mnist5k")
    refuses("a path or a name; got int", 7, error=OptionError)
    write_image(tmp_path / "flat" / "1.png")
    refuses("no sub-folders; expected one folder per class", tmp_path / "flat")
    refuses(r"is a file but no \.csv", tmp_path / "flat" / "1.png")
    refuses(r"one class only \(cat\)", class_folders(tmp_path / "one", {"cat": 4}))
    root = class_folders(tmp_path / "empty", {"cat": 4, "dog": 4, "eel": 0})
    (root / "eel" / "readme.txt").write_text("later")
    refuses(r"1 class folder\(s\).*hold no image: eel", root)
    write_image(tmp_path / "bare" / "train" / "1.png")
    refuses("has no class sub-folders", tmp_path / "bare")
    for split, names in (("train", "ab"), ("test", "abc")):
        class_folders(tmp_path / "extra" / split, dict.fromkeys(names, 2))
    refuses(r"1 class\(es\).*no readable training image: c", tmp_path / "extra")
    for split in ("val", "validation", "train"):
        class_folders(tmp_path / "double" / split, {"a": 1, "b": 1})
    refuses("two folders for the val split", tmp_path / "double")
    broken = class_folders(tmp_path / "broken", {"cat": 4, "dog": 1})
    (broken / "dog" / "000.png").write_bytes(b"\x00")
    refuses("no readable image: dog", broken)


def test_unreadable_images_are_skipped_counted_and_named(three):
    (three / "cat" / "broken.png").write_bytes(b"not an image")
    whole = write_noise(three / "dog" / "flipped.png", 0).read_bytes()
    (three / "dog" / "flipped.png").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    (three / "eel" / "empty.jpg").write_bytes(b"")
    (three / "eel" / "notes.txt").write_text("not counted as an image")
    (three / "eel" / ".hidden.png").write_bytes(b"x")
    splits = load_data(three)
    skipped = splits.description["skipped"]
    assert skipped["count"] == 3
    assert [s["file"] for s in skipped["files"]] == ["cat/broken.png", "dog/flipped.png", "eel/empty.jpg"]
    assert splits.description["ignored_files"] == 1
    assert sum(sizes(splits)) == 35
    refuses(r"3 of the 38 images.*\(strict\): cat/broken.png", three, strict=True)
    assert sum(sizes(load_data(three, check="none"))) == 38
    refuses("check must be one of header, decode, none", three, check="deep", error=OptionError)


def test_image_cut_off_in_its_middle(three):
    path = write_noise(three / "cat" / "cut.jpg", 1, (200, 200))
    path.write_bytes(path.read_bytes()[:5000])
    more = write_noise(three / "cat" / "trailing.jpg", 2, (200, 200))
    more.write_bytes(more.read_bytes() + bytes(5000))  # as cameras do: whole, with something behind it
    for check in ("header", "decode"):
        splits = load_data(three, check=check)
        assert [s["file"] for s in splits.description["skipped"]["files"]] == ["cat/cut.jpg"]
        refuses("strict", three, check=check, strict=True)
    images = load_images(three, check="none")
    assert len(images) == 37
    images[images.names.index("cat/trailing.jpg")]
    with pytest.raises(DataError, match=r"cat/cut\.jpg cannot be decoded.*check=\"decode\""):
        images[images.names.index("cat/cut.jpg")]


# lists of published benchmarks


def vtab(root, labels, images=True):
    """A task folder of VTAB-1k: {list: its labels}."""
    for split, numbers in labels.items():
        names = [f"images/{split}/{i:06d}.jpg" for i in range(len(numbers))]
        for i, name in enumerate(names if images else ()):
            write_image(root / name, i)
        lines = [f"{name} {k}{' ' * (k % 2)}\r\n" for name, k in zip(names, numbers, strict=True)]
        (root / f"{split}.txt").write_bytes("".join([*lines, "\r\n"]).encode())


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
    for split, n in (("train", 20), ("test", 6)):
        table = {f"{i % 2 + 5}.bird/{split}{i}.png": i % 2 + 5 for i in range(n)}
        for name in table:
            write_image(root / "images" / name)
        (root / f"{split}.json").write_text(json.dumps(table))
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


def birds(root):
    """CUB as published: ids from 1, three lists, a folder per class; class 7 has no 6 before it."""
    images = [(f"{k:03d}.Bird_{k}/{i}.jpg", k, int(i % 3 != 0)) for k in (1, 2, 7) for i in range(6)]
    for name, _, _ in images:
        write_image(root / "images" / name)
    for column, file in enumerate(("images.txt", "image_class_labels.txt", "train_test_split.txt")):
        lines = [f"{number} {row[column]}\r\n" for number, row in enumerate(images, 1)]
        (root / file).write_text("".join(lines))
    return images


def test_birds_as_published(tmp_path):
    images = birds(tmp_path)
    splits = load_data(tmp_path, val=0.25)
    assert splits.classes == ["001.Bird_1", "002.Bird_2", "007.Bird_7"]
    assert sizes(splits) == [9, 3, 6] and splits.description["kind"].startswith("FGVC")
    assert sorted(splits.test.names) == sorted(name for name, _, train in images if not train)
    assert {splits.classes[k] for k in splits.test.labels.tolist()} == set(splits.classes)
    for part in (splits.train, splits.val, splits.test):
        assert [splits.classes[k] for k in part.labels.tolist()] == [n.split("/")[0] for n in part.names]
    shared = [name.replace("002.Bird_2", "shared").replace("007.Bird_7", "shared") for name, _, _ in images]
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
    savemat = pytest.importorskip("scipy.io").savemat
    (tmp_path / where).mkdir(exist_ok=True)
    for split, n in (("train", 4), ("test", 2)):
        names = [f"n0{k}-Dog/{split}_{i}.jpg" for k in (1, 2) for i in range(n)]
        for name in names:
            write_image(tmp_path / "Images" / name)
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = [np.array([name]) for name in names]
        labels = np.array([[int(name[2])] for name in names], dtype=np.uint8)
        savemat(tmp_path / where / f"{split}_list.mat", {"file_list": cells, "labels": labels})
    splits = load_data(tmp_path, val=0.25)
    assert sizes(splits) == [6, 2, 4] and splits.classes == ["n01-Dog", "n02-Dog"]
    assert splits.test.labels.tolist() == [0, 0, 1, 1] and splits.test.names[3] == "n02-Dog/test_1.jpg"
    (tmp_path / where / "train_list.mat").write_bytes(b"no MATLAB file")
    refuses("train_list.mat is no list", tmp_path)
