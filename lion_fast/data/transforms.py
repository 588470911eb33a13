"""The image pipeline that belongs to a backbone."""

import math

import torch
from torchvision.transforms import InterpolationMode, v2

from lion_fast.errors import check_choice
from lion_fast.options import RESIZE, sides

_INTERPOLATION = {mode.value: mode for mode in InterpolationMode}
AUGMENT = ("none", "flip", "crop")


def transforms(backbone, train: bool = False, augment: str = "none", resize: str | None = None) -> v2.Compose:
    """PIL RGB image -> normalised float32 (3, S, S), as the backbone expects it.

    backbone: anything with `img_size` (int or (H, W)), `mean`, `std`, `interpolation` and
    `crop_pct`. train: augment, when `augment` asks for it; evaluation never does.

    resize: "crop" resizes the short side to floor(S / crop_pct) and cuts the centre, the geometry of
    timm's evaluation; "direct" resizes to (S, S) whatever the aspect ratio, as the VTAB-1k protocol does;
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
    height, width = sides(backbone.img_size)
    if train and augment == "crop":
        geometry = [v2.RandomResizedCrop((height, width), scale=(0.5, 1.0), interpolation=mode)]
    elif resize == "direct":
        geometry = [v2.Resize((height, width), interpolation=mode)]
    else:
        scaled = [math.floor(s / backbone.crop_pct) for s in (height, width)]
        # an int resizes the short side and keeps the aspect ratio
        target = scaled[0] if height == width else scaled
        geometry = [v2.Resize(target, interpolation=mode), v2.CenterCrop((height, width))]
    if train and augment in ("flip", "crop"):
        geometry.append(v2.RandomHorizontalFlip())
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(
        [*geometry, *pixels, v2.Normalize(list(backbone.mean), list(backbone.std)), v2.ToPureTensor()]
    )
