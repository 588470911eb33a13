"""What every report is written with: one table, and where its rows were taken."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,), *, pad: bool = False
) -> list[str]:
    """The lines of a Markdown table; columns but those of `left` are set to the right.

    pad: fill the cells up with blanks, to be read in a terminal too.

    >>> table(["method", "accuracy"], [["lion", "0.944"]])
    ['| method | accuracy |', '| --- | ---: |', '| lion | 0.944 |']
    """
    lines = [list(head), *map(list, rows)]
    rule = ["---" if i in left else "---:" for i in range(len(head))]
    if pad:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = [word.replace("---", "-" * (w - len(word) + 3)) for word, w in zip(rule, widths, strict=True)]
        lines = [
            [
                v.ljust(w) if i in left else v.rjust(w)
                for i, (v, w) in enumerate(zip(line, widths, strict=True))
            ]
            for line in lines
        ]
    lines.insert(1, rule)
    return ["| " + " | ".join(line) + " |" for line in lines]


def where_taken(row: Mapping[str, Any]) -> str:
    """Device, versions and revision of a row, see `environment.context`, in words."""
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items() if v)
    revision = row["git"] or "no git checkout"
    changed = " with local changes" if row["git_changed"] else ""
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['device_name']} ({row['device']}{threads}); {versions}; revision {revision[:12]}{changed}"


def sources(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where rows were taken, a line for each place with the number of its rows."""
    counts = Counter(map(where_taken, rows))
    return [f"{n} run{'s' * (n > 1)} on {where}" for where, n in counts.items()]
