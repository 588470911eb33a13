"""A user's own images: class folders, CSV lists, and the list layouts of VTAB-1k and FGVC."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_fast.data.images import EXTENSIONS, FileImages, ImageSet, problem_of
from lion_fast.errors import DataError, check_choice
from lion_fast.options import CHECK

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
BIRD_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
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


def some(values: Iterable[object]) -> str:
    """The first few values and how many more there are."""
    values = [str(v) for v in values]
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(values[:SHOWN]) + more


def read_folder(root: Path, *, check: str, strict: bool, classes: Sequence[str] | None) -> Raw:
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
    return collect(items, found, about=about, source=root, check=check, strict=strict, classes=classes)


def read_csv(path: Path, *, check: str, strict: bool, classes: Sequence[str] | None) -> Raw:
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
    items = []
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
        items.append(Item(path.parent / name, name, label, split))
    seen: dict[str, Item] = {}
    for item in items:
        if item.name in seen:
            raise DataError(
                f"{path} lists {item.name} twice ({seen[item.name].split}/{seen[item.name].label} and "
                f"{item.split}/{item.label}); an image may appear once, in one split"
            )
        seen[item.name] = item
    items, found = number_labels(items, path, classes)
    return collect(
        items, found, about={"kind": "CSV"}, source=path, check=check, strict=strict, classes=classes
    )


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


def read_vtab(root: Path, *, check: str, strict: bool, val: float, test: float) -> Raw:
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
    others = [name for name in VTAB_LISTS.values() if name not in lists.values() and (root / name).is_file()]
    labels = {int(i.label) for i in items}.union(
        *({int(i.label) for i in vtab_list(root, name, "")} for name in others)
    )
    # A task's label set is fixed; a class may be absent from 800 images but not from the whole.
    classes = [str(k) for k in range(max(labels) + 1)]
    items = [Item(i.path, i.name, str(i.label), i.split) for i in items]
    about = {"kind": "VTAB-1k task", "lists": lists}
    return collect(
        items, classes, about=about, source=root, check=check, strict=strict, classes=None, gaps=True
    )


def vtab_list(root: Path, name: str, split: str) -> list[Item]:
    """The items of one list of a VTAB-1k task folder, labels as integers; the images are not looked at."""
    path = root / name
    if not path.is_file():
        raise DataError(f"{path} is missing; a VTAB-1k task folder needs it")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.strip().rsplit(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise DataError(f"{path}, line {number}: expected 'path LABEL', got {line.strip()!r}")
        items.append(Item(root / words[0], words[0], int(words[1]), split))
    if not items:
        raise DataError(f"{path} lists no images")
    return items


def read_fgvc(root: Path, *, check: str, strict: bool) -> Raw:
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
    items = [Item(i.path, i.name, str(i.label), i.split) for i in items]
    about = {"kind": "FGVC lists (train.json, test.json)"}
    return collect(
        items, [str(k) for k in ids], about=about, source=root, check=check, strict=strict, classes=None
    )


def read_birds(root: Path, *, check: str, strict: bool) -> Raw:
    """CUB-200-2011 and NABirds as published, which SSF reads: three lists beside images/, by image id.

    images.txt: `ID path`; image_class_labels.txt: `ID class`; train_test_split.txt: `ID 1` for training,
    `ID 0` for test. Classes are numbered in the order of their published ids, which need not be contiguous;
    they are named by their folders where each has one of its own.
    """
    tables = {}
    for name in BIRD_LISTS:
        path, table = root / name, {}
        if not path.is_file():
            raise DataError(f"{path} is missing; the layout needs {', '.join(BIRD_LISTS)} and images/")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split(maxsplit=1)
            if not words:
                continue
            value = words[1].strip() if len(words) == 2 else ""
            fits = {BIRD_LISTS[0]: bool(value), BIRD_LISTS[1]: value.isdigit()}.get(name, value in ("0", "1"))
            if not fits:
                wanted = {BIRD_LISTS[0]: "path", BIRD_LISTS[1]: "CLASS"}.get(name, "0 or 1")
                raise DataError(f"{path}, line {number}: expected 'ID {wanted}', got {line.strip()!r}")
            if words[0] in table:
                raise DataError(f"{path}, line {number}: the image {words[0]} is listed twice")
            table[words[0]] = value
        tables[name] = table
    files, labels, parts = (tables[name] for name in BIRD_LISTS)
    for name, table in tables.items():
        unequal = sorted(files.keys() ^ table.keys())
        if unequal:
            raise DataError(
                f"{root}: {BIRD_LISTS[0]} and {name} list different images: {some(unequal)} in one only"
            )
    items = [
        Item(root / "images" / file, file, int(labels[key]), "train" if parts[key] == "1" else "test")
        for key, file in files.items()
    ]
    return _by_folder(root, items, "FGVC lists (images.txt, train_test_split.txt)", check, strict)


def read_dogs(root: Path, *, check: str, strict: bool) -> Raw:
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
    return _by_folder(root, items, "FGVC lists (train_list.mat, test_list.mat)", check, strict)


def _by_folder(root: Path, items: list[Item], kind: str, check: str, strict: bool) -> Raw:
    """Items with class ids, named by the ids' own folders where folders and ids agree."""
    ids = sorted({int(i.label) for i in items})
    folders = {(int(i.label), Path(i.name).parent.name) for i in items}
    names = dict(folders)
    if len(folders) != len(ids) or len(set(names.values())) != len(ids) or "" in names.values():
        names = {k: str(k) for k in ids}
    items = [Item(i.path, i.name, names[int(i.label)], i.split) for i in items]
    return collect(
        items,
        [names[k] for k in ids],
        about={"kind": kind},
        source=root,
        check=check,
        strict=strict,
        classes=None,
    )


def collect(
    items: list[Item],
    found: list[str],
    *,
    about: dict[str, Any],
    source: Path,
    check: str,
    strict: bool,
    classes: Sequence[str] | None,
    gaps: bool = False,
) -> Raw:
    """Check the listed files, leave unreadable ones out, number the classes, build the sets."""
    check_choice("check", check, CHECK)
    names = list(found)
    if classes is not None:
        names = [str(c) for c in classes]
        unknown = sorted(set(found) - set(names))
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
        if absent and not gaps:
            raise DataError(
                f"{len(absent)} class(es) of {source} have no readable "
                f"{'training ' if 'train' in parts else ''}image: {some(absent)}"
            )
    about = dict(about, skipped={"count": len(skipped), "files": skipped[:20]})
    return Raw(parts, names, about)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _hidden(Path(p.name)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in path.parts)
