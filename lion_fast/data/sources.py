"""A user's own images: class folders, CSV lists, and the list layouts of VTAB-1k and FGVC."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_fast.data.images import EXTENSIONS, FileImages, ImageSet, problem_of
from lion_fast.errors import DataError

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# of every list, what stands behind the image's id, in words and as a pattern
BIRD_LISTS = {
    "images.txt": ("path", r".+"),
    "image_class_labels.txt": ("CLASS", r"\d+"),
    "train_test_split.txt": ("0 or 1", r"[01]"),
}
SHOWN = 5


@dataclass
class Raw:
    """What a source holds before it is split: `parts` is {"all": ...} or {"train": ..., "test": ...}."""

    parts: dict[str, ImageSet]
    classes: list[str]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One listed image: its file, its name in reports, its label as written, its split."""

    path: Path
    name: str
    label: str | int
    split: str = "all"


@dataclass
class Listed:
    """What a reader found, before any image is looked at. gaps: a class may lack training images."""

    items: list[Item]
    classes: list[str]
    about: dict[str, Any]
    gaps: bool = False


def some(values: Iterable[object]) -> str:
    """The first few values and how many more there are."""
    values = [str(v) for v in values]
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(values[:SHOWN]) + more


def read_folder(root: Path, classes: Sequence[str] | None) -> Listed:
    """Class sub-folders, with or without train / val / test folders above them."""
    subfolders = _subfolders(root)
    if not subfolders:
        raise DataError(
            f"{root} has no sub-folders; expected one folder per class ({root.name}/cat/1.jpg), "
            "or train/, val/ and test/ folders that hold one folder per class"
        )
    names = {f.name.lower() for f in subfolders}
    about: dict[str, Any] = {"kind": "image folder"}
    roots = {"all": root}
    if "train" in {SPLIT_NAMES.get(n) for n in names} and names <= set(SPLIT_NAMES):
        roots = {}
        for folder in subfolders:
            split = SPLIT_NAMES[folder.name.lower()]
            if split in roots:
                raise DataError(
                    f"{root} has two folders for the {split} split: {roots[split].name}, {folder.name}"
                )
            roots[split] = folder
        about["kind"] = "image folder with split folders"
    items, empty = [], {}
    ignored = sum(
        p.is_file() and not _hidden(p.relative_to(root)) for top in roots.values() for p in top.iterdir()
    )
    for split, top in roots.items():
        folders = _subfolders(top)
        if not folders:
            raise DataError(f"{top} has no class sub-folders; expected for example {top.name}/cat/1.jpg")
        for folder in folders:
            files = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
            images = [p for p in files if p.suffix.lower() in EXTENSIONS]
            ignored += len(files) - len(images)
            if not images:
                empty.setdefault(split, []).append(folder.name)
            items += [Item(p, p.relative_to(root).as_posix(), folder.name, split) for p in images]
    about["ignored_files"] = ignored
    found = sorted({folder.name for top in roots.values() for folder in _subfolders(top)})
    needed = empty.get("all", []) + empty.get("train", [])
    if needed and classes is None:
        raise DataError(
            f"{len(needed)} class folder(s) of {root} hold no image: {some(needed)}; fill or remove them "
            f"(image files end in {', '.join(EXTENSIONS)})"
        )
    return Listed(items, found, about)


def read_csv(path: Path, classes: Sequence[str] | None) -> Listed:
    """A table with the columns path, label and, if wanted, split; paths relative to the file's folder."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [(c or "").strip().lower() for c in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader if any(v for v in row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a UTF-8 comma-separated table: {error}") from error
    missing = [c for c in ("path", "label") if c not in columns]
    if missing:
        raise DataError(
            f"{path} lacks the column(s) {', '.join(missing)}; its first line gives "
            f"{', '.join(columns) or 'nothing'}. "
            "Expected a comma-separated first line: path,label or path,label,split"
        )
    if not rows:
        raise DataError(f"{path} lists no images below its first line")
    items, seen = [], {}
    for line, row in rows:
        name, label = ((row[c] or "").strip() for c in ("path", "label"))
        if not name or not label:
            raise DataError(f"{path}, line {line}: the {'path' if not name else 'label'} is empty")
        split = "all"
        if "split" in columns:
            written = (row["split"] or "").strip()
            if written.lower() not in SPLIT_NAMES:
                raise DataError(f"{path}, line {line}: split must be train, val or test; got {written!r}")
            split = SPLIT_NAMES[written.lower()]
        if name in seen:
            raise DataError(
                f"{path} lists {name} twice ({seen[name]} and {split}/{label}); "
                "an image may appear once, in one split"
            )
        seen[name] = f"{split}/{label}"
        items.append(Item(path.parent / name, name, label, split))
    return Listed(*number_labels(items, path, classes), {"kind": "CSV"})


def number_labels(
    items: list[Item], source: Path, classes: Sequence[str] | None
) -> tuple[list[Item], list[str]]:
    """Labels as class names: integers 0..K-1 without gaps, or names, never a mixture."""
    written = {str(item.label) for item in items}
    integers = {w for w in written if _number(w) is int}
    wrong = sorted(w for w in written if _number(w) is float)
    if wrong:
        raise DataError(f"{source}: labels must be integers 0..K-1 or names; got the numbers {some(wrong)}")
    if integers and integers != written:
        raise DataError(
            f"{source} mixes integer labels ({some(sorted(integers))}) with names "
            f"({some(sorted(written - integers))}); use one or the other"
        )
    if not integers:
        return items, sorted(written)
    numbers = sorted({int(w) for w in integers})
    count = numbers[-1] + 1 if classes is None else len(classes)
    outside = [n for n in numbers if not 0 <= n < count]
    if outside:
        raise DataError(f"{source}: labels out of range 0..{count - 1}: {some(outside)}")
    absent = sorted(set(range(min(count, numbers[-1] + 1))) - set(numbers))
    if absent and classes is None:
        raise DataError(
            f"{source}: integer labels must be 0..{count - 1} without gaps; none is {some(absent)}. "
            "Renumber them, use names, or give the full list of classes"
        )
    names = [str(k) for k in range(count)] if classes is None else [str(c) for c in classes]
    return [Item(i.path, i.name, names[int(i.label)], i.split) for i in items], names


def _number(text: str) -> type | None:
    for kind in (int, float):
        try:
            kind(text)
        except ValueError:
            continue
        return None if text.lower().lstrip("+-") in ("nan", "inf", "infinity") else kind
    return None


VTAB_LISTS = {
    "train800": "train800.txt", "val200": "val200.txt", "train1000": "train800val200.txt", "test": "test.txt",
}  # fmt: skip


def read_vtab(root: Path, val: float, test: float) -> Listed:
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
    there = [name for name in VTAB_LISTS.values() if (root / name).is_file()]
    # A task's label set is fixed; a class may be absent from 800 images but not from the whole.
    largest = max(int(item.label) for name in there for item in vtab_list(root, name, ""))
    classes = [str(k) for k in range(largest + 1)]
    return Listed(items, classes, {"kind": "VTAB-1k task", "lists": lists}, gaps=True)


def vtab_list(root: Path, name: str, split: str) -> list[Item]:
    """The items of one list of a VTAB-1k task folder, labels as integers; the images are not looked at."""
    items = []
    for place, line in _lines(root / name, "a VTAB-1k task folder needs it"):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdigit():
            raise DataError(f"{place}: expected 'path LABEL', got {line!r}")
        items.append(Item(root / words[0], words[0], int(words[1]), split))
    if not items:
        raise DataError(f"{root / name} lists no images")
    return items


def _lines(path: Path, needed: str) -> Iterator[tuple[str, str]]:
    """The lines of a list that are not empty, each with its place for an error."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {needed}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def read_fgvc(root: Path) -> Listed:
    """FGVC in the layout of VPT: train.json, [val.json], test.json map an image path to a class id."""
    items = []
    folders = [f for f in (root / "images", root / "Images", root) if f.is_dir()]
    for split in ("train", "val", "test"):
        path = root / f"{split}.json"
        if not path.is_file():
            continue
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            table = {str(k): int(v) for k, v in table.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a JSON object of image path -> class id: {error}") from error
        for name, label in table.items():
            found = next((f / name for f in folders if (f / name).is_file()), folders[0] / name)
            items.append(Item(found, name, label, split))
    ids = sorted({int(i.label) for i in items})
    return Listed(items, [str(k) for k in ids], {"kind": "FGVC lists (train.json, test.json)"})


def read_birds(root: Path) -> Listed:
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
        Item(root / "images" / file, file, int(labels[key]), "train" if parts[key] == "1" else "test")
        for key, file in files.items()
    ]
    return _by_folder(items, "FGVC lists (images.txt, train_test_split.txt)")


def read_dogs(root: Path) -> Listed:
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
            labels = [int(label) for label in table["labels"].ravel()]
            items += [Item(folder / n, n, k, split) for n, k in zip(names, labels, strict=True)]
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing; the layout needs train_list.mat and test_list.mat"
            ) from error
        except Exception as error:  # scipy raises many kinds on a file that is none of its own
            raise DataError(f"{path} is no list with file_list and labels: {error!r}") from error
    return _by_folder(items, "FGVC lists (train_list.mat, test_list.mat)")


# The layouts of published sets: whose files tell which reader's; classes are fixed by their lists.
PUBLISHED: dict[Callable[..., Listed], list[tuple[str, ...]]] = {
    read_vtab: [(VTAB_LISTS["train800"],), (VTAB_LISTS["train1000"],)],
    read_fgvc: [("train.json",)],
    read_birds: [("images.txt", "train_test_split.txt")],
    read_dogs: [("train_list.mat",), ("lists/train_list.mat",)],
}


def _by_folder(items: list[Item], kind: str) -> Listed:
    """Items with class ids, named by the ids' own folders where folders and ids agree."""
    ids = sorted({int(i.label) for i in items})
    folders = {(int(i.label), Path(i.name).parent.name) for i in items}
    names = dict(folders)
    if len(folders) != len(ids) or len(set(names.values())) != len(ids) or "" in names.values():
        names = {k: str(k) for k in ids}
    items = [Item(i.path, i.name, names[int(i.label)], i.split) for i in items]
    return Listed(items, [names[k] for k in ids], {"kind": kind})


def collect(
    listed: Listed, source: Path, *, check: str, strict: bool, classes: Sequence[str] | None = None
) -> Raw:
    """Check the listed files, leave unreadable ones out, number the classes, build the sets."""
    items, names = listed.items, listed.classes
    if classes is not None:
        names = [str(c) for c in classes]
        unknown = sorted(set(listed.classes) - set(names))
        if unknown:
            raise DataError(
                f"{source} holds the class(es) {some(unknown)}, which are not among the "
                f"{len(names)} given classes: {some(names)}"
            )
    missing = [item.name for item in items if not item.path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(items)} images listed by {source} do not exist: {some(missing)}"
        )
    kept, skipped = [], []
    for item in items:
        problem = problem_of(item.path, check)
        if problem is None:
            kept.append(item)
        else:
            skipped.append({"file": item.name, "reason": problem})
    if skipped and strict:
        raise DataError(
            f"{len(skipped)} of the {len(items)} images of {source} cannot be read "
            f"(strict): {some(s['file'] for s in skipped)}"
        )
    splits = [s for s in ("all", "train", "val", "test") if any(i.split == s for i in items)]
    if splits and splits[0] not in ("all", "train"):
        raise DataError(f"{source} has a {splits[0]} split but no train split")
    index = {name: k for k, name in enumerate(names)}
    parts = {}
    for split in splits:
        chosen = [i for i in kept if i.split == split]
        if not chosen:
            raise DataError(
                f"no image of the {split} split of {source} can be read: {some(i['file'] for i in skipped)}"
            )
        labels = [index[str(i.label)] for i in chosen]
        parts[split] = ImageSet(FileImages([i.path for i in chosen]), labels, names, [i.name for i in chosen])
    if not parts:
        raise DataError(f"{source} holds no images")
    if classes is None:
        first = parts[splits[0]].counts()
        absent = [name for name, count in first.items() if not count]
        if len(names) < 2:
            raise DataError(
                f"{source} holds one class only ({some(names)}); classification needs at least two"
            )
        if absent and not listed.gaps:
            raise DataError(
                f"{len(absent)} class(es) of {source} have no readable "
                f"{'training ' if 'train' in parts else ''}image: {some(absent)}"
            )
    return Raw(parts, names, listed.about | {"skipped": {"count": len(skipped), "files": skipped[:20]}})


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _hidden(Path(p.name)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in path.parts)
