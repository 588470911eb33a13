"""Rows of the format lion_fast.vtab/1, as those of today: what they hold goes on to count."""

import json
from collections.abc import Mapping
from typing import Any

from lion_fast.studies.grid import digest
from lion_fast.studies.vtab.protocol import Protocol


def modern(row: Mapping[str, Any], protocol: Protocol, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `Workshop.run` makes it; protocol and backbone are known to be the row's."""
    task, method = row["task"], protocol.method
    grid = protocol.on(task, task, backbone)
    varied = [
        {name.partition(".")[2]: value for name, value in configuration.items()}
        for configuration in json.loads(json.dumps(grid.methods[method].configurations))
    ]
    index = varied.index(row["varied"])
    stage = {"tune": "tune", "test": "final"}[row["phase"]]
    item = grid.item(stage, backbone["name"], task, method, index, row["seed"])

    def metrics(names: Mapping[str, str]) -> dict[str, Any] | None:
        found = {name: row[old] for name, old in names.items() if old in row}
        return found if len(found) == len(names) else None

    sizes = {"train": "train_images", "test": "test_images"}
    counts = row.get("parameters")
    return {
        **{name: row[name] for name in ("seed", "options", "protocol", "seconds")},
        **{name: row[name] for name in row if name in ("versions", "device", "device_name", "threads")},
        **{name: row[name] for name in row if name in ("git", "git_code", "git_changed")},
        "stage": stage,
        "key": digest([item.run, backbone["sha256"]]),
        "run": item.run,
        "backbone": item.backbone,
        "set": task,
        "label": method,
        "configuration": grid.methods[method].configurations[index],
        "method": method,
        "train": row["train"],
        "monitor": "accuracy",
        "failed": None if row["status"] == "done" else row["reason"],
        "data": {
            "fingerprint": row["data"],
            "sizes": {part: row.get(name) for part, name in sizes.items()},
            "classes": row.get("classes"),
            "skipped": row.get("skipped", 0),
        },
        "val": metrics({"accuracy": "val_accuracy", "loss": "val_loss", "n": "val_images"}),
        "test": metrics(
            {
                "accuracy": "accuracy",
                "balanced_accuracy": "balanced_accuracy",
                "loss": "loss",
                "n": "test_images",
            }
        ),
        "parameters": counts and {"kept": counts["kept"], "kept_with_head": counts["with_head"]},
    }
