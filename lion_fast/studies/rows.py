"""The rows of an experiment: one JSON line a run, appended at once; bits and labels packed into text."""

import base64
import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lion_fast.errors import DataError, OptionError

NAME = "rows.jsonl"


class RowFile:
    """`rows.jsonl` of a folder: what it holds, and appending to it. One writer at a time.

    A last line that a killed run left half written is cut off, with a notice; any other line that is not
    JSON raises `DataError`; a folder that cannot be written, `OptionError`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115
        except OSError as error:
            raise OptionError(
                f"{self.path} cannot be written: {error.strerror}; choose another --out"
            ) from error
        _lock(self._file, self.path)
        self.rows, whole = _parse(self.path)
        if whole < self.path.stat().st_size:
            self._file.truncate(whole)

    def add(self, row: dict) -> None:
        """Append a row; it is on the disk when this returns."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def close(self) -> None:
        """Let another writer have the file."""
        self._file.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_rows(folder: str | os.PathLike) -> list[dict]:
    """The rows of a folder, none where it has no file."""
    path = Path(folder) / NAME
    return _parse(path)[0] if path.exists() else []


def _parse(path: Path) -> tuple[list[dict], int]:
    """Rows, and the bytes up to which the file is whole."""
    data, rows, at = path.read_bytes(), [], 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            if number < len(lines):
                raise DataError(f"line {number} of {path} is no row; repair or remove the line")
            print(
                f"{path}: the last line is half written and ignored; its run is done again", file=sys.stderr
            )
            break
        rows.append(row)
        at += len(line)
    return rows, at


def _lock(file, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: two writers are then the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OptionError(
            f"another run is writing to {path}; wait for it, or choose another --out"
        ) from error


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
