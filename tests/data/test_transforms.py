"""The transforms of a backbone, beside timm's own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lion_fast.backbones.backbone import SUPPORTED
from lion_fast.data import transforms
from lion_fast.errors import OptionError


def backbone(img_size=16, crop_pct=1.0, interpolation="bicubic", **more):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return SimpleNamespace(
        img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, **more
    )


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(image):
    b = backbone()
    return ((np.asarray(image) / 255.0 - b.mean) / b.std).transpose(2, 0, 1)


def test_transform_geometry_by_hand():
    image = noise(60, 40)
    # 14 / 0.875 = 16: the short side to 16, the long one to 24, then the central 14 x 14
    by_hand = image.resize((24, 16), Image.BICUBIC).crop((5, 1, 19, 15))
    got = transforms(backbone(14, 0.875))(image)
    assert got.dtype == torch.float32 and type(got) is torch.Tensor
    np.testing.assert_allclose(got.numpy(), normalised(by_hand), atol=1e-6)
    by_hand = image.resize((14, 14), Image.BILINEAR)
    got = transforms(backbone(14, 0.875, "bilinear"), resize="direct")(image)
    np.testing.assert_allclose(got.numpy(), normalised(by_hand), atol=1e-6)
    assert transforms(backbone((8, 12)))(image).shape == (3, 8, 12)


def is_timms(backbone, images):
    """Every pixel that timm's evaluation has; 4e-6 is far below one of 256 levels, 1 / (255 * 0.3)."""
    how = {name: getattr(backbone, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    how["input_size"] = (3, *np.broadcast_to(backbone.img_size, 2).tolist())
    how["crop_mode"] = getattr(backbone, "crop_mode", None)
    timms = timm.data.create_transform(**how, is_training=False)
    for image in images:
        torch.testing.assert_close(transforms(backbone)(image), timms(image), rtol=0, atol=4e-6)


TALL, WIDE, TINY, ODD = noise(20, 90), noise(97, 31), noise(3, 2), noise(50, 41)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [32, 37, (32, 48), (37, 21)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_transform_is_timms_evaluation(crop_mode, size, crop_pct):
    # bilinear: older versions of timm take no other for a size that is not square
    for interpolation in ("bilinear", "bicubic") if isinstance(size, int) else ("bilinear",):
        is_timms(backbone(size, crop_pct, interpolation, crop_mode=crop_mode), (TALL, WIDE, TINY, ODD))


def test_transforms_are_timms_on_every_pretrained_tag():
    modules = {kind.__module__ for kinds in SUPPORTED.values() for kind in kinds}
    modules |= {"timm.models.deit", "timm.models.vision_transformer_hybrid"}
    tags = [tag for tag in timm.list_pretrained() if timm.model_entrypoint(tag).__module__ in modules]
    assert len(tags) > 500
    found = {}
    for tag in tags:
        config = timm.data.resolve_data_config({}, timm.get_pretrained_cfg(tag).to_dict())
        config["img_size"] = config.pop("input_size")[1:]
        found[str(sorted(config.items()))] = config
    assert {config["crop_mode"] for config in found.values()} >= {"center", "squash"}
    for config in found.values():
        is_timms(
            SimpleNamespace(**config), (TALL, ODD) if math.prod(config["img_size"]) < 384**2 else (WIDE,)
        )


def test_augmentation():
    image = noise(16, 16)
    plain = transforms(backbone())(image)
    for augment in ("none", "flip", "crop"):
        assert torch.equal(transforms(backbone(), train=False, augment=augment)(image), plain)
    assert torch.equal(transforms(backbone(), train=True)(image), plain)
    flip = transforms(backbone(), train=True, augment="flip")
    outcomes = [flip(image) for _ in range(40)]
    mirrored = sum(torch.equal(o, plain.flip(-1)) for o in outcomes)
    assert mirrored + sum(torch.equal(o, plain) for o in outcomes) == 40
    assert 5 <= mirrored <= 35
    crop = transforms(backbone(), train=True, augment="crop")
    torch.manual_seed(1)
    first = [crop(image) for _ in range(4)]
    assert all(o.shape == (3, 16, 16) for o in first) and not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert all(torch.equal(a, crop(image)) for a in first)


@pytest.mark.parametrize(
    ("how", "options", "word"),
    [
        ({}, {"train": True, "augment": "mixup"}, "augment must be one of none, flip, crop; got 'mixup'"),
        ({}, {"resize": "pad"}, "resize must be one of"),
        ({"interpolation": "sinc"}, {}, "interpolation must be one of"),
        ({"interpolation": "random"}, {}, "interpolation must be one of"),
        ({"crop_mode": "corner"}, {}, "crop_mode must be one of center, squash, border"),
        ({"img_size": (8, 0)}, {}, "img_size"),
    ],
)
def test_transform_options(how, options, word):
    with pytest.raises(OptionError, match=word):
        transforms(backbone(**how), **options)
