"""Measurement rows: what identifies one, where it was taken, and their files."""

import csv
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lion_fast.errors import DataError

FORMAT = 1
JSON_NAME, CSV_NAME = "rows.json", "rows.csv"


class Store:
    """The rows of one folder: `rows.json`, rewritten atomically whenever rows come in.

    What a killed process leaves is the file before or after a change, never a part of one. Raises `DataError`
    for a file that holds something else.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / JSON_NAME
        self.rows: list[dict] = read(self.path) if self.path.exists() else []

    def get(self, key: str, where: Mapping[str, Any]) -> dict | None:
        """The row of that key, if taken with the same versions, device, threads and revision of the code."""
        same = ("versions", "device_name", "threads", "git_code")
        found = (r for r in self.rows if r["key"] == key and all(r[k] == where[k] for k in same))
        return next(found, None)

    def has(self, key: str, where: Mapping[str, Any]) -> bool:
        """Whether `get` finds a row that did not fail."""
        row = self.get(key, where)
        return row is not None and row["status"] != "failed"

    def add(self, rows: Iterable[dict]) -> None:
        """Put rows in, in the place of those with the same key, and write."""
        rows = list(rows)
        new = {row["key"] for row in rows}
        self.rows = [row for row in self.rows if row["key"] not in new] + rows
        self.write()

    def write(self) -> None:
        """Write `rows.json`; it is on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        body = {
            "format": FORMAT,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": self.rows,
        }
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "w", encoding="utf-8") as file:
            file.write(json.dumps(body, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)


def write_csv(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Rows as a table, flat, for a spreadsheet."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def read(path: str | os.PathLike) -> list[dict]:
    """The rows of a rows.json, or of the one in a folder; `DataError` if there are none."""
    path = Path(path)
    path = path / JSON_NAME if path.is_dir() else path
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as measurement rows: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(
            f"{path} holds no measurement rows of format {FORMAT}; measure again with lion-fast bench"
        )
    return body["rows"]


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
