"""Contenders beside each other: each is gated by its own result, then all are timed in turns.

A contender that is wrong, cannot run or breaks gets a row that says so and no time, and the others go on.
"""

import dataclasses
from collections.abc import Callable

import measure
import rows as stage
from contenders import Contender, NotInstalled
from problems import Problem

from lion_fast.studies.measuring import distance, quantiles

# Errors of out - x and of dx, relative to their norms, that no contender in half precision may exceed.
OUT_ERROR, DX_ERROR = 3e-2, 6e-2
ROUNDS, DRY_ROUNDS = 11, 3


def errors(subject: measure.Subject, problem: Problem, recurrence: str) -> tuple[float, float | None]:
    """The relative errors of out - x and, but for the mode forward, of dx, against float64."""
    moved, dx = problem.exact(recurrence)
    error_out = distance(subject.output().double() - problem.x[0].double(), moved)
    if subject.mode == "forward":
        return error_out, None
    return error_out, distance(subject.gradients()[0], dx)


def prepare(
    contender: Contender, problem: Problem, mode: str, device: str, seconds: float = 0.12
) -> tuple[measure.Subject | None, dict]:
    """The subject, if it can run and is right, and what its row says besides the times.

    seconds: about so long is spent on eager calls. Raises `measure.NotCaptured` as `measure.Subject`.
    """
    try:
        ready = contender.make(problem)
        subject = measure.Subject(ready, problem, mode, contender.compiled, contender.captured, device)
        error_out, error_dx = errors(subject, problem, contender.recurrence)
        told = {"error_out": error_out, "error_dx": error_dx}
        # torchdeq stops its backward by its own rule, so its dx is reported and not judged.
        judged = error_dx is not None and not contender.name.startswith("torchdeq")
        if not error_out <= OUT_ERROR or (judged and not error_dx <= DX_ERROR):
            return None, {**told, "failed": "wrong result, not timed"}
        if not subject.captured_agrees():
            return None, {**told, "failed": "the captured graph gives another result than the eager call"}
        calls = max(2, min(20, round(seconds / max(subject.sample(1, eager=True), 1e-6))))
        told |= {
            "how": subject.how,
            "sets": subject.sets,
            "host_us": 1e6 * subject.host_seconds(calls),
            "eager_us": 1e6 * subject.sample(calls, eager=True),
            "peak_bytes": subject.peak_bytes(),
            "saved_bytes": subject.saved_bytes(),
        }
        return subject, told
    except NotInstalled as reason:
        return None, {"skipped": str(reason)}
    except measure.NotCaptured:
        raise
    except Exception as error:  # of whatever kind: one contender must not cost the others their rows
        return None, {"failed": stage.reason(error)}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where rows go, on which device, and about how many seconds a contender is timed."""

    rows: stage.Rows
    device: str
    seconds: float

    @property
    def dry(self) -> bool:
        """Whether this is a rehearsal."""
        return bool(self.rows.common.get("dry_run"))

    def time(
        self,
        known: dict,
        chosen: list[Contender],
        problem: Callable[[], Problem],
        describe: Callable[[Contender, Problem], dict],
        finish: Callable[[dict], dict] = lambda row: {},
    ) -> None:
        """The rows of the chosen contenders that are not known yet, in one interleaved run; says all of them.

        known: what tells these rows from others, `contender` apart, with their "mode". problem() is asked for
        only where something is left to do. describe: a row before it is timed; finish: what its times add.
        """
        rows = self.rows
        todo = [c for c in chosen if rows.known(contender=c.name, **known) is None]
        # The first is ours: it stands beside whatever is timed, and shows how far the device has drifted.
        if todo and chosen[0] not in todo and "us" in rows.known(contender=chosen[0].name, **known):
            todo.insert(0, chosen[0])
        if todo:
            self._time(known, todo, problem, describe, finish)
        report(rows, known)

    def _time(self, known, todo, problem, describe, finish) -> None:
        rows = self.rows
        subjects, bases = [], []
        keys = [{**known, "contender": contender.name, "note": contender.note} for contender in todo]
        try:
            with rows.attempt(*keys):
                built = problem()
        except Exception as error:
            return self._fail(keys, error)
        for contender, key in zip(todo, keys, strict=True):
            # What could not be captured in this run is not tried so again: it costs a process each time.
            run = rows.common["run"]
            if rows.matching(contender=contender.name, mode=known["mode"], run=run, uncaptured=True):
                contender = dataclasses.replace(contender, captured=False)
            try:
                with rows.attempt(key):
                    base = {**key, **describe(contender, built)}
                    subject, told = prepare(contender, built, known["mode"], self.device, self.seconds)
            except measure.NotCaptured as error:
                self._fail([key], error, uncaptured=True)
                stage.leave(error)
            except Exception as error:
                self._fail([key], error)
                continue
            if subject is None:
                rows.add({**base, **told})
                stage.leave_if_lost(self.device)
            else:
                subjects.append(subject)
                bases.append({**base, **told})
        try:
            with rows.attempt(*bases):
                measured = measure.interleaved(subjects, self.seconds, DRY_ROUNDS if self.dry else ROUNDS)
        except Exception as error:
            return self._fail(bases, error)
        for base, samples in zip(bases, measured, strict=True):
            times = quantiles([1e6 * seconds for seconds in samples])
            row = {**base, **dict(zip(("us", "us_20", "us_80"), times, strict=True))}
            rows.add({**row, **finish(row)})

    def _fail(self, keys: list[dict], error: Exception, **more) -> None:
        for key in keys:
            self.rows.add({**key, "failed": stage.reason(error), **more})
        stage.leave_if_lost(self.device)


def report(rows: stage.Rows, known: dict) -> None:
    """Print the newest row of every contender."""
    print(", ".join(f"{k} {v}" for k, v in {**known, "device": rows.common["device"]}.items()))
    for name, row in {row["contender"]: row for row in rows.matching(**known)}.items():
        text = row.get("skipped") or row.get("failed")
        if "us" in row:
            text = f"{row['us']:10.1f} us [{row['us_20']:.1f}, {row['us_80']:.1f}] {row['how']}"
            text += f", host {row['host_us']:.0f} us"
            if "copy_percent" in row:
                text += f", {row['copy_percent']:.1f} % of copy"
        print(f"  {name:<34}{text}", flush=True)
