"""How to enter a frozen timm ViT, Swin or CNN at its two ends and inside its blocks.

Every method sees the same three stages, and their composition is timm's own forward:

    images -> enter -> tokens -> body (frozen blocks and last norm) -> tokens -> pool -> features (B, F)

| family | timm classes                             | tokens of `enter` | tokens of `body` |
| ------ | ---------------------------------------- | ----------------- | ---------------- |
| vit    | VisionTransformer, its distilled DeiT    | (B, N, D)         | (B, N, D)        |
| swin   | SwinTransformer, SwinTransformerV2       | (B, H, W, C)      | (B, H', W', C')  |
| cnn    | ResNet, EfficientNet, MobileNetV3, ConvNeXt | images (B, 3, H, W) | (B, H', W', C') channels last |
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lion_fast.backbones.at_work import works_for_first
from lion_fast.backbones.weights import OWN_WEIGHTS
from lion_fast.errors import BackboneError, DataError, OptionError, check_choice, check_number, check_whole
from lion_fast.options import RESIZE, sides

SUPPORTED = {
    "vit": (VisionTransformer,),
    "swin": (SwinTransformer, SwinTransformerV2),
    "cnn": (ResNet, EfficientNet, MobileNetV3, ConvNeXt),
}
SUPPORTED_TEXT = (
    "Supported are timm VisionTransformer (DeiT included), SwinTransformer, SwinTransformerV2, ResNet, "
    f"EfficientNet, MobileNetV3 and ConvNeXt models, and {', '.join(OWN_WEIGHTS)}"
)


def backbone_sha256(module: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's state, in the order of the names.

    without: names that are left out.

    >>> backbone_sha256(torch.nn.Identity())[:12]
    'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def _stay() -> None:
    """In the place of a batch norm's `reset_running_stats`."""


def family_of(model: nn.Module) -> str:
    """ "vit", "swin" or "cnn"; `BackboneError` for a model that is none of the supported ones."""
    for family, classes in SUPPORTED.items():
        if isinstance(model, classes):
            return family
    raise BackboneError(f"{type(model).__name__} is not a supported backbone. {SUPPORTED_TEXT}")


class Backbone(nn.Module):
    """A timm model, frozen, that is entered at its two ends.

    Its parameters have no gradient, whatever `requires_grad_` is told; it stays in evaluation mode, whatever
    `train` is told, so dropout and stochastic depth are off; normalisation statistics neither move nor are
    they reset (`torch.optim.swa_utils.update_bn`). Gradients still flow through it.

    Attributes: `family` ("vit", "swin" or "cnn"), `width_in` and `width_out` (channels of the tokens
    of `enter` and `body`), `num_features` (width of `pool`), `img_size` (int, or (height, width) when not
    square), `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, `resize` (what the images need),
    `weights_source` (where the weights came from, in words), `caveat` (what must be said of them, or None),
    `weights_sha256` (over the weights that are there), `request` (what `load_backbone` was asked for: what
    it takes to build it again), `memory`, `folded` and `precision` (how it computes; see `load_backbone`),
    `tuned_by` (the method that this copy of a backbone belongs to) and `trained` (the names in
    `model.named_parameters()` of what it trains).

    >>> import timm
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
        size = sides(config["input_size"][1:] if img_size is None else img_size)
        self.img_size = size[0] if size[0] == size[1] else size
        self.mean = tuple(mean or config["mean"])
        self.std = tuple(std or config["std"])
        self.interpolation = interpolation or config["interpolation"]
        if len(self.mean) != len(self.std):
            raise OptionError(f"mean and std must be of as many channels; got {self.mean} and {self.std}")
        for value in self.mean:
            check_number("mean", value)
        for value in self.std:
            check_number("std", value, above=0)
        self.crop_pct = crop_pct or config["crop_pct"]
        check_number("crop_pct", self.crop_pct, above=0)
        self.crop_mode = config["crop_mode"]
        check_choice("resize", resize, RESIZE)
        self.resize = resize
        self.weights_source = weights_source
        self.caveat = caveat
        self.request = dict(request) if request is not None else None
        self._sha256: str | None = None  # of the weights before any change of dtype
        self._held: str | None = None  # of the frozen ones as they are held
        self.memory, self.folded, self.precision = "plain", False, "fp32"
        self.tuned_by: str | None = None
        self.trained: frozenset[str] = frozenset()
        model.requires_grad_(False)
        super().train(False)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats = _stay
            if isinstance(module, WindowAttention):  # timm before 1.0.31 has 0 / 0 in windows of one token
                module.relative_coords_table.nan_to_num_(0.0)

        self.channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        if self.family == "vit":
            self.width_in = self.width_out = model.embed_dim
            shape = (1, self.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim)
        else:
            self.width_in = model.patch_embed.proj.out_channels if self.family == "swin" else self.channels
            self.width_out = model.num_features
            shape = (1, 2, 2, self.width_out)
        some = next(model.parameters())
        with torch.no_grad():
            # asked of the model itself: pooling may double the width (CNN) or a conv head may follow it
            self.num_features = self.pool(some.new_zeros(shape)).shape[-1]

    @property
    def weights_sha256(self) -> str:
        """`backbone_sha256` of the weights that are there, as they were before any change of dtype.

        Where a method trains some of them: of the weights that it started from.
        """
        if self._sha256 is None or self._held != self._frozen_sha256():
            self.name_weights(backbone_sha256(self.model))
        return self._sha256

    def name_weights(self, sha256: str) -> None:
        """Go by this hash until the frozen weights change in another way than by a cast."""
        self._sha256, self._held = sha256, self._frozen_sha256()

    def _frozen_sha256(self) -> str | None:
        if any(p.is_meta for p in self.model.parameters()):
            return self._held  # no bytes: as they were
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return backbone_sha256(self.model, trained)

    def _apply(self, fn: Callable, recurse: bool = True):
        dtypes = {p.dtype for p in self.model.parameters()}
        made = [(dtype, fn(torch.empty(0, dtype=dtype))) for dtype in dtypes]
        if all(t.dtype == dtype and not t.is_meta for dtype, t in made):
            return super()._apply(fn, recurse)
        sha256 = self.weights_sha256  # a cast changes the bytes: take the hash before it
        super()._apply(fn, recurse)
        self.name_weights(sha256)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Backbone":
        """Ask for gradients of what a method trains of this backbone; the rest stays frozen."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(requires_grad and name in self.trained)
        return self

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: frozen means dropout off and statistics still."""
        return super().train(False)

    def check_images(self, images: Tensor) -> None:
        """Raise `DataError` unless these are images (B, C, H, W) that this backbone takes."""
        weight = next(self.model.parameters())
        if not isinstance(images, Tensor) or not images.is_floating_point():
            told = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise DataError(f"images must be a tensor of floats, normalised for {self.name}; got {told}")
        cast = torch.is_autocast_enabled(images.device.type) and torch.float64 not in (
            images.dtype,
            weight.dtype,
        )
        if images.dtype != weight.dtype and self.precision == "fp32" and not cast:
            raise DataError(
                f"images are {images.dtype} and the weights of {self.name} {weight.dtype}; give the model "
                f"images.to({weight.dtype}), or cast it"
            )
        embed = getattr(self.model, "patch_embed", None)
        strict, padded = (getattr(embed, name, False) for name in ("strict_img_size", "dynamic_img_pad"))
        patch = (1, 1) if embed is None or padded else to_2tuple(embed.patch_size)
        good = images.ndim == 4 and images.shape[1] == self.channels and min(images.shape[2:]) > 0
        if good and strict:
            good = images.shape[2:] == embed.img_size
        if not good or any(n % p for n, p in zip(images.shape[2:], patch, strict=True)):
            told = "{} x {} pixels".format(*embed.img_size) if strict else "any size"
            told += "" if strict or patch == (1, 1) else " that is a multiple of {} x {}".format(*patch)
            raise DataError(
                f"{self.name} takes images (B, {self.channels}, H, W) of {told}; got {tuple(images.shape)}"
            )

    @works_for_first
    def enter(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens in front of the first frozen block.

        vit: patches with position embedding, prefix tokens (class, distillation, registers) in front, and
        the norm that some models have before their blocks; swin: the embedded patches (B, H', W', C);
        cnn: the images themselves. `DataError` for images that it does not take.
        """
        model = self.model
        self.check_images(images)
        if model.training:  # somebody told the model inside
            self.train()
        if self.precision != "fp32":
            images = images.to(next(model.parameters()).dtype)
        if self.family == "vit":
            return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return model.patch_embed(images) if self.family == "swin" else images

    @works_for_first
    def body(self, x: Tensor) -> Tensor:
        """Tokens of `enter` through the frozen blocks and the last norm.

        Where a ViT norms after pooling instead (`fc_norm`) the tokens are not normed yet; `pool` does it.
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

    def body_and_map(self, x: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """`body_and_maps` with one place and its map."""
        y, (found,) = self.body_and_maps(x, (at,))
        return y, found

    @works_for_first
    def body_and_maps(self, x: Tensor, at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """`body(x)`, and the maps (B, H, W, C) that left the blocks or stages `at` on the way.

        In the order of `at`, C of each = `map_widths[at]`. A ViT's map holds its patch tokens behind the
        block, without prefix tokens and norm; a Swin's is what the stage gives, a CNN's the same by timm's
        `feature_info`.
        """
        for place in at:
            check_whole("at", place, 0, len(self.map_widths) - 1)
        model = self.model
        if self.family == "cnn":
            # counted from the end: a ConvNeXt of timm before 1.0.16 counts its stem too
            order = sorted(at)
            y, maps = model.forward_intermediates(x, indices=[i - len(self.map_widths) for i in order])
            return y.permute(0, 2, 3, 1), [maps[order.index(i)].permute(0, 2, 3, 1) for i in at]
        found = {}
        for i, block in enumerate(model.blocks if self.family == "vit" else model.layers):
            x = block(x)
            if i in at:
                found[i] = self.map_of(x) if self.family == "vit" else x
        return model.norm(x), [found[i] for i in at]

    def map_of(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) of a ViT to the map (B, H, W, D) of its patches, without prefix tokens."""
        tokens = tokens[:, self.num_prefix_tokens :]
        height, width = self.model.patch_embed.dynamic_feat_size(sides(self.img_size))
        if height * width != tokens.shape[1]:
            raise BackboneError(
                f"{self.name} gave {tokens.shape[1]} patch tokens; "
                f"images of {self.img_size} pixels make {height} x {width}"
            )
        return tokens.unflatten(1, (height, width))

    @works_for_first
    def pool(self, y: Tensor, how: str = "backbone") -> Tensor:
        """Tokens of `body` to features (B, F), as the backbone pools or as `how` says.

        `how`: "backbone"; "mean" over all patch tokens; for ViTs with a class token also "cls" and
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
        check_choice(f"pool of {self.name} ({self.family})", how, valid)

    def takes_mean(self, how: str = "backbone") -> bool:
        """Whether `pool(y, how)` is, in part at least, a plain mean over the tokens behind the prefix."""
        return "mean" in how or (how == "backbone" and getattr(self.model, "global_pool", None) == "avg")

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
        return to_2tuple(self.model.patch_embed.patch_size)

    def extra_repr(self) -> str:
        return f"{self.name}, family={self.family}, img_size={self.img_size}, weights={self.weights_source}"
