"""Training checkpoints: written whole or not at all, verified before they are read, no pickle anywhere.

A checkpoint is a folder `step-XXXXXXXX` with `tensors.safetensors` (method, head and optimiser state),
`state.json` (progress and fingerprint) and `manifest.json` (size and sha256 of the other two).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lion_fast.errors import CheckpointError
from lion_fast.files import sync_folder, write_synced

FOLDER = "checkpoints"  # of an output folder
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
KEPT = 2
_NAME = re.compile(r"step-(\d{8})")


@dataclass
class Checkpoint:
    """A checkpoint in memory: named tensors, and JSON-able progress."""

    tensors: dict[str, torch.Tensor]
    state: dict
    path: Path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def write_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """Write `folder/step-XXXXXXXX` atomically and keep the two newest.

    Everything is written and synced in a folder of another name, which is then renamed: whoever lists the
    folder sees a whole checkpoint or none, also after a power failure.

    Raises:
        CheckpointError: The file system refused; the checkpoints before are untouched.
    """
    final = folder / f"step-{step:08d}"
    work = folder / f".writing-{final.name}-{os.getpid()}"
    files = {
        TENSORS: save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        STATE: (json.dumps(state, indent=1) + "\n").encode(),
    }
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    files[MANIFEST] = (json.dumps({"format": 1, "files": manifest}, indent=1) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir()
        for name, data in files.items():
            write_synced(work / name, data)
        sync_folder(work)
        if final.exists():
            # A resumed run meets a step again; a folder can only replace an empty one.
            shutil.rmtree(final)
        os.replace(work, final)
        sync_folder(folder)
        for old in list_checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {final} could not be written: {error.strerror or error}. Free space or choose "
            f"another output folder, then resume from the one before it"
        ) from error
    return final


def check_whole(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where all are as they were written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in (TENSORS, STATE)}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in expected.items():
        try:
            data = (path / name).read_bytes()
        except OSError:
            return f"{name} is missing"
        if len(data) != size:
            return f"{name} has {len(data)} bytes where {size} were written"
        if hashlib.sha256(data).hexdigest() != digest:
            return f"{name} does not have the checksum it was written with"
    return None


def prepare_output(
    out_dir: str | os.PathLike, *, resume: bool | str = False, overwrite: bool = False
) -> None:
    """Make the output folder, and refuse one that holds an earlier run unless that is meant.

    Raises:
        CheckpointError: It cannot be made, or holds checkpoints while neither `resume` nor `overwrite` is
            given, or none while `resume` is.
    """
    folder = Path(out_dir) / FOLDER
    found = list_checkpoints(folder)
    if resume:
        find_checkpoint(folder, resume)
    elif found and not overwrite:
        raise CheckpointError(
            f"{folder} holds checkpoints of an earlier run, up to {found[-1].name}: resume it (--resume), "
            "overwrite it (--overwrite), or choose another output folder"
        )
    check_room(Path(out_dir), 0)


def find_checkpoint(folder: Path, which: bool | str) -> Path:
    """The checkpoint called "latest" (or True), "previous" (the one before it), or `step-XXXXXXXX`.

    Raises:
        CheckpointError: It does not exist; the message names those that do.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}; start without resume")
    if which in (True, "latest"):
        return found[-1]
    if which == "previous" and len(found) > 1:
        return found[-2]
    for path in found:
        if path.name == which:
            return path
    names = ", ".join(path.name for path in found)
    raise CheckpointError(
        f"there is no checkpoint {which!r} in {folder}; resume takes latest, previous, {names}"
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying sizes and checksums.

    Raises:
        CheckpointError: It is truncated or damaged; the message names the newest older one that is whole.
    """
    fault = check_whole(path)
    if fault:
        older = [other for other in list_checkpoints(path.parent) if other.name < path.name]
        whole = [other.name for other in older if check_whole(other) is None]
        hint = "There is no whole one before it: start again without resume"
        if whole:
            hint = f"The one before it is whole: resume from {whole[-1]}"
        raise CheckpointError(f"the checkpoint {path} is damaged: {fault}. {hint}")
    try:
        state = json.loads((path / STATE).read_bytes())
        tensors = load((path / TENSORS).read_bytes())
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise unusable(path, error) from error
    if not isinstance(state, dict) or not isinstance(state.get("fingerprint"), dict):
        raise unusable(path, f"{STATE} has no fingerprint")
    return Checkpoint(tensors, state, path)


def unusable(path: Path, why: object) -> CheckpointError:
    """The error for a checkpoint whose content is not what a run writes."""
    return CheckpointError(
        f"the checkpoint {path} cannot be used: {why}. Resume from another one, or start again without resume"
    )


def check_fingerprint(checkpoint: Checkpoint, wanted: dict) -> None:
    """Raise `CheckpointError` naming every entry in which a fingerprint differs from this run's."""
    differences = list(_differences(checkpoint.state["fingerprint"], wanted))
    if differences:
        told = "; ".join(differences)
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} is from another run: {told}. Resume with the options it was "
            "written with, or choose another output folder"
        )


def _differences(found: object, wanted: object, name: str = ""):
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} was {_short(found)}, now {_short(wanted)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def remove(path: Path) -> None:
    """Delete a checkpoint; `CheckpointError` where that is not allowed."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"the earlier checkpoint {path} cannot be removed: {error.strerror}") from error


def check_room(out_dir: Path, tensor_bytes: int) -> None:
    """Make sure, before anything is trained, that the output can be written.

    Writes and removes a file of the size of all the checkpoints a run holds at once.

    Raises:
        CheckpointError: The folder cannot be made or written, or the space does not suffice.
    """
    needed = (KEPT + 1) * (tensor_bytes + 64 * 1024) + 1024 * 1024
    probe = out_dir / f".room-{os.getpid()}"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for left in out_dir.glob(".room-*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        free = shutil.disk_usage(out_dir).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {out_dir} is full: {free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB needed for "
                "checkpoints and the adapter. Free space or choose another output folder"
            )
        with open(probe, "wb") as file:
            block = bytes(1024 * 1024)
            for start in range(0, needed, len(block)):
                file.write(block[: needed - start])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output folder {out_dir}: {error.strerror or error} ({needed / 1e6:.1f} MB "
            "were tried). Choose another output folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
