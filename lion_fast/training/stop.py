"""Why a run ends before its last epoch: a signal, a loss that is not finite, patience that is over."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lion_fast.errors import LionError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C, or a termination signal) and has written a checkpoint.

    Attributes:
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; the checkpoint {checkpoint} is written, resume to continue from it")
        self.checkpoint = checkpoint


class TrainingError(LionError, RuntimeError):
    """Training that cannot go on: the loss or a parameter is not finite."""


class Leave(KeyboardInterrupt):
    """Work that is not worth keeping was left in the middle, because a stop was asked for."""


class Interruption:
    """While active, the first SIGINT or SIGTERM is noted and the second acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave_if_asked(self) -> None:
        """Raise `Leave` where this process was asked to stop."""
        if self.asked:
            raise Leave

    def asked_of_any(self, accelerator: "Accelerator") -> bool:
        """Whether a process was asked to stop: all stop together, or one would wait for the others."""
        if accelerator.num_processes == 1:
            return self.asked
        return accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device)).item() > 0


def quiet_worker(_: int) -> None:
    """Have a reading process outlive Ctrl-C, which reaches the whole group: the training process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
