"""A user's own images: class folders and CSV lists; labels beside class names; from lists to image sets."""

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lion_fast.data.images import EXTENSIONS, FileImages, ImageSet, problem_of
from lion_fast.errors import DataError, OptionError
from lion_fast.files import say_once

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# Python's own int() takes 0_1, 01, +1 and the digits of every script for numbers.
WHOLE = r"0|[1-9][0-9]{0,8}"
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
DEBRIS = ("__MACOSX", "__pycache__", "lost+found")
SHOWN = 5


@dataclass
class Raw:
    """What a source holds before it is split: `parts` is {"all": ...} or {"train": ..., "test": ...}."""

    parts: dict[str, ImageSet]
    classes: list[str]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One listed image: its file, its name in reports, its label as written, its split, group and domain."""

    path: Path
    name: str
    label: str
    split: str = "all"
    group: str | None = None
    domain: str | None = None


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


def check_classes(classes: Sequence[str]) -> None:
    """Raise `OptionError` unless these are names, none of them empty and none twice."""
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise OptionError(f"classes must be a list of names; got {classes!r}")
    wrong = [c for c in classes if not isinstance(c, str) or not c.strip()]
    if wrong:
        raise OptionError(f"classes must be texts that are not empty; got {some(map(repr, wrong))}")
    if twice := {c for c in classes if classes.count(c) > 1}:
        raise OptionError(f"classes names {some(sorted(twice))} twice; give every class once")


def read_folder(root: Path, classes: Sequence[str] | None) -> Listed:
    """Class sub-folders, with or without train / val / test folders above them."""
    subfolders = _subfolders(root)
    if not subfolders:
        raise DataError(
            f"{root} has no sub-folders; expected one folder per class ({root.name}/cat/1.jpg), "
            "or train/, val/ and test/ folders that hold one folder per class"
        )
    about: dict[str, Any] = {"kind": "image folder"}
    roots = {"all": root}
    if all(f.name.lower() in SPLIT_NAMES for f in subfolders):
        roots = {}
        for folder in subfolders:
            split = SPLIT_NAMES[folder.name.lower()]
            if split in roots:
                raise DataError(
                    f"{root} has two folders for the {split} split: {roots[split].name}, {folder.name}"
                )
            roots[split] = folder
        about["kind"] = "image folder with split folders"
    elif parts := [f.name for f in subfolders if _is_part(f)]:
        others = [f.name for f in subfolders if f.name not in parts]
        raise DataError(
            f"{root} has the part(s) {some(parts)} with folders of their own"
            + (f" beside {some(others)}" if others else "")
            + ": these would be classes. Name the parts train, val and test and move everything else away"
        )
    items, empty = [], {}
    ignored = [p for top in roots.values() for p in _entries(top) if p.is_file()]
    for split, top in roots.items():
        folders = _subfolders(top)
        if not folders:
            raise DataError(f"{top} has no class sub-folders; expected for example {top.name}/cat/1.jpg")
        for folder in folders:
            files = files_below(folder)
            images = [p for p in files if p.suffix.lower() in EXTENSIONS]
            ignored += [p for p in files if p.suffix.lower() not in EXTENSIONS]
            if not images:
                empty.setdefault(split, []).append(folder.name)
            items += [Item(p, p.relative_to(root).as_posix(), folder.name, split) for p in images]
    about["ignored_files"] = len(ignored)
    if ignored:
        told = some(p.relative_to(root) for p in ignored)
        say_once(f"{root} has {len(ignored)} file(s) that are no images of a class: {told}")
    found = sorted({folder.name for top in roots.values() for folder in _subfolders(top)})
    needed = empty.get("all", []) + empty.get("train", [])
    if needed and classes is None:
        raise DataError(
            f"{len(needed)} class folder(s) of {root} hold no image: {some(needed)}; fill or remove them "
            f"(image files end in {', '.join(EXTENSIONS)})"
        )
    return Listed(items, found, about)


def _is_part(folder: Path) -> bool:
    """Whether a folder looks like train/ or val2017/ and not like a class: no image lies in it directly."""
    if re.match("[a-z]*", folder.name.lower())[0] not in SPLIT_NAMES:
        return False
    images = (p for p in _entries(folder) if p.suffix.lower() in EXTENSIONS and p.is_file())
    return bool(_subfolders(folder)) and not any(images)


def read_csv(path: Path, classes: Sequence[str] | None) -> Listed:
    """A table of path, label and, if wanted, split, group, domain; paths relative to the file's folder."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [(c or "").strip().lower() for c in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader if any(v for v in row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a UTF-8 comma-separated table: {error}") from error
    if twice := sorted({c for c in columns if c and columns.count(c) > 1}):
        raise DataError(f"{path} names the column(s) {some(twice)} twice in its first line")
    missing = [c for c in ("path", "label") if c not in columns]
    if missing:
        raise DataError(
            f"{path} lacks the column(s) {', '.join(missing)}; its first line gives "
            f"{', '.join(columns) or 'nothing'}. "
            "Expected a comma-separated first line: path,label and, if wanted, split, group, domain"
        )
    if not rows:
        raise DataError(f"{path} lists no images below its first line")
    items = []
    for line, row in rows:
        if any(row.pop(None, ())):
            raise DataError(f"{path}, line {line}: more cells than columns; a comma in a name needs quotes")
        known = {c: (row[c] or "").strip() for c in ("path", "label", "group", "domain") if c in columns}
        if empty := [column for column, cell in known.items() if not cell]:
            raise DataError(f"{path}, line {line}: the {empty[0]} is empty")
        name = known.pop("path")
        split = "all"
        if "split" in columns:
            written = (row["split"] or "").strip()
            if written.lower() not in SPLIT_NAMES:
                raise DataError(f"{path}, line {line}: split must be train, val or test; got {written!r}")
            split = SPLIT_NAMES[written.lower()]
        items.append(Item(path.parent / name, name, split=split, **known))
    return Listed(*number_labels(items, path, classes), {"kind": "CSV"})


def number_labels(
    items: list[Item], source: Path, classes: Sequence[str] | None
) -> tuple[list[Item], list[str]]:
    """Items labelled by class names, and the names found or given.

    Labels meet `classes` by name. Without `classes` they are the names, or integers 0..K-1 without gaps.
    Where none of `classes` is an integer, labels that are integers count them from 0.
    """
    written = {item.label for item in items}
    whole = {w for w in written if re.fullmatch(WHOLE, w)}
    if classes is not None and (written <= set(classes) or any(re.fullmatch(WHOLE, c) for c in classes)):
        return items, sorted(written)
    if written != whole and len({len(w) for w in written}) == 1 and all(map(_digits, written)):
        return items, sorted(written)  # 00 to 11: names of one width
    wrong = sorted(w for w in written - whole if re.fullmatch(NUMBER, w))
    if wrong:
        raise DataError(
            f"{source}: labels must be names, or integers 0..K-1 without padding; "
            f"got the numbers {some(wrong)}"
        )
    if whole and whole != written:
        raise DataError(
            f"{source} mixes integer labels ({some(sorted(whole))}) with names "
            f"({some(sorted(written - whole))}); use one or the other"
        )
    if not whole:
        return items, sorted(written)
    names = [str(k) for k in range(len(whole))] if classes is None else list(classes)
    index = {str(k): name for k, name in enumerate(names)}
    outside = sorted(whole - index.keys(), key=int)
    if outside and classes is not None:
        raise DataError(f"{source}: labels out of range 0..{len(names) - 1}: {some(outside)}")
    if outside:
        raise DataError(
            f"{source}: integer labels must be 0..{len(names) - 1} without gaps; none is "
            f"{some(w for w in index if w not in whole)}, but there is {some(outside)}. "
            "Renumber them, use names, or give the full list of classes"
        )
    return [replace(item, label=index[item.label]) for item in items], names


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def collect(
    listed: Listed, source: Path, *, check: str, strict: bool, classes: Sequence[str] | None = None
) -> Raw:
    """Check the listed files, leave unreadable ones out, number the classes, build the sets."""
    items, names = listed.items, listed.classes
    if classes is not None:
        names = list(classes)
        unknown = sorted(set(listed.classes) - set(names))
        if unknown:
            raise DataError(
                f"{source} holds the class(es) {some(unknown)}, which are not among the "
                f"{len(names)} given classes: {some(names)}"
            )
    missing = [item.name for item in items if not os.path.isfile(item.path)]
    if missing:
        hint = "; the separator of folders is /" if os.sep == "/" and "\\" in missing[0] else ""
        raise DataError(
            f"{len(missing)} of the {len(items)} images listed by {source} do not exist: "
            f"{some(missing)}{hint}"
        )
    seen: dict[str, Item] = {}
    for item in items:
        first = seen.setdefault(os.path.realpath(item.path), item)
        if first is not item:
            raise DataError(
                f"{source} lists {first.name} twice ({first.split}/{first.label} and, as {item.name}, "
                f"{item.split}/{item.label}); an image may appear once, in one split"
            )
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
        if other != name:
            say_once(f"{source} has the two classes {other!a} and {name!a}; are they one?")
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
        parts[split] = ImageSet(
            FileImages([i.path for i in chosen]),
            [index[i.label] for i in chosen],
            names,
            [i.name for i in chosen],
            groups=None if chosen[0].group is None else [i.group for i in chosen],
            domains=None if chosen[0].domain is None else [i.domain for i in chosen],
        )
    if not parts:
        raise DataError(f"{source} holds no images")
    stand = {(item.group, item.split) for item in items if item.group is not None}
    if twice := sorted(group for group, n in Counter(group for group, _ in stand).items() if n > 1):
        raise DataError(f"{source} has {len(twice)} group(s) in more than one split: {some(twice)}")
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


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, debris apart; DataError for what is neither file nor folder."""
    try:
        found = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in DEBRIS)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for path in found:
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise DataError(f"{path} is a link to nothing, or no file; mend or remove it")
    return found


def _subfolders(folder: Path) -> list[Path]:
    return [p for p in _entries(folder) if p.is_dir()]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, those in linked folders too; DataError for a link that leads back."""
    parent = Path(os.path.realpath(folder.parent))
    files, todo = [], [(folder, frozenset(map(str, (parent, *parent.parents))))]
    while todo:
        here, above = todo.pop()
        real = os.path.realpath(here)
        if real in above:
            raise DataError(f"{here} is a link to a folder that holds it; remove it")
        for path in _entries(here):
            if path.is_dir():
                todo.append((path, above | {real}))
            else:
                files.append(path)
    return sorted(files)
