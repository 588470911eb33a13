"""A split written down image by image, and found again in a source that may have changed since."""

import csv
import functools
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lion_fast.data.duplicates import Stored, digests, size_of
from lion_fast.data.images import ImageSet
from lion_fast.data.sources import SHOWN, Raw, some
from lion_fast.errors import DataError
from lion_fast.files import say_once, write_atomically
from lion_fast.options import RECORD

PARTS = ("train", "val", "test")
UNUSED = "unused"
COLUMNS = ["path", "label", "split", "class", "bytes", "sha256"]
_NUMBER, _DIGEST = re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9a-f]{64}|")


@dataclass(frozen=True)
class Row:
    """An image of a record: its name, class index, size in bytes and sha256."""

    name: str
    label: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """A split as it was written down: the rows of each part in order, and the images that no part had."""

    file: Path
    classes: list[str]
    parts: dict[str, list[Row]]
    unused: set[str]

    def fingerprint(self) -> str:
        """As the description of the split that was written has it."""
        return fingerprint({part: [(r.name, r.label) for r in rows] for part, rows in self.parts.items()})


def fingerprint(parts: Mapping[str, Iterable[tuple[str, int]]]) -> str:
    """One sha256 of the names and labels of every part, in order."""
    digest = hashlib.sha256()
    for part, items in parts.items():
        for name, label in items:
            digest.update(f"{part}\t{name}\t{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_record(
    file: str | os.PathLike,
    parts: Mapping[str, ImageSet | None],
    classes: Sequence[str],
    unused: Iterable[str],
) -> None:
    """Write a CSV of COLUMNS, one row an image, whole or not at all; it reads each image's file once.

    A class without an image has a row without a path. Bytes that are no UTF-8 are written as they are.
    DataError where an image is listed twice.
    """
    names = [name for images in parts.values() if images is not None for name in images.names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{len(twice)} images are listed twice: {some(twice)}; an image may stand in one part"
        )
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    seen: set[int] = set()
    for part, images in parts.items():
        if images is None:
            continue
        labels = images.labels.tolist()
        seen.update(labels)
        stored = images.stored()
        for name, label, what, digest in zip(images.names, labels, stored, digests(stored), strict=True):
            table.writerow([name, classes[label], part, label, size_of(what), digest])
    table.writerows(["", name, "", k, "", ""] for k, name in enumerate(classes) if k not in seen)
    table.writerows([name, "", UNUSED, "", "", ""] for name in unused)
    write_atomically(file, text.getvalue().encode(errors="surrogateescape"))


def read_record(file: str | os.PathLike) -> Record:
    """What `write_record` wrote; DataError names the first line that it did not write."""
    file, parts, names, seen = Path(file), {part: [] for part in PARTS}, {}, set()
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, None)
        rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the record of the split {file} cannot be read: {reason}") from error
    except csv.Error as error:
        raise DataError(f"{file} is no comma-separated table: {error}") from error
    if header != COLUMNS:
        raise DataError(f"{file} is no record of a split: its first line must be {','.join(COLUMNS)}")
    unused = set()
    for line, row in rows:
        problem = _problem(row, seen, names)
        if problem:
            raise DataError(f"{file}, line {line}: {problem[:200]}. Take the file as it was written")
        name, label, split, number, size, sha256 = row
        seen.add(name)
        if split == UNUSED:
            unused.add(name)
            continue
        names[int(number)] = label
        if split:
            parts[split].append(Row(name, int(number), int(size), sha256))
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise DataError(
            f"{file}: classes must be numbered 0..K-1 and have a name each; got {some(names.items())}"
        )
    if not parts["train"]:
        raise DataError(f"{file} has no training image")
    return Record(file, [names[k] for k in range(len(names))], parts, unused)


def _problem(row: list[str], seen: Collection[str], names: Mapping[int, str]) -> str | None:
    """What is wrong with a row, in words."""
    if len(row) != len(COLUMNS):
        return f"{len(row)} values for the {len(COLUMNS)} columns"
    name, label, split, number, size, sha256 = row
    if split not in (*PARTS, UNUSED, "") or bool(name) != bool(split):
        return f"split must be train, val, test or unused; got {split!r}"
    if name and (name in seen or "\0" in name):
        return f"{name!r} is listed twice" if name in seen else f"{name!r} is no path"
    if split == UNUSED:
        return None
    if not _NUMBER.fullmatch(number) or (name and not _NUMBER.fullmatch(size)):
        return f"class and bytes must be whole numbers; got {number!r} and {size!r}"
    if not _DIGEST.fullmatch(sha256):
        return f"sha256 must be 64 hexadecimal digits; got {sha256!r}"
    if names.get(int(number), label) != label:
        return f"class {number} is {label!r} here and {names[int(number)]!r} above"
    return None


def recall(
    raw: Raw, record: Record, source: object, needed: Collection[str]
) -> tuple[dict[str, ImageSet | None], dict[str, Any]]:
    """The recorded parts of what a source holds by now, and what has changed since.

    needed: the parts whose images must all be there with the labels they had, or DataError says which are
    not, and whose content is compared. Of the other parts there is what is still there.

    Returns the sets by part, and {change: {"count", "images"}} for the changes "new" (in no part), "missing"
    (of the parts not needed), "changed" (other content) and "moved" (the source has it in another part).
    """
    whole = ImageSet.join(list(raw.parts.values()))
    part_now = [part for part, images in raw.parts.items() for _ in range(len(images))]
    exact = {name: i for i, name in enumerate(whole.names)}
    recorded = {row.name for rows in record.parts.values() for row in rows} | record.unused
    plain = {_plain(name): i for name, i in exact.items() if name not in recorded}

    def find(name: str) -> int | None:
        return exact.get(name, plain.get(_plain(name)))

    found = {part: [(row, find(row.name)) for row in rows] for part, rows in record.parts.items()}
    taken = {i for rows in found.values() for _, i in rows} | {find(name) for name in record.unused}
    changes: dict[str, list[str]] = {"new": [n for i, n in enumerate(whole.names) if i not in taken]}
    changes |= {"missing": [], "changed": [], "moved": []}
    sets: dict[str, ImageSet | None] = {}
    for part, rows in found.items():
        there = [(row, i) for row, i in rows if i is not None]
        gone = [row.name for row, i in rows if i is None]
        other = [
            f"{row.name} (was {record.classes[row.label]}, now {raw.classes[int(whole.labels[i])]})"
            for row, i in there
            if not _same(record.classes[row.label], raw.classes[int(whole.labels[i])])
        ]
        images = whole.subset([i for _, i in there])
        images.names, images.classes = [row.name for row, _ in there], list(record.classes)
        images.labels = torch.tensor([row.label for row, _ in there], dtype=torch.int64)
        sets[part] = images if there else None
        if part in needed:
            if gone or other:
                what = "are gone or cannot be read" if gone else "have another label by now"
                new = f"; new there: {some(changes['new'])}" if changes["new"] else ""
                raise DataError(
                    f"{source} is not as it was: of the {len(rows)} {part} images in {record.file} "
                    f"{len(gone or other)} {what}: {some(gone or other)}{new}. Put them back as they were, "
                    "or do without that split: name other data to evaluate, or train anew"
                )
            changes["changed"] += _changed(images, [row for row, _ in there])
        elif part in raw.parts or "lists" not in raw.about:  # VTAB-1k: a list that is left shut is not gone
            changes["missing"] += gone
        changes["moved"] += [row.name for row, i in there if _moved(part, part_now[i])]
    return sets, {name: {"count": len(n), "images": n[:SHOWN]} for name, n in changes.items() if n}


def _changed(images: ImageSet, rows: Sequence[Row]) -> list[str]:
    """Names of images whose bytes are not the recorded ones."""
    pairs = zip(rows, digests(images.stored()), strict=True)
    return [row.name for row, digest in pairs if row.sha256 and digest and digest != row.sha256]


def _moved(part: str, now: str) -> bool:
    """Whether a source with parts has an image in another one than a recorded part is drawn from."""
    return now != "all" and now != part and (part, now) != ("val", "train")


def _same(a: str, b: str) -> bool:
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def _plain(name: str) -> str:
    """A name as every file system and list would give it: without ./ and in one Unicode form."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


WORDS = {
    "new": "are new since the split was written down and stand in no part of it",
    "missing": "of recorded parts that are not used here are gone",
    "changed": "have other content than when the split was written down",
    "moved": "stand in another part of the source by now than in the recorded split, which is used",
}


def count_trained(record: Record, images: Sequence[Stored], source: str | os.PathLike | None = None) -> int:
    """How many of these images a recorded split trains on: by content, or as the same file.

    images: paths, or pixels. source: where the recorded images were, a folder or a CSV file.
    Only files as large as a training image are read.
    """
    rows, real = record.parts["train"], _real_paths()
    sizes, contents = {row.size for row in rows}, {row.sha256 for row in rows if row.sha256}
    base = os.path.expanduser(source or "")
    root = base if os.path.isdir(base) else os.path.dirname(base)
    files = {real(os.path.join(root, row.name)) for row in rows} if os.path.exists(base) else set()
    others = [image for image in images if not (isinstance(image, str) and real(image) in files)]
    copies = digests([image for image in others if size_of(image) in sizes])
    return len(images) - len(others) + sum(digest in contents for digest in copies)


def _real_paths() -> Callable[[str], str]:
    """`os.path.realpath` of many files in few folders."""
    folder = functools.cache(os.path.realpath)
    return lambda path: os.path.join(folder(os.path.dirname(path)), os.path.basename(path))


def record_of(folder: Path) -> tuple[Record | None, dict[str, Any] | None]:
    """The record in a run's output folder, and what its splits.json tells; None where there is none."""
    record = read_record(folder / RECORD) if (folder / RECORD).is_file() else None
    file = folder / "splits.json"
    if not file.is_file():
        return record, None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        expected, counts = told["fingerprint"], told.get("class_counts") or {}
        told = {"fingerprint": expected, "class_counts": {part: dict(of) for part, of in counts.items()}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not the description of a split: {error!r}") from error
    if record is not None and record.fingerprint() != expected:
        raise DataError(
            f"{record.file} and {file.name} beside it are of different splits: one was edited or is of "
            "another run. Put them back, or name other data to evaluate"
        )
    return record, told


def refuse_other(folder: Path, told: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Of a run without a record, whose split was drawn anew: DataError where it is not the one it had."""
    if told is None:
        say_once(
            f"{folder} does not say which images its run had: the split is drawn anew from what is there"
        )
        return
    if told["fingerprint"] == now["fingerprint"]:
        return
    differences = []
    for part, counts in now["class_counts"].items():
        before = told["class_counts"].get(part, {})
        differences += [
            f"{part} had {before.get(name, 0)} images of {name}, now {counts.get(name, 0)}"
            for name in dict.fromkeys([*before, *counts])
            if before.get(name, 0) != counts.get(name, 0)
        ]
    raise DataError(
        f"{now['source']} or its settings have changed since the run in {folder}: drawn anew, the split is "
        f"another one ({some(differences) or 'as many images, but others'}), and any part may "
        "hold images that were trained on. Put data and settings back as they were, name other data to "
        "evaluate, or train anew"
    )
