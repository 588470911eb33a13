"""Configurations timed on a device, kept as JSON per device; opt-in, and read only when a kernel launches.

Without a file the tables of `launch` apply. Tuning changes tile sizes and with them the order of sums
inside a row; it never depends on the number of rows, so that batches of all sizes agree to the bit.
"""

import functools
import json
import os
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from lion_kernels import launch

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


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
    return _of_device(device.index).get(key(op, width, state, dtype, launch.tf32_allowed()))


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


def candidates(
    op: str, width: int, state: int, dtype: torch.dtype, capability: tuple[int, int]
) -> list[launch.Config]:
    """The table's configuration first, then tiles around it that can fit the chip."""
    first = launch.config(op, 1, width, state, dtype, capability, launch.tf32_allowed())
    found = [first]
    padded, size = launch.padded_state(state), 4 if dtype == torch.float32 else 2
    limit = SHARED_BYTES[
        max((c for c in SHARED_BYTES if c <= capability[0] * 10 + capability[1]), default=80)
    ]
    for block_t, block_d, warps, stages in product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        shared = stages * (block_t + padded) * block_d * size + padded * padded * size
        per_thread = 3 * block_t * padded / (32 * warps)
        if shared <= limit and per_thread <= 200:
            found.append(launch.Config(block_t, block_d, warps, stages, carry=first.carry))
    return list(dict.fromkeys(found))


def autotune(
    width: int,
    state: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 50432,
    activation: str = "relu",
    device: str | torch.device = "cuda",
) -> dict[str, launch.Config]:
    """Times solve and adjoint over their candidates on a device and stores the fastest of each.

    The problem is random with a recurrence of norm 0.8. A candidate that does not compile or launch is
    left out. Returns the stored entries. Takes minutes, most of them compilation. Needs a CUDA device.

        from lion_kernels import tune
        tune.autotune(768, 64)
    """
    from triton.testing import do_bench

    from lion_kernels import adjoint, solve

    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, grad_out = draw(rows, width).to(dtype), draw(rows, width).to(dtype)
    A, V, b, c = draw(state, width) / width**0.5, draw(width, state) / state**0.5, draw(state), draw(width)
    W = draw(state, state)
    W *= 0.8 / torch.linalg.matrix_norm(W, 2)
    options = (activation, 50, 1e-3, 1.0, True)
    p = solve.solve(x, A, W, b, V, c, *options)[1]

    def run_solve(config: launch.Config):
        return solve.solve(x, A, W, b, V, c, *options, config=config)

    def run_adjoint(config: launch.Config):
        return adjoint.adjoint(grad_out, x, p, A, W, V, activation, 8, 0.0, 1.0, True, config=config)

    entries = {}
    for op, run in (("solve", run_solve), ("adjoint", run_adjoint)):
        times = {}
        for config in candidates(op, width, state, dtype, launch.capability(device)):
            try:
                times[config] = do_bench(lambda: run(config), return_mode="median")  # noqa: B023
            except Exception as error:
                print(f"{op} {config}: left out ({type(error).__name__})")
        entries[key(op, width, state, dtype, launch.tf32_allowed())] = min(times, key=times.get)
    name = torch.cuda.get_device_name(device)
    write(path(name), entries, name)
    return entries
