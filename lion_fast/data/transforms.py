"""The image pipeline that belongs to a backbone."""

import math

import torch
from torchvision.transforms import InterpolationMode, v2

from lion_fast.errors import check_choice
from lion_fast.options import RESIZE, sides

_INTERPOLATION = {mode.value: mode for mode in InterpolationMode}
CROP_MODES = ("center", "squash", "border")
AUGMENT = ("none", "flip", "crop")


def transforms(backbone, train: bool = False, augment: str = "none", resize: str | None = None) -> v2.Compose:
    """PIL RGB image -> normalised float32 (3, S, S), as the backbone expects it.

    backbone: anything with `img_size` (int or (H, W)), `mean`, `std`, `interpolation`, `crop_pct` and, if
    it is not "center", `crop_mode`. train: augment, when `augment` asks for it; evaluation never does.

    resize: "crop" is timm's evaluation, pixel for pixel, in the backbone's `crop_mode`: "center" resizes
    until the image covers floor(S / crop_pct) on both sides and cuts the centre, "squash" resizes both sides
    to floor(S / crop_pct) and cuts the centre, "border" resizes the long side and fills up with the mean
    colour. "direct" resizes to (S, S) whatever the aspect ratio, as the VTAB-1k protocol does;
    None is the backbone's own choice, `backbone.resize`, and "crop" where it has none.
    augment: "none" trains on the evaluation pipeline; "flip" adds a horizontal flip with probability
    1/2; "crop" takes a random part of 50 to 100 % of the area (aspect ratio 3/4 to 4/3), resizes it
    to (S, S) and flips.

    Raises OptionError for an unknown choice.

    >>> from types import SimpleNamespace
    >>> from PIL import Image
    >>> from lion_fast.data import transforms
    >>> half = (0.5, 0.5, 0.5)
    >>> backbone = SimpleNamespace(img_size=32, mean=half, std=half, interpolation="bicubic", crop_pct=1.0)
    >>> image = transforms(backbone)(Image.new("RGB", (50, 40), "white"))
    >>> image.shape, image.max().item()
    (torch.Size([3, 32, 32]), 1.0)
    """
    check_choice("augment", augment, AUGMENT)
    resize = getattr(backbone, "resize", "crop") if resize is None else resize
    check_choice("resize", resize, RESIZE)
    check_choice("interpolation", backbone.interpolation, _INTERPOLATION)
    mode = _INTERPOLATION[backbone.interpolation]
    size = height, width = sides(backbone.img_size)
    if train and augment == "crop":
        geometry = [v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=mode)]
    elif resize == "direct":
        geometry = [v2.Resize(size, interpolation=mode)]
    else:
        geometry = _evaluation(backbone, size, mode)
    if train and augment in ("flip", "crop"):
        geometry.append(v2.RandomHorizontalFlip())
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(
        [*geometry, *pixels, v2.Normalize(list(backbone.mean), list(backbone.std)), v2.ToPureTensor()]
    )


def _evaluation(backbone, size: tuple[int, int], mode: InterpolationMode) -> list:
    """What timm's `create_transform(is_training=False)` does to a PIL image before it is a tensor."""
    crop_mode = getattr(backbone, "crop_mode", "center")
    check_choice("crop_mode", crop_mode, CROP_MODES)
    scaled = [math.floor(s / backbone.crop_pct) for s in size]
    if crop_mode == "squash":
        return [v2.Resize(scaled, interpolation=mode), v2.CenterCrop(size)]
    if crop_mode == "center" and scaled[0] == scaled[1]:
        # an int resizes the short side and keeps the aspect ratio
        return [v2.Resize(scaled[0], interpolation=mode), v2.CenterCrop(size)]
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio  # timm loads slowly

    if crop_mode == "center":
        return [ResizeKeepRatio(scaled, interpolation=mode.value), v2.CenterCrop(size)]
    fill = [round(255 * value) for value in backbone.mean]
    return [ResizeKeepRatio(scaled, 1.0, mode.value), CenterCropOrPad(size, fill=fill)]
