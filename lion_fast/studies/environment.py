"""Where and with what rows are taken: versions, device, threads, revision."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lion_fast import __version__

# The folder that holds the packages; a checkout where they are not installed
SOURCES = Path(__file__).resolve().parents[2]


def context(device: torch.device) -> dict[str, Any]:
    """Where and with what rows are taken: versions, device, threads, git revision."""
    import timm

    versions = {"lion_fast": __version__, "torch": torch.__version__, "timm": timm.__version__}
    versions["python"] = platform.python_version()
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    versions["cuda"] = torch.version.cuda
    return {
        "versions": versions,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        **git_revision(),
    }


def same_place(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a row was taken with the versions, device, threads and revision of code of `where`."""
    return all(row.get(k) == where[k] for k in ("versions", "device_name", "threads", "git_code"))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision(root: Path | None = None, code: Sequence[str] = ("lion_fast", "kernels")) -> dict[str, Any]:
    """The revision of the running sources and whether they differ from it.

    root: the checkout; default, that of this package. code: whose last change is "git_code": documents may
    change between two runs.
    LION_FAST_REVISION names it where it is set: a copy of the tree has no history, or one of its own. Else
    git is asked; None where the sources are in no checkout, or in one that does not know them.
    """
    if named := os.environ.get("LION_FAST_REVISION"):
        return {"git": named, "git_code": named, "git_changed": None}
    root = root or SOURCES

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # installed packages may lie inside somebody else's checkout
    revision = git("log", "-1", "--format=%H", "--", *code) if (root / ".git").exists() else None
    if not revision:
        return {"git": None, "git_code": None, "git_changed": None}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return {
        "git": git("rev-parse", "HEAD"),
        "git_code": revision,
        "git_changed": None if changed is None else bool(changed),
    }
