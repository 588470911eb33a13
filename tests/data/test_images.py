"""Image sets, decoding, and the transforms of a backbone."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from image_helpers import write_image
from PIL import Image

from lion_fast.data import ArrayImages, FileImages, ImageSet, read_image, to_rgb, transforms
from lion_fast.errors import DataError, OptionError


def test_modes_become_rgb(tmp_path):
    def pixel(image):
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    assert pixel(to_rgb(Image.new("L", (1, 1), 90))) == (90, 90, 90)
    assert pixel(to_rgb(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("RGBA", (1, 1), (1, 2, 3, 0)))) == (1, 2, 3)
    palette = Image.new("RGB", (1, 1), (7, 8, 9)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=b"\x80")
    assert pixel(read_image(tmp_path / "p.png")) == (7, 8, 9)
    for value, want in ((0, 0), (257 * 100, 100), (257 * 100 + 129, 101), (65535, 255)):
        Image.new("I;16", (1, 1), value).save(tmp_path / "deep.png")
        assert pixel(read_image(tmp_path / "deep.png")) == (want,) * 3
    Image.new("F", (1, 1), 0.5).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="f.tif.*floating-point"):
        read_image(tmp_path / "f.tif")


def test_image_set(tmp_path):
    array = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    images = ImageSet(ArrayImages(array), [0, 1, 1, 0], ["a", "b"])
    assert len(images) == 4 and images.labels.dtype == torch.int64 and images.names == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(np.asarray(images[2][0]), np.repeat(array[2][..., None], 3, axis=2))
    some = images.subset([3, 1]).with_transform(lambda image: image.size)
    assert some[0] == ((5, 6), 0) and some[1] == ((5, 6), 1) and some.names == ["3", "1"]
    assert some.subset(torch.tensor([1])).names == ["1"] and images.transform is None
    assert images.subset([]).counts() == {"a": 0, "b": 0}
    copy = pickle.loads(pickle.dumps(images))  # what a data-loader worker receives
    assert copy.names == images.names and np.array_equal(np.asarray(copy[1][0]), np.asarray(images[1][0]))
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.1 for 2 classes; found 0\.\.2"):
        ImageSet(ArrayImages(array), [0, 1, 2, 0], ["a", "b"])
    with pytest.raises(DataError, match="4 images, 3 labels"):
        ImageSet(ArrayImages(array), [0, 1, 1], ["a", "b"])
    with pytest.raises(DataError, match="uint8"):
        ArrayImages(array.astype(np.float32))
    with pytest.raises(IndexError):
        images[4]
    files = FileImages([write_image(tmp_path / f"{i}.png", i) for i in range(3)])
    images = ImageSet(files, [0, 1, 1], ["a", "b"], transform=transforms(backbone(8)))
    batch, labels = next(iter(torch.utils.data.DataLoader(images, batch_size=3)))
    assert batch.shape == (3, 3, 8, 8) and labels.tolist() == [0, 1, 1]


def backbone(img_size=16, crop_pct=1.0, interpolation="bicubic"):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return SimpleNamespace(
        img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct
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


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (28, 0.9), (37, 1.0)])
def test_transform_is_timms_evaluation(size, crop_pct):
    how = vars(backbone(size, crop_pct)) | {"input_size": (3, size, size)}
    del how["img_size"]
    timms = timm.data.create_transform(**how, is_training=False)
    for image in (noise(50, 41), noise(20, 90)):
        torch.testing.assert_close(transforms(backbone(size, crop_pct))(image), timms(image))


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
        ({"img_size": (8, 0)}, {}, "img_size"),
    ],
)
def test_transform_options(how, options, word):
    with pytest.raises(OptionError, match=word):
        transforms(backbone(**how), **options)
