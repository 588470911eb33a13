"""Running a plan: what is not held yet, setting by setting, and what to do where the device is lost."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lion_fast.studies.cost.measure import DeviceLost, measure
from lion_fast.studies.cost.plan import Plan
from lion_fast.studies.cost.rows import Store
from lion_fast.studies.cost.setting import keys
from lion_fast.studies.environment import context

# A contender that lost the device so often is left alone
MOST_LOSSES = 2


def run(
    plan: Plan,
    store: Store,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    minutes: float | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure what the store does not hold yet, writing after every setting.

    A row counts as held if it was taken with the same versions, device, threads and revision of the code and
    did not fail; `again` measures all. Where a row is missing, the setting's other missing contenders are
    timed beside it with a floor of the same minutes. `minutes`: begin no setting after that.

    Where a contender loses the device (`DeviceLost`), rows are written and this returns, as nothing more can
    run in this process. In the next one that contender comes last, by itself, and after a second loss not
    any more: whoever calls again as long as something is lost comes to an end.

    Returns counts: "settings", "measured", "held", "left" (settings not begun), and "lost": the key of the
    contender that lost the device, or None.
    """
    device = torch.device(device)
    where = context(device)
    ends = time.monotonic() + 60 * minutes if minutes is not None else None
    told: dict[str, Any] = {"settings": len(plan), "measured": 0, "held": 0, "left": 0, "lost": None}
    todo, last = [], []
    for setting, wanted in plan:
        floor, *others = keys(setting, wanted)
        missing = []
        for contender, key in zip(wanted, others, strict=True):
            losses = 0 if again else max(_losses(store, k, where) for k in (floor, key))
            if not again and (store.has(key, where) or losses >= MOST_LOSSES):
                told["held"] += 1
            elif losses:
                last.append((setting, [contender]))
            else:
                missing.append(contender)
        if missing:
            todo.append((setting, missing))
    todo += last
    for i, (setting, missing) in enumerate(todo):
        if ends is not None and time.monotonic() >= ends:
            told["left"] += 1
            continue
        try:
            rows = measure(
                setting,
                missing,
                device=device,
                rounds=rounds,
                where=where,
                say=lambda text, i=i: say(f"[{i + 1}/{len(todo)}] {text}"),
            )
        except DeviceLost as error:
            rows = error.rows
            lost = next(row for row in rows if row["key"] == error.key)
            lost["losses"] = 1 + _losses(store, error.key, where)
            told |= {"lost": error.key, "left": len(todo) - i}
        # an earlier floor stays beside the rows that were divided by it: each row has its own floor's time
        store.add(rows)
        told["measured"] += len(rows)
        if told["lost"]:
            break
    return told


def _losses(store: Store, key: str, where: Mapping[str, Any]) -> int:
    """How often this contender has lost the device since it last did not."""
    row = store.get(key, where)
    return row.get("losses", 0) if row is not None else 0
