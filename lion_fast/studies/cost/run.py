"""Running a plan: what is not held yet, setting by setting, and what to do where the device is lost."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lion_fast.studies import runner
from lion_fast.studies.cost.measure import DeviceLost, measure
from lion_fast.studies.cost.plan import Plan
from lion_fast.studies.cost.setting import Contender, Setting, keys
from lion_fast.studies.environment import context, same_place
from lion_fast.studies.rows import Store

# A contender that lost the device so often is left alone
MOST_LOSSES = 2

Item = tuple[Setting, list[Contender]]


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
    where = context(torch.device(device))
    todo = _Todo(plan, store, where, again)
    total, told = todo.left(), {"settings": len(plan), "measured": 0, "held": todo.held}

    def measured(item: Item) -> list[dict]:
        setting, missing = item
        turn = f"[{total - todo.left() + 1}/{total}] "
        try:
            rows = measure(
                setting, missing, device=device, rounds=rounds, where=where, say=lambda text: say(turn + text)
            )
        except DeviceLost as error:
            rows = todo.lose(error)
        told["measured"] += len(rows)
        return rows

    left = runner.run(todo, measured, minutes=minutes).left
    return told | {"left": left, "lost": todo.lost}


class _Todo(runner.Plan[Item]):
    """The settings with the contenders that are not held; those that lost the device come last, alone.

    An earlier floor stays beside the rows that were divided by it: each row has its own floor's time.
    """

    def __init__(self, plan: Plan, store: Store, where: Mapping[str, Any], again: bool) -> None:
        self.where, self.lost = where, None
        held, first, last = 0, [], []
        for setting, wanted in plan:
            floor, *others = keys(setting, wanted)
            missing = []
            for contender, key in zip(wanted, others, strict=True):
                row = self._row(store, key)
                losses = 0 if again else max(self._losses(store, k) for k in (floor, key))
                if not again and ((row and row["status"] != "failed") or losses >= MOST_LOSSES):
                    held += 1
                elif losses:
                    last.append((setting, [contender]))
                else:
                    missing.append(contender)
            if missing:
                first.append((setting, missing))
        super().__init__({str(i): item for i, item in enumerate([*first, *last])}, store, again=True)
        self.held = held

    def next(self) -> tuple[str, Item] | None:
        """None once the device is lost."""
        return None if self.lost else super().next()

    def lose(self, error: DeviceLost) -> list[dict]:
        """The rows of the setting in which the device was lost, its losses counted."""
        self.lost = error.key
        row = next(row for row in error.rows if row["key"] == error.key)
        row["losses"] = 1 + self._losses(self.store, error.key)
        return error.rows

    def _row(self, store: Store, key: str) -> dict | None:
        row = store.get(key)
        return row if row is not None and same_place(row, self.where) else None

    def _losses(self, store: Store, key: str) -> int:
        """How often this contender has lost the device since it last did not."""
        row = self._row(store, key)
        return row.get("losses", 0) if row is not None else 0
