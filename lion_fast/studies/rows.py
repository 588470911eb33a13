"""The rows of every study: one JSON line each, on the disk at once, found by key; old formats are read."""

import base64
import contextlib
import csv
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lion_fast.errors import DataError, LionError, OptionError
from lion_fast.files import lock, writing

NAME = "rows.jsonl"


class Store:
    """The rows of a folder's `rows.jsonl`, and appending to it. One writer at a time.

    A row whose key is there takes the place of the earlier one; rows without a key all stay. Rows of an older
    `rows.json` beside the file count, and are left where they are. A last line that a killed run left half
    written is cut off, with a notice.

    path: the folder, or a file ending in .json or .jsonl. Raises `DataError` for another line that is no
    row, `OptionError` for a place that cannot be written or that another process writes to.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        old, self.path = _files(path)
        with contextlib.ExitStack() as opened:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                open(self.path, "ab").close()
            except OSError as error:
                raise OptionError(
                    f"{self.path} cannot be written: {error.strerror}; choose another --out"
                ) from error
            opened.enter_context(lock(self.path))
            lines, whole = _parse(self.path)
            self._rows = _put({}, [*_read_old(old), *lines])
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
            self.close = opened.pop_all().close  # lets another writer have the file

    @property
    def rows(self) -> list[dict]:
        """The rows, of each key the latest, in the order in which they were taken."""
        return list(self._rows.values())

    def get(self, key: str) -> dict | None:
        """The row of that key."""
        return self._rows.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows; they are on the disk when this returns, or none is and it raises `WriteError`."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with writing(self.path):
            size = self.path.stat().st_size
            try:
                with open(self.path, "ab") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
                raise
        _put(self._rows, map(dict, rows))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows of a folder or a file, of each key the latest; none where there is none.

    Reads `rows.jsonl` and what was written before it: {"rows": [...]}, where a "protocol" is given to each
    row. Raises `DataError` for anything else.
    """
    old, new = _files(path)
    return list(_put({}, [*_read_old(old), *(_parse(new)[0] if new.exists() else ())]).values())


@contextlib.contextmanager
def of_rows(path: str | os.PathLike) -> Iterator[None]:
    """Raise `DataError` where what is read of rows in files is not there, or is of another kind.

    Rows are as deep as a study makes them: who wrote others, or edited some, is told where they lie.
    """
    try:
        yield
    except LionError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} holds rows that are not of this study, or that somebody edited ({type(error).__name__}: "
            f"{error}); remove them, or choose another place (--debug shows where)"
        ) from error


def _files(path: str | os.PathLike) -> tuple[Path, Path]:
    """The older file and the one that is written to."""
    path = Path(path)
    path = path if path.suffix in (".json", ".jsonl") else path / NAME
    return path.with_suffix(".json"), path.with_suffix(".jsonl")


def _put(into: dict[Any, dict], rows: Iterable[dict]) -> dict[Any, dict]:
    """Rows by their keys, of each the latest, in the order in which they were taken."""
    for row in rows:
        key = row.get("key", object())
        into.pop(key, None)
        into[key] = row
    return into


def _read_old(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows = body["rows"]
        common = {"protocol": body["protocol"]} if "protocol" in body else {}
        return [row | common for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} holds no rows; choose another place, or remove it") from error


def _parse(path: Path) -> tuple[list[dict], int]:
    """Rows, and the bytes up to which the file is whole."""
    data, rows, at = path.read_bytes(), [], 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("key", ""), str):
            if number < len(lines):
                raise DataError(f"line {number} of {path} is no row; repair or remove the line")
            print(
                f"{path}: the last line is half written and ignored; its run is done again", file=sys.stderr
            )
            break
        rows.append(row)
        at += len(line)
    return rows, at


def pack_bits(values: Sequence[bool] | np.ndarray) -> str:
    """Booleans as base64 text, eight to a byte.

    >>> pack_bits([True, False, True])
    'oA=='
    """
    return base64.b64encode(np.packbits(np.asarray(values, dtype=bool)).tobytes()).decode()


def unpack_bits(text: str, n: int) -> np.ndarray:
    """The n booleans of `pack_bits`.

    >>> unpack_bits('oA==', 3).tolist()
    [True, False, True]
    """
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)


def pack_integers(values: Sequence[int] | np.ndarray) -> str:
    """Integers below 2^32 as base64 text of deflated little-endian 32-bit words."""
    return base64.b64encode(zlib.compress(np.asarray(values, dtype="<u4").tobytes(), 9)).decode()


def unpack_integers(text: str) -> np.ndarray:
    """The integers of `pack_integers`, int64.

    >>> unpack_integers(pack_integers([3, 0, 70000])).tolist()
    [3, 0, 70000]
    """
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").astype(np.int64)


def write_csv(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Rows as a table, flat, for a spreadsheet."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names, lists as JSON.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': '[2]'}
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return flat
