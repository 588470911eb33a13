"""What a run tells while it trains: metrics.csv, steps.csv, TensorBoard, a progress bar or lines."""

import contextlib
import csv
import io
import itertools
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lion_fast.errors import OptionError
from lion_fast.files import say_once, write_atomically, writing
from lion_fast.training.setup import Setup


class Logs:
    """The logs of a run in `folder`; only the main process writes.

    Args:
        step: Steps done; what earlier logs say of later ones is dropped.
        bar: Show a progress bar on stderr.
        lines: Print a line an epoch to stderr.
    """

    def __init__(self, folder: Path, setup: Setup, step: int, *, bar: bool, lines: bool) -> None:
        self.folder, self.lines, self.epochs = folder, lines, setup.config.epochs
        self.main, self.board = setup.accelerator.is_main_process, None
        if self.main:
            self.steps = _GrowingCsv(folder / "steps.csv", keep_to_step=step)
            if setup.config.tensorboard:
                with writing(folder / "tensorboard"):
                    self.board = _summary_writer(folder / "tensorboard", step)
        self.bar = tqdm(
            total=setup.plan.steps, initial=step, desc="train", unit="step", disable=not bar, leave=False
        )

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):  # what it had still to write is lost, and nothing else
                self.board.close()

    def add_step(self, row: dict) -> None:
        """A row of steps.csv."""
        if self.main:
            self.steps.add(row)
            self._draw("step", row)

    def add_epoch(self, history: list[dict]) -> None:
        """The rows of metrics.csv, of which the last one is new."""
        if not self.main:
            return
        row = history[-1]
        write_atomically(self.folder / "metrics.csv", _to_csv(history))
        self._draw("epoch", row)
        told = ""
        if "val_accuracy" in row:
            told = f", val accuracy {row['val_accuracy']:.4f}"
            self.bar.set_postfix_str(f"epoch {row['epoch']}{told}")
        if self.lines:
            line = f"epoch {row['epoch']} of {self.epochs}: loss {row['train_loss']:.4f}{told}"
            with contextlib.suppress(OSError):  # nobody reads it
                print(f"{line} ({row['seconds']:.1f} s)", file=sys.stderr, flush=True)

    def _draw(self, what: str, row: dict) -> None:
        with writing(self.folder / "tensorboard"):
            for name in row:
                if self.board is not None and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{what}/{name}", row[name], row["step"])


def _summary_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionError("tensorboard is not installed; pip install tensorboard, or leave it out") from error
    return SummaryWriter(str(folder), purge_step=step)


class _GrowingCsv:
    """A CSV file that grows; rows after `keep_to_step`, from before an interruption, are dropped.

    A file that is no such log is kept aside, with a notice: a log never keeps a run from going on.
    """

    def __init__(self, path: Path, keep_to_step: int) -> None:
        self.path, rows = path, []
        if keep_to_step and path.exists():
            try:
                rows = _read_log(path)
            except (OSError, ValueError, KeyError, csv.Error) as error:
                aside = _free_name(path)
                with writing(path):
                    os.replace(path, aside)
                say_once(f"{path} is no log of steps ({error}); it is kept as {aside.name}, a new one begins")
        rows = [row for row in rows if int(row["step"]) <= keep_to_step]
        write_atomically(path, _to_csv(rows) if rows else "")
        self.names = list(rows[0]) if rows else None

    def add(self, row: dict) -> None:
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            first, self.names = self.names is None, self.names or list(row)
            writer = csv.DictWriter(file, self.names, lineterminator="\n", extrasaction="ignore")
            if first:
                writer.writeheader()
            writer.writerow(row)


def _read_log(path: Path) -> list[dict]:
    """The rows of a log, but a last one that was being written when the process died."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if rows and "step" not in rows[0]:
        raise KeyError("it has no column called step")
    whole = [None not in row and None not in row.values() and row["step"].isdecimal() for row in rows]
    if not all(whole[:-1]):
        raise ValueError(f"line {whole.index(False) + 2} is none of its rows")
    return [row for row, right in zip(rows, whole, strict=True) if right]


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _to_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
