"""The list layouts of published sets: VTAB-1k, and FGVC in those of VPT and SSF."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lion_fast.data.draws import MOST_CLASSES
from lion_fast.data.sources import WHOLE, Item, Listed, number_labels, some
from lion_fast.errors import DataError
from lion_fast.files import say_once

# of every list, what stands behind the image's id, in words and as a pattern
BIRD_LISTS = {
    "images.txt": ("path", r".+"),
    "image_class_labels.txt": ("CLASS", WHOLE),
    "train_test_split.txt": ("0 or 1", r"[01]"),
}
VTAB_LISTS = {
    "train800": "train800.txt", "val200": "val200.txt", "train1000": "train800val200.txt", "test": "test.txt",
}  # fmt: skip


def read_vtab(root: Path, classes: Sequence[str] | None, val: float, test: float) -> Listed:
    """One task folder of VTAB-1k: train800.txt, val200.txt, train800val200.txt, test.txt.

    Lines are `images/<split>/000000.jpg LABEL`. With val = 0 the 1,000 images of train800val200.txt are the
    training split, as in the protocol's final run; with test = 0 no test image is opened, only the labels of
    its list are looked at, because the number of classes is the same in every part.
    """
    lists = {"train": VTAB_LISTS["train800"], "val": VTAB_LISTS["val200"]}
    if not val:
        lists = {"train": VTAB_LISTS["train1000"]}
    if test:
        lists["test"] = VTAB_LISTS["test"]
    items = [item for split, name in lists.items() for item in vtab_list(root, name, split)]
    about = {"kind": "VTAB-1k task", "lists": lists}
    if classes is not None:
        return Listed(*number_labels(items, root, classes), about, gaps=True)
    there = [name for name in VTAB_LISTS.values() if (root / name).is_file()]
    # A task's label set is fixed; a class may be absent from 800 images but not from the whole.
    labels = {int(item.label) for name in there for item in vtab_list(root, name, "")}
    if max(labels) >= MOST_CLASSES:
        raise DataError(f"{root}: the label {max(labels)} is none of a class; labels count from 0")
    names = [str(k) for k in range(max(labels) + 1)]
    if "test" in lists and (absent := [name for k, name in enumerate(names) if k not in labels]):
        say_once(f"{root}: labels count from 0, and none of the lists has the label(s) {some(absent)}")
    return Listed(items, names, about, gaps=True)


def vtab_list(root: Path, name: str, split: str) -> list[Item]:
    """The items of one list of a VTAB-1k task folder; the images are not looked at."""
    items = []
    for place, line in _lines(root / name, "a VTAB-1k task folder needs it"):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not re.fullmatch(WHOLE, words[1]):
            raise DataError(f"{place}: expected 'path LABEL', LABEL an integer from 0; got {line!r}")
        items.append(Item(root / words[0], words[0], words[1], split))
    if not items:
        raise DataError(f"{root / name} lists no images")
    return items


def _lines(path: Path, needed: str) -> Iterator[tuple[str, str]]:
    """The lines of a list that are not empty, each with its place for an error."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {needed}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no list in UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def read_fgvc(root: Path, classes: Sequence[str] | None = None) -> Listed:
    """FGVC in the layout of VPT: train.json, [val.json], test.json map an image path to a class id."""
    items = []
    folders = [f for f in (root / "images", root / "Images", root) if f.is_dir()]
    for split in ("train", "val", "test"):
        path = root / f"{split}.json"
        if not path.is_file():
            continue
        for name, label in _class_ids(path):
            found = next((f / name for f in folders if os.path.isfile(f / name)), folders[0] / name)
            items.append(Item(found, name, label, split))
    ids = sorted({i.label for i in items}, key=int)
    return Listed(items, ids, {"kind": "FGVC lists (train.json, test.json)"})


def _class_ids(path: Path) -> list[tuple[str, str]]:
    """(image path, class id) of a JSON object; an id is a whole number, or one as text."""
    try:
        # pairs: of a path that stands there twice a dict would keep the last
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: pairs)
        pairs = [(name, str(label) if type(label) in (int, str) else repr(label)) for name, label in pairs]
        wrong = [f"{name}: {label}" for name, label in pairs if not re.fullmatch(WHOLE, label)]
        if wrong:
            raise ValueError(f"no class id from 0 are {some(wrong)}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON object of image path -> class id: {error}") from error
    return pairs


def read_birds(root: Path, classes: Sequence[str] | None = None) -> Listed:
    """CUB-200-2011 and NABirds as published, which SSF reads: three lists beside images/, by image id.

    images.txt: `ID path`; image_class_labels.txt: `ID class`; train_test_split.txt: `ID 1` for training,
    `ID 0` for test. Classes are numbered in the order of their published ids, which need not be contiguous;
    they are named by their folders where each has one of its own.
    """
    tables = {}
    for name, (wanted, pattern) in BIRD_LISTS.items():
        table = tables[name] = {}
        for place, line in _lines(root / name, f"the layout needs {', '.join(BIRD_LISTS)} and images/"):
            key, *value = line.split(maxsplit=1)
            if not value or not re.fullmatch(pattern, value[0]):
                raise DataError(f"{place}: expected 'ID {wanted}', got {line!r}")
            if key in table:
                raise DataError(f"{place}: the image {key} is listed twice")
            table[key] = value[0]
    files, labels, parts = tables.values()
    for name, table in tables.items():
        unequal = sorted(files.keys() ^ table.keys())
        if unequal:
            raise DataError(
                f"{root}: images.txt and {name} list different images: {some(unequal)} in one only"
            )
    items = [
        Item(root / "images" / file, file, labels[key], "train" if parts[key] == "1" else "test")
        for key, file in files.items()
    ]
    return _by_folder(items, "FGVC lists (images.txt, train_test_split.txt)")


def read_dogs(root: Path, classes: Sequence[str] | None = None) -> Listed:
    """Stanford Dogs as published, which SSF reads: train_list.mat and test_list.mat beside Images/.

    The lists may also lie in lists/. They are MATLAB files: reading them needs scipy.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"{root} has its lists as MATLAB files, which scipy reads: pip install scipy, or list the images "
            "in a CSV file (path,label,split)"
        ) from error
    folder = next((f for f in (root / "Images", root / "images") if f.is_dir()), root / "Images")
    items = []
    for split in ("train", "test"):
        path = root / f"{split}_list.mat"
        if not path.is_file() and (root / "lists" / path.name).is_file():
            path = root / "lists" / path.name
        try:
            table = loadmat(path, variable_names=["file_list", "labels"])
            names = [str(entry.item()) for entry in table["file_list"].ravel()]
            labels = [f"{label:g}" for label in table["labels"].ravel()]
            if wrong := [label for label in labels if not re.fullmatch(WHOLE, label)]:
                raise ValueError(f"no class id is {some(wrong)}")
            items += [Item(folder / n, n, k, split) for n, k in zip(names, labels, strict=True)]
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing; the layout needs train_list.mat and test_list.mat"
            ) from error
        except Exception as error:  # scipy raises many kinds on a file that is none of its own
            raise DataError(f"{path} is no list with file_list and labels: {error!r}") from error
    return _by_folder(items, "FGVC lists (train_list.mat, test_list.mat)")


# The layouts of published sets: whose files tell which reader's.
PUBLISHED: dict[Callable[..., Listed], list[tuple[str, ...]]] = {
    read_vtab: [(VTAB_LISTS["train800"],), (VTAB_LISTS["train1000"],)],
    read_fgvc: [("train.json",)],
    read_birds: [("images.txt", "train_test_split.txt")],
    read_dogs: [("train_list.mat",), ("lists/train_list.mat",)],
}


def _by_folder(items: list[Item], kind: str) -> Listed:
    """Items with class ids, named by the ids' own folders where folders and ids agree."""
    ids = sorted({i.label for i in items}, key=int)
    folders = {(i.label, Path(i.name).parent.name) for i in items}
    names = dict(folders)
    if len(folders) != len(ids) or len(set(names.values())) != len(ids) or "" in names.values():
        names = {k: k for k in ids}
    items = [replace(item, label=names[item.label]) for item in items]
    return Listed(items, [names[k] for k in ids], {"kind": kind})
