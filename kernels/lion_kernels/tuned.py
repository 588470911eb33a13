"""The configuration of a launch: the one tuned for the device where there is one, else the tables'.

Tuned configurations are kept as JSON per device (`tune.autotune`) and read only when a kernel launches.
Tuning changes tile sizes and with them the order of sums inside a row; it never depends on the number of
rows, so that batches of all sizes agree to the bit.
"""

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from lion_kernels import launch, launch_sparse, launch_step, present


def cache_dir() -> Path:
    """$LION_FAST_CACHE, or lion_fast in the user's cache directory."""
    return Path(os.environ.get("LION_FAST_CACHE") or Path.home() / ".cache" / "lion_fast")


def path(device_name: str) -> Path:
    """The file of a device's tuned configurations."""
    safe = "".join(c if c.isalnum() else "-" for c in device_name.lower())
    return cache_dir() / f"tuned-{safe}.json"


def key(op: str, width: int, state: int, dtype: torch.dtype, tf32: bool) -> str:
    """The name of an entry: operation, width, padded state and arithmetic."""
    arithmetic = launch.DTYPES[dtype] + ("-tf32" if tf32 and dtype == torch.float32 else "")
    return f"{op} D{width} R{launch.padded_state(state)} {arithmetic}"


@functools.cache
def read(file: Path) -> dict[str, launch.Config]:
    """The entries of a file, {} where there is none; ValueError for a file that is not ours."""
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["configs"]
        return {name: launch.Config(**fields) for name, fields in entries.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} holds no tuned configurations ({error}); delete it to go back to the built-in tables"
        ) from error


@functools.cache
def _of_device(index: int | None) -> dict[str, launch.Config]:
    return read(path(torch.cuda.get_device_name(index)))


def lookup(op: str, width: int, state: int, dtype: torch.dtype, device: torch.device) -> launch.Config | None:
    """The tuned configuration for this call on a CUDA device, or None."""
    if device.type != "cuda":
        return None
    return _of_device(device.index).get(key(op, width, state, dtype, present.tf32_allowed()))


def write(file: Path, entries: dict[str, launch.Config], device_name: str) -> None:
    """Adds entries to a device's file, which is replaced as a whole."""
    merged = {name: asdict(found) for name, found in {**read(file), **entries}.items()}
    text = json.dumps({"device": device_name, "torch": torch.__version__, "configs": merged}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
    read.cache_clear()
    _of_device.cache_clear()


def choose(
    op: str, rows: int, width: int, state: int, dtype: torch.dtype, device: torch.device
) -> launch.Config:
    """The configuration of `op` tuned for this device where there is one, else `launch.config`."""
    tf32 = present.tf32_allowed()
    return lookup(op, width, state, dtype, device) or launch.config(
        op, rows, width, state, dtype, present.capability(device), tf32
    )


def choose_step(
    rows: int, width: int, state: int, dtype: torch.dtype, device: torch.device, damping: float
) -> launch_step.StepConfig:
    """`launch_step.config` of the present process and of `device`."""
    capability = present.capability(device)
    return launch_step.config(rows, width, state, dtype, capability, present.tf32_allowed(), damping)


def choose_sparse(op: str, block: int, dtype: torch.dtype, damping: float = 1.0) -> launch_step.StepConfig:
    """`launch_sparse.config` under torch's present setting of tf32."""
    return launch_sparse.config(op, block, dtype, present.tf32_allowed(), damping)
