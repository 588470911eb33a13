"""The rows of one protocol on one backbone: a JSON file, replaced whole after every run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_fast.errors import DataError, OptionError

FORMAT = "lion_fast.vtab/1"
JSON_NAME = "rows.json"


class Rows:
    """The rows below `folder`; those of another protocol are never mixed in.

    protocol: JSON-able; what the rows have in common. resume: whether rows may be there already.

    Raises `OptionError` where rows are there and `resume` is not given, or they are of another protocol
    (naming what differs); `DataError` for a file that holds something else.
    """

    def __init__(self, folder: str | os.PathLike, protocol: Mapping[str, Any], *, resume: bool = False):
        self.path = Path(folder) / JSON_NAME
        self.protocol = json.loads(json.dumps(protocol))
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            if not resume:
                raise OptionError(
                    f"{self.path} holds rows of an earlier command: go on from them (--resume), or choose "
                    "another output folder (--out)"
                )
            there, self.rows = read(self.path)
            _check_same(self.path, there, self.protocol)

    def find(self, phase: str, task: str, **also: Any) -> list[dict]:
        """Rows of a phase, "tune" or "test", of a task, with these values."""
        also = json.loads(json.dumps(also))
        return [
            row
            for row in self.rows
            if row["phase"] == phase and row["task"] == task and all(row[k] == v for k, v in also.items())
        ]

    def add(self, row: Mapping[str, Any]) -> None:
        """Put a row in and write the file."""
        self.rows.append(json.loads(json.dumps(row, allow_nan=False)))
        self.write()

    def write(self) -> None:
        """Write the file: beside its place, then moved over it."""
        body = {"format": FORMAT, "protocol": self.protocol, "rows": self.rows}
        new = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(new, "w", encoding="utf-8") as file:
                file.write(json.dumps(body, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror or error}") from error
        finally:
            new.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Protocol and rows of a rows.json; `DataError` for another file."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as rows of VTAB-1k: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(f"{path} holds no rows of VTAB-1k in the format {FORMAT}; choose another --out")
    return body["protocol"], body["rows"]


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> None:
    for name in sorted(there.keys() | here.keys()):
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(path, a, b, f"{within}{name}.")
        elif a != b:
            raise OptionError(
                f"{path} holds rows of another protocol: {within}{name} is {json.dumps(a)} there and "
                f"{json.dumps(b)} here. Give what was given then, or another --out"
            )
