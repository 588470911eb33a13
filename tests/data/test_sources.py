"""Sources of a user: class folders, CSV lists, and their bad inputs."""

import json
import os
from pathlib import Path

import pytest
from image_helpers import (
    birds,
    class_folders,
    fgvc,
    refuses,
    sizes,
    vtab,
    write_csv,
    write_image,
    write_noise,
)

from lion_fast.commands.common import find_images
from lion_fast.data import load_data, load_images
from lion_fast.errors import DataError, OptionError


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
    ("path,label\n0.png,-1\n1.png,0", None, r"got the numbers -1"),
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
    ("path,label\n0.png,a\n./0.png,b", None, "twice"),
    ("path,label\n0.png,a\nno/../0.png,b", None, "do not exist|twice"),
    ("path,label\n0.png,a\nlink.png,b", None, "0.png twice.*link.png"),
    ("path,label,label\n0.png,a,b\n1.png,b,a", None, "label.*twice"),
    ("path,label\n0.png,a,train\n1.png,b,test", None, "line 2: more cells"),
    ("path,label,split\n0.png,a\n1.png,b,test", None, "line 2: split"),
    ("path\tlabel\n0.png\ta", None, "comma-separated"),
    ("sep=;\npath;label\n0.png;a", None, "comma-separated"),
    ("path,label\n0.png,a\n1.png,b".encode("utf-16"), None, "not a UTF-8"),
    ("path,label\n0.png,a\n.,b", None, r"1 of the 2.*: \."),
    ("path,label\n0.png,a\n..\\1.png,b", None, "separator of folders is /"),
    ("path,label\n0.png,a\n\0.png,b", None, "do not exist|not a UTF-8"),
    (f"path,label\n0.png,a\n{'x' * 5000}.png,b", None, "do not exist"),
    (f"path,label\n0.png,{'x' * 200_000}\n1.png,b", None, "not a UTF-8"),
]


@pytest.mark.parametrize(("content", "classes", "message"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_bad_csv(tmp_path, content, classes, message):
    for k in range(2):
        write_image(tmp_path / f"{k}.png", k)
    (tmp_path / "link.png").symlink_to("0.png")
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, tmp_path / "t.csv", classes=classes)


def test_csv_as_spreadsheets_and_editors_write_it(tmp_path):
    for name in ("a, b.png", "line\nbreak.png", "c.PNG", "caf\u00e9.png"):
        write_image(tmp_path / name)
    rows = [
        "Path , Label,",
        '"a, b.png",cat ,',
        '"line\nbreak.png",dog,',
        "",
        ", ,",
        "c.PNG, cat",
        "caf\u00e9.png,dog",
    ]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    images = load_images(tmp_path / "t.csv")
    assert images.names == ["a, b.png", "line\nbreak.png", "c.PNG", "caf\u00e9.png"]
    assert images.labels.tolist() == [0, 1, 0, 1] and images.classes == ["cat", "dog"]


@pytest.mark.parametrize("layout", ["VTAB", "FGVC", "birds", "folder"])
def test_one_file_under_two_names_is_refused(tmp_path, layout):
    root = tmp_path / "d"
    if layout == "VTAB":
        vtab(root, {name: [0, 1] for name in ("train800", "val200", "test")})
        lines = (root / "train800.txt").read_text().splitlines()
        (root / "test.txt").write_text("".join(f"./{line}\n" for line in lines if line))
    elif layout == "FGVC":
        fgvc(root)
        (root / "test.json").write_text('{"x/../5.bird/train0.png": 5}')
        (root / "images" / "x").mkdir()
    elif layout == "birds":
        (first, *_), text = birds(root), (root / "images.txt").read_text()
        (root / "images.txt").write_text(text.replace(f"2 {first[0][:-5]}1.jpg", f"2 ./{first[0]}"))
    else:
        class_folders(root, {"cat": 2, "dog": 2})
        (root / "dog" / "again.png").symlink_to("../cat/000.png")
    refuses("twice", root)


# folders and images


def test_debris_and_an_empty_class_of_the_val_split_are_fine(three, tmp_path):
    for name in ("__MACOSX/cat", "lost+found", ".thumbnails", "__background__"):
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


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["train/cat", "train/dog", "val/cat", "val/dog", "extra/cat", "extra/dog"],
            "train, val.*beside extra",
        ),
        (["Train/cat", "Train/dog", "rest/cat", "rest/dog"], "Train.*beside rest"),
        (["train2017/cat", "train2017/dog", "val2017/cat", "val2017/dog"], "train2017, val2017"),
        (["test_images/cat", "test_images/dog", "cat"], "test_images.*beside cat"),
        (["val/cat", "val/dog", "test/cat", "test/dog"], "no train split"),
        (["train", "test"], "no class sub-folders"),
    ],
)
def test_parts_are_never_classes(tmp_path, names, match):
    refuses(match, class_folders(tmp_path / "d", dict.fromkeys(names, 2)))


@pytest.mark.parametrize(
    "names", [["test", "cat"], ["train", "bus"], ["testing ground/a", "testing ground", "x"]]
)
def test_a_class_may_be_called_like_a_part(tmp_path, names):
    images = load_images(class_folders(tmp_path / "d", dict.fromkeys(names, 2)))
    assert images.classes == sorted({name.split("/")[0] for name in names}) and len(images) == 2 * len(names)


def test_linked_folders_are_read(tmp_path):
    class_folders(tmp_path / "elsewhere", {"cats/deep": 2, "dogs": 3})
    root = class_folders(tmp_path / "d", {"cat": 2, "dog": 1})
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "eel").symlink_to(tmp_path / "elsewhere" / "dogs")
    images = load_images(root)
    assert images.counts() == {"cat": 4, "dog": 1, "eel": 3}
    assert images.names[2] == "cat/more/deep/000.png" and len(set(images.names)) == 8
    images.image(2)
    assert find_images([str(root)]) == [root / name for name in images.names]  # what predict reads


@pytest.mark.parametrize(
    ("place", "target", "match"),
    [
        ("cat/loop", "..", "a folder that holds it"),
        ("cat/loop", ".", "a folder that holds it"),
        ("loop", ".", "a folder that holds it"),
        ("loop", "/", "a folder that holds it"),
        ("cat/again", "../dog", "twice"),
        ("again", "cat", "twice"),
        ("cat/gone.png", "nowhere.png", "gone.png is a link to nothing"),
        ("cat/gone", "nowhere", "gone is a link to nothing"),
        ("gone", "nowhere", "gone is a link to nothing"),
        ("cat/itself", "itself", "itself is a link to nothing"),
    ],
)
def test_links_that_lead_nowhere_or_back(tmp_path, place, target, match):
    root = class_folders(tmp_path / "d", {"cat": 2, "dog": 2})
    (root / place).symlink_to(target)
    refuses(match, root)


def test_a_folder_that_cannot_be_listed(three, monkeypatch):
    listing = Path.iterdir

    def iterdir(path):
        if path.name == "dog":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # root may list every folder
    refuses("dog cannot be read: Permission denied", three)


def test_names_that_are_not_utf_8(tmp_path):
    root = class_folders(tmp_path / "d", {"cat": 3, "dog": 3})
    for name in (b"cat/\xff\xfe.png", b"cat/new\nline.png", b"\xe9/0.png"):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        write_image(path)
    splits = load_data(root, val=0, test=0)
    assert splits.train.names[-1] == os.fsdecode(b"\xe9/0.png") and len(splits.train) == 9
    json.loads(json.dumps(splits.description))


def test_files_that_are_passed_over_are_named(three, capsys):
    for name in ("loose.png", "cat/photo.heic", "cat/.hidden"):
        (three / name).write_bytes(b"")
    assert load_data(three).description["ignored_files"] == 2
    assert "2 file(s) that are no images of a class: loose.png, cat/photo.heic" in capsys.readouterr().err


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
