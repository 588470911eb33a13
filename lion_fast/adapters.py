"""Adapters: what a method trained, saved as safetensors and JSON beside a description of its backbone.

A folder holds `adapter.safetensors` (the tensors) and `adapter.json` (method, options, classes, backbone,
normalisation, versions, the tensors' SHA-256). Nothing in it is ever executed: no pickle is written or read.

A pruned matrix X is three tensors: X#bits (its mask, a bit per entry), X#kept (the values on it), X#shape.
"""

import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch

from lion_fast import __version__
from lion_fast.backbones import OWN_WEIGHTS, Backbone, load_backbone
from lion_fast.errors import AdapterError, LionError
from lion_fast.files import write_atomically
from lion_fast.methods import TunedModel, available, create
from lion_fast.pruning.compaction import describe_compacted, restore_compacted
from lion_fast.pruning.packing import MASK, is_packed, pack_state, unpack_state

FORMAT = "lion_fast.adapter"
# Version 2 has packed matrices or compacted layers; what has neither is written as version 1.
FORMAT_VERSION = 2
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def describe(model: TunedModel) -> dict[str, Any]:
    """What `adapter.json` says about a model, the tensors' hash aside; JSON-able.

    >>> model = create(load_backbone("resnet10t", pretrained=False), "probe", num_classes=2)
    >>> describe(model)["method"]
    'probe'
    """
    backbone = model.backbone
    images = describe_images(backbone)
    compacted = describe_compacted(model)
    pruned = any(key.endswith(MASK) for key in model.adapter_state_dict())
    kept = {"kept": model.num_trainable(kept=True), "kept_with_head": model.num_trainable(True, kept=True)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if compacted or pruned else 1,
        "method": model.method,
        "options": model.options,
        "num_classes": model.num_classes,
        "classes": model.classes,
        "parameters": {"method": model.num_trainable(), "with_head": model.num_trainable(head=True)}
        | (kept if pruned else {}),
        **({"compacted": compacted} if compacted else {}),
        "backbone": {
            "name": backbone.name,
            "family": backbone.family,
            "weights_source": backbone.weights_source,
            "sha256": backbone.weights_sha256,
            "img_size": images.pop("img_size"),
            "pool": (backbone.request or {}).get("pool"),
            # what rebuilds it; a module or a class among its arguments cannot be written down
            "request": backbone.request if _is_plain(backbone.request) else None,
        },
        "normalisation": images,
        "versions": {
            "lion_fast": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def describe_images(backbone: Backbone) -> dict[str, Any]:
    """What images the backbone takes: size, mean, std, interpolation and crop; JSON-able."""
    size = backbone.img_size
    return {
        "img_size": size if isinstance(size, int) else list(size),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.interpolation,
        "crop_pct": backbone.crop_pct,
        "resize": backbone.resize,
    }


def save_adapter(model: TunedModel, directory: str | os.PathLike) -> None:
    """Write what the method trained, and its head, into `directory`, made where missing.

    Each file is written beside its place and moved over it, so a reader never meets half a file, and the
    description names the tensors' hash, so files of two saves are never taken for one adapter.
    Raises `AdapterError` where the directory cannot be written, a tensor is NaN or Inf (nothing is written
    then) or an option is not plain data.
    """
    directory = Path(directory)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.adapter_state_dict().items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise AdapterError(
            f"not saved: {', '.join(bad)} hold NaN or Inf; lower the learning rate and train again"
        )
    state = pack_state(state)
    tensors = safetensors.torch.save(state, {"format": FORMAT, "format_version": str(FORMAT_VERSION)})
    description = describe(model) | {"tensors_sha256": hashlib.sha256(tensors).hexdigest()}
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise AdapterError(f"not saved: the description of the model is not plain JSON ({error})") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / TENSORS, tensors)
        write_atomically(directory / DESCRIPTION, text)
    except OSError as error:
        raise AdapterError(
            f"the adapter cannot be written to {directory}: {error.strerror or error}; "
            "give a writable directory on a disk with room"
        ) from error


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and tensors of a saved adapter, checked against each other; nothing is built.

    Raises `AdapterError`, naming the file, for what is missing, truncated, foreign, not finite, written by a
    newer format, or from two different saves.
    """
    directory = Path(directory)
    again = "save the adapter again, or fetch both files again"
    raw = {}
    for name in (DESCRIPTION, TENSORS):
        try:
            raw[name] = (directory / name).read_bytes()
        except FileNotFoundError as error:
            raise AdapterError(
                f"no {name} in {directory}; give a directory that save_adapter wrote: "
                f"{DESCRIPTION} and {TENSORS}"
            ) from error
        except OSError as error:
            raise AdapterError(f"{directory / name} cannot be read: {error.strerror or error}") from error

    path = directory / DESCRIPTION
    try:
        description = json.loads(raw[DESCRIPTION])
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON (truncated, or not an adapter): {error}; {again}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{path} does not describe a lion-fast adapter; {again}")
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise AdapterError(f"{path} has no valid format_version (got {version!r}); {again}")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {version}; this lion-fast {__version__} reads up to "
            f"{FORMAT_VERSION}. Install the lion-fast that wrote it"
        )
    _check_fields(path, description)

    path = directory / TENSORS
    try:
        state = safetensors.torch.load(raw[TENSORS])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
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
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds NaN or Inf; train the adapter again")
    head = state.get("head.weight")
    if head is None or head.shape[0] != description["num_classes"]:
        told = "no head" if head is None else f"a head of {head.shape[0]} outputs"
        raise AdapterError(
            f"{path} has {told}; {DESCRIPTION} says num_classes={description['num_classes']}; {again}"
        )
    return description, state


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
    classes = description.get("classes")
    if classes is not None and (not isinstance(classes, list) or len(classes) != description["num_classes"]):
        raise AdapterError(f"{path}: classes do not count num_classes={description['num_classes']} names")
    backbone = description["backbone"]
    if not isinstance(backbone.get("name"), str) or not isinstance(backbone.get("sha256"), str):
        raise AdapterError(f"{path}: the backbone lacks its name or sha256; save the adapter again")
    normalisation = description["normalisation"]
    for key in ("mean", "std"):
        values = normalisation.get(key)
        if not isinstance(values, list) or not all(
            isinstance(v, (int, float)) and math.isfinite(v) for v in values
        ):
            raise AdapterError(
                f"{path}: normalisation {key} is not a list of numbers; save the adapter again"
            )
    if description["method"] not in available():
        raise AdapterError(
            f"{path}: method {description['method']!r} is unknown here; known are {', '.join(available())}. "
            "Install the lion-fast that wrote it"
        )


def load_adapter(
    directory: str | os.PathLike,
    backbone: Backbone | None = None,
    allow_other_backbone: bool = False,
    device: torch.device | str | None = None,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike | None = None,
) -> TunedModel:
    """The model an adapter was saved from, in evaluation mode.

    directory: what `save_adapter` wrote.
    backbone: the frozen backbone to use; by default it is loaded again as it was then, by name and weights
        source. Its weights must have the saved SHA-256, or `allow_other_backbone` must be given, which says
        so in the model's `backbone_differs`.
    device: where the model goes.
    num_classes: refuse an adapter with another number of classes.
    weights: file with the backbone's weights, where it is not (or no longer) where the adapter says.

    A backbone that takes images of another size or normalisation is refused on the same terms.

    Raises `AdapterError` for files or a backbone that do not fit; `WeightsError` where the backbone's weights
    cannot be had, offline for one.
    """
    directory = Path(directory)
    description, state = read_adapter(directory)
    if num_classes is not None and num_classes != description["num_classes"]:
        raise AdapterError(
            f"{directory} has num_classes={description['num_classes']}; {num_classes} are needed here. "
            "Train an adapter on these classes, or use the data it was trained on"
        )
    saved = description["backbone"]
    if backbone is None:
        backbone = _rebuild(directory, saved, weights)
    differs = backbone.weights_sha256 != saved["sha256"]
    if differs and not allow_other_backbone:
        raise AdapterError(
            f"{directory} was trained on {saved['name']} with weights {saved['sha256'][:12]}... "
            f"({saved.get('weights_source')}); this backbone is {backbone.name} with weights "
            f"{backbone.weights_sha256[:12]}... ({backbone.weights_source}). "
            "Give the backbone it was trained on, or allow_other_backbone=True to try it on this one"
        )
    if not allow_other_backbone:
        _check_images(directory, description, backbone)
    options = description["options"]
    if description["method"] == "lion":
        options = {"form": "residual"} | options  # before there was a choice
    try:
        model = create(backbone, description["method"], description["num_classes"], seed=0, **options)
        restore_compacted(model, description.get("compacted") or {})
    except (LionError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{directory / DESCRIPTION} describes a model that cannot be built: {error}"
        ) from error
    try:
        model.load_adapter_state_dict(state)
    except AdapterError as error:
        raise AdapterError(f"{directory / TENSORS}: {error}") from error
    model.classes = description.get("classes")
    model.backbone_differs = differs
    return model.to(device).eval() if device is not None else model.eval()


def _check_images(directory: Path, description: dict, backbone: Backbone) -> None:
    """Same weights fed with other images are another backbone too."""
    here = describe_images(backbone)
    saved = {"resize": "crop"} | description["normalisation"]  # "crop": before there was a choice
    saved |= {"img_size": description["backbone"].get("img_size")}
    for key, value in here.items():
        same = saved.get(key) == value
        if isinstance(value, list) and isinstance(saved.get(key), list) and len(value) == len(saved[key]):
            same = all(abs(a - b) < 1e-6 for a, b in zip(value, saved[key], strict=True))
        if not same:
            raise AdapterError(
                f"{directory} was trained on images with {key} {saved.get(key)}; this backbone takes "
                f"{value}. Build it as it was, or give allow_other_backbone=True to keep the difference"
            )


def _rebuild(directory: Path, saved: dict, file: str | os.PathLike | None) -> Backbone:
    instead = (
        f"give the file of the weights it was trained on (weights=FILE, --weights FILE), or "
        f"backbone=load_backbone({saved['name']!r}, ...) with them"
    )
    request = saved.get("request")
    if not isinstance(request, dict):
        raise AdapterError(
            f"{directory} was trained on a backbone that was not built by load_backbone "
            f"({saved['name']}, {saved.get('weights_source')}); {instead}"
        )
    if file is None and not request.get("pretrained") and request.get("weights") is None:
        raise AdapterError(f"{directory} was trained on a backbone with random weights; {instead}")
    kwargs = request.get("timm_kwargs") or {}
    weights = request.get("weights") if file is None else os.fspath(file)
    # a description that came from elsewhere names a model and a local file at most, no address
    if not isinstance(request.get("name"), str) or ":" in request["name"] or not isinstance(kwargs, dict):
        raise AdapterError(
            f"{directory}: backbone {request.get('name')!r} is not a plain timm model; {instead}"
        )
    if weights is not None and weights not in OWN_WEIGHTS and not Path(str(weights)).is_file():
        raise AdapterError(f"{directory}: its weights file {weights!r} is not here; {instead}")
    return load_backbone(
        request["name"],
        pretrained=bool(request.get("pretrained")),
        weights=weights,
        img_size=_tuples(request.get("img_size")),
        pool=request.get("pool"),
        resize=request.get("resize", "crop"),
        **{key: _tuples(value) for key, value in kwargs.items()},
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _tuples(value: Any) -> Any:
    """JSON's lists back to the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
