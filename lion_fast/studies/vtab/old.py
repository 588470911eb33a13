"""Rows of the format lion_fast.vtab/1, as those of today: what they hold goes on to count."""

import json
from collections.abc import Mapping
from typing import Any

from lion_fast.studies.grid import digest
from lion_fast.studies.vtab.protocol import Protocol

WHERE = ("versions", "device", "device_name", "threads", "git", "git_code", "git_changed")


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

    def metrics(part: str, prefix: str = "") -> dict[str, Any] | None:
        if f"{prefix}accuracy" not in row:
            return None
        names = [name for name in ("accuracy", "balanced_accuracy", "loss") if prefix + name in row]
        return {name: row[prefix + name] for name in names} | {"n": row[f"{part}_images"]}

    sizes = {"train": "train_images", "test": "test_images"}
    counts = row.get("parameters")
    return {
        **{name: row[name] for name in ("seed", "options", "protocol", "seconds")},
        **{name: row[name] for name in WHERE if name in row},
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
        "val": metrics("val", "val_"),
        "test": metrics("test"),
        "parameters": counts and {"kept": counts["kept"], "kept_with_head": counts["with_head"]},
    }
