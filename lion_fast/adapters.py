"""Adapters loaded: the model that one was saved from, built on its backbone again."""

import os
from pathlib import Path
from typing import Any

import torch

from lion_fast.backbones import OWN_WEIGHTS, Backbone, load_backbone
from lion_fast.errors import (
    AdapterError,
    LionError,
    OptionError,
    WeightsError,
    check_path,
    check_whole,
    one_line,
    shown,
)
from lion_fast.methods import TunedModel, available, check_kinds, create
from lion_fast.methods.files import DESCRIPTION, TENSORS, describe_images, read_adapter
from lion_fast.pruning.compaction import restore_compacted


def save_adapter(model: TunedModel, directory: str | os.PathLike) -> None:
    """Write what the method trained, and its head, into `directory`: `TunedModel.save_adapter`."""
    model.save_adapter(directory)


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
    check_path("directory", directory)
    if num_classes is not None:
        check_whole("num_classes", num_classes)
    if weights is not None:
        check_path("weights", weights)
    if backbone is not None and not isinstance(backbone, Backbone):
        raise OptionError(f"backbone must be a Backbone, see load_backbone; got {shown(backbone)}")
    directory = Path(directory)
    description, state = read_adapter(directory)
    if description["method"] not in available():  # before a backbone is fetched for nothing
        raise AdapterError(
            f"{directory / DESCRIPTION}: method {shown(description['method'])} is unknown here; known are "
            f"{', '.join(available())}. Install the lion-fast that wrote it"
        )
    if num_classes is not None and num_classes != description["num_classes"]:
        raise AdapterError(
            f"{directory} has num_classes={description['num_classes']}; {num_classes} are needed here. "
            "Train an adapter on these classes, or use the data it was trained on"
        )
    saved = description["backbone"]
    if backbone is None:
        backbone = _rebuild(directory, saved, weights)
        # the images of the training: an adapter without it is from before there was a choice
        backbone.crop_mode = description["normalisation"].get("crop_mode", "center")
    differs = backbone.weights_sha256 != saved["sha256"]
    if differs and not allow_other_backbone:
        raise AdapterError(
            f"{directory} was trained on {saved['name']} with weights {saved['sha256'][:12]}... "
            f"({one_line(saved.get('weights_source'), 200)}); this backbone is {backbone.name} with weights "
            f"{backbone.weights_sha256[:12]}... ({backbone.weights_source}). "
            "Give the backbone it was trained on, or allow_other_backbone=True to try it on this one"
        )
    if not allow_other_backbone:
        _check_images(directory, description, backbone)
    options = description["options"]
    if description["method"] == "lion":
        # before there was a choice
        options = {"form": "residual", "reading": "fixed", "front": "residual"} | options
    # a description makes no model that is larger than its tensors: nothing is allocated by its word
    most = max(4096, *(side for tensor in state.values() for side in tensor.shape))
    try:
        check_kinds(available()[description["method"]], options, most)
        model = create(backbone, description["method"], description["num_classes"], seed=0, **options)
        restore_compacted(model, description.get("compacted") or {})
    except Exception as error:  # options that no version wrote
        raise AdapterError(
            f"{directory / DESCRIPTION} describes a model that cannot be built: {error}; save it again"
        ) from error
    try:
        model.load_adapter_state_dict(state)
    except AdapterError as error:
        raise AdapterError(f"{directory / TENSORS}: {error}") from error
    model.classes, model.chosen = description.get("classes"), description.get("chosen")
    model.backbone_differs = differs
    try:
        return model.to(device).eval() if device is not None else model.eval()
    except Exception as error:  # every kind of device has kinds of its own
        raise OptionError(f"device {shown(device)} cannot be used here: {one_line(error, 200)}") from error


def _check_images(directory: Path, description: dict, backbone: Backbone) -> None:
    """Same weights fed with other images are another backbone too."""
    here = {"crop_mode": "center"} | describe_images(backbone)
    saved = {"resize": "crop", "crop_mode": "center"} | description["normalisation"]  # before it was a choice
    saved |= {"img_size": description["backbone"].get("img_size")}
    for key, value in here.items():
        same = saved.get(key) == value
        if key in ("mean", "std") and len(value) == len(saved[key]):
            same = all(abs(a - b) < 1e-6 for a, b in zip(value, saved[key], strict=True))
        if not same:
            raise AdapterError(
                f"{directory} was trained on images with {key} {one_line(saved.get(key), 200)}; "
                f"this backbone takes {value}. Build it as it was, or allow_other_backbone=True keeps it"
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
            f"({saved['name']}, {one_line(saved.get('weights_source'), 200)}); {instead}"
        )
    if file is None and not request.get("pretrained") and request.get("weights") is None:
        raise AdapterError(f"{directory} was trained on a backbone with random weights; {instead}")
    kwargs = request.get("timm_kwargs") or {}
    weights = request.get("weights") if file is None else os.fspath(file)
    # a description that came from elsewhere names a model and a local file at most, no address
    if not isinstance(request.get("name"), str) or ":" in request["name"] or not isinstance(kwargs, dict):
        raise AdapterError(
            f"{directory}: backbone {shown(request.get('name'))} is not a plain timm model; {instead}"
        )
    found = isinstance(weights, str) and (weights in OWN_WEIGHTS or Path(weights).is_file())
    if weights is not None and not found:
        raise AdapterError(f"{directory}: its weights file {shown(weights)} is not here; {instead}")
    given = {key: request.get(key) for key in ("img_size", "pool")}
    given |= {"resize": request.get("resize", "crop"), "pretrained": bool(request.get("pretrained"))}
    try:
        return load_backbone(weights=weights, **_tuples(given), name=request["name"], **_tuples(kwargs))
    except WeightsError:
        raise
    except (LionError, TypeError) as error:  # a TypeError: an argument given twice
        raise AdapterError(f"{directory}: its backbone cannot be built ({error}); {instead}") from error


def _tuples(value: Any) -> Any:
    """JSON's lists back to the tuples that they were."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
