"""The files of an adapter: the tensors as safetensors, and JSON that describes the model they belong to.

A folder holds `adapter.safetensors` (the tensors) and `adapter.json` (method, options, classes, backbone,
normalisation, versions, the tensors' SHA-256). Nothing in it is ever executed: no pickle is written or read.

A pruned matrix X is three tensors: X#bits (its mask, a bit per entry), X#kept (the values on it), X#shape.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lion_fast import __version__
from lion_fast.backbones import Backbone
from lion_fast.errors import AdapterError, shown
from lion_fast.files import write_together
from lion_fast.options import parse_json, read_file
from lion_fast.pruning.packing import is_packed, pack_state, unpack_state

FORMAT = "lion_fast.adapter"
# Version 2 has packed matrices or compacted layers; what has neither is written as version 1.
FORMAT_VERSION = 2
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def write_adapter(
    directory: str | os.PathLike, description: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write a model's description and tensors into `directory`, made where missing.

    Both files are written beside their places and then moved over them, so a reader never meets half a file
    and a save that fails leaves the adapter that was there. The description names the tensors' hash, so files
    of two saves are never taken for one adapter.
    Raises `AdapterError` where the directory cannot be written, a tensor is NaN or Inf (nothing is written
    then) or the description is not plain data.
    """
    directory = Path(directory)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    if bad := not_finite(state):
        raise AdapterError(
            f"not saved: {', '.join(bad)} hold NaN or Inf; lower the learning rate and train again"
        )
    about = {"format": f"{FORMAT} {FORMAT_VERSION}"}  # one name: several come in any order
    tensors = safetensors.torch.save(pack_state(state), about)
    try:
        text = json.dumps(
            {"format": FORMAT, **description, "tensors_sha256": hashlib.sha256(tensors).hexdigest()},
            indent=2,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise AdapterError(f"not saved: the description of the model is not plain JSON ({error})") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_together({directory / TENSORS: tensors, directory / DESCRIPTION: f"{text}\n"})
    except OSError as error:
        raise AdapterError(
            f"the adapter cannot be written to {directory}: {error.strerror or error}; "
            "give a writable directory on a disk with room"
        ) from error


def describe_images(backbone: Backbone) -> dict[str, Any]:
    """What images the backbone takes: size, mean, std, interpolation and crop; JSON-able."""
    size = backbone.img_size
    # said only where it is another: what was written before there was a choice stays equal to what is now
    other = backbone.resize == "crop" and backbone.crop_mode != "center"
    return {
        "img_size": size if isinstance(size, int) else list(size),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.interpolation,
        "crop_pct": backbone.crop_pct,
        "resize": backbone.resize,
        **({"crop_mode": backbone.crop_mode} if other else {}),
    }


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    return [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a saved adapter, checked against each other; nothing is built.

    Raises `AdapterError`, naming the file, for what is missing, truncated, foreign, not finite, written by a
    newer format, or from two different saves.
    """
    directory = Path(directory)
    again = "save the adapter again, or fetch both files again"
    raw = {}
    for name in (DESCRIPTION, TENSORS):
        try:
            raw[name] = read_file(directory / name)
        except FileNotFoundError as error:
            raise AdapterError(
                f"no {name} in {directory}; give a directory that save_adapter wrote: "
                f"{DESCRIPTION} and {TENSORS}"
            ) from error
        except OSError as error:
            raise AdapterError(f"{directory / name} cannot be read: {error.strerror or error}") from error

    path = directory / DESCRIPTION
    try:
        description = parse_json(raw[DESCRIPTION])
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON (truncated, or not an adapter): {error}; {again}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{path} does not describe a lion-fast adapter; {again}")
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise AdapterError(f"{path} has no valid format_version (got {shown(version)}); {again}")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {version}; this lion-fast {__version__} reads up to "
            f"{FORMAT_VERSION}. Install the lion-fast that wrote it"
        )
    _check_fields(path, description)

    path = directory / TENSORS
    try:
        state = safetensors.torch.load(raw[TENSORS])
    except Exception as error:  # of safetensors, and of torch for a dtype or shape that it lacks
        raise AdapterError(
            f"{path} is not a readable safetensors file ({error}): truncated? {again}"
        ) from error
    if hashlib.sha256(raw[TENSORS]).hexdigest() != description["tensors_sha256"]:
        raise AdapterError(
            f"{path} is not the one {DESCRIPTION} describes: damaged, or from another save; {again}"
        )
    try:
        state = unpack_state(state) if is_packed(state) else state
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    if bad := not_finite(state):
        raise AdapterError(f"{path}: {', '.join(bad)} holds NaN or Inf; train the adapter again")
    head = state.get("head.weight")
    if head is None or head.ndim != 2 or head.shape[0] != description["num_classes"]:
        is_matrix = head is not None and head.ndim == 2
        told = f"a head of {head.shape[0]} outputs" if is_matrix else "no head"
        raise AdapterError(
            f"{path} has {told}; {DESCRIPTION} says num_classes={description['num_classes']}; {again}"
        )
    return description, state


def _is_choice(chosen: dict) -> bool:
    kinds = {"words": str, "at": list, "folds": int, "images": int, "loss": (int, float)}
    alone = chosen.get("features_alone", "")
    return all(isinstance(chosen.get(name), kind) for name, kind in kinds.items()) and (
        alone is None or isinstance(alone, (int, float))
    )


def _check_fields(path: Path, description: dict) -> None:
    """Foreign content gets a message and not a KeyError; a name or option reaches no code unchecked."""
    wanted = {
        "method": str,
        "options": dict,
        "num_classes": int,
        "backbone": dict,
        "normalisation": dict,
        "tensors_sha256": str,
    }
    for key, kind in wanted.items():
        if not isinstance(description.get(key), kind):
            raise AdapterError(f"{path}: {key} is missing or no {kind.__name__}; save the adapter again")
    classes, number = description.get("classes"), description["num_classes"]
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (names and len(classes) == number):
        raise AdapterError(
            f"{path}: classes are not num_classes={shown(number)} names; save the adapter again"
        )
    chosen = description.get("chosen")
    if chosen is not None and not (isinstance(chosen, dict) and _is_choice(chosen)):
        raise AdapterError(f"{path}: chosen does not say how a reading was chosen; save the adapter again")
    backbone = description["backbone"]
    if not isinstance(backbone.get("name"), str) or not isinstance(backbone.get("sha256"), str):
        raise AdapterError(f"{path}: the backbone lacks its name or sha256; save the adapter again")
    normalisation = description["normalisation"]
    for key in ("mean", "std"):
        values = normalisation.get(key)
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
            raise AdapterError(
                f"{path}: normalisation {key} is not a list of numbers; save the adapter again"
            )
