"""What a run tells while it trains: metrics.csv, steps.csv, TensorBoard, a progress bar or lines."""

import csv
import io
import sys
from pathlib import Path

from tqdm import tqdm

from lion_fast.errors import OptionError
from lion_fast.files import write_atomically
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
                self.board = _summary_writer(folder / "tensorboard", step)
        self.bar = tqdm(
            total=setup.plan.steps, initial=step, desc="train", unit="step", disable=not bar, leave=False
        )

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()
        if self.board is not None:
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
            print(f"{line} ({row['seconds']:.1f} s)", file=sys.stderr, flush=True)

    def _draw(self, what: str, row: dict) -> None:
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
    """A CSV file that grows; rows after `keep_to_step`, from before an interruption, are dropped."""

    def __init__(self, path: Path, keep_to_step: int) -> None:
        self.path, rows = path, []
        if keep_to_step and path.exists():
            with open(path, newline="") as file:
                # a line that was being written when the process died has no step, or ends early
                whole = (r for r in csv.DictReader(file) if None not in r.values() and r["step"].isdigit())
                rows = [row for row in whole if int(row["step"]) <= keep_to_step]
        write_atomically(path, _to_csv(rows) if rows else "")
        self.names = list(rows[0]) if rows else None

    def add(self, row: dict) -> None:
        with open(self.path, "a", newline="") as file:
            first, self.names = self.names is None, self.names or list(row)
            writer = csv.DictWriter(file, self.names, lineterminator="\n", extrasaction="ignore")
            if first:
                writer.writeheader()
            writer.writerow(row)


def _to_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
