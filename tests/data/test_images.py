"""Image sets and decoding."""

import pickle

import numpy as np
import pytest
import torch
from image_helpers import write_image
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lion_fast.data import ArrayImages, FileImages, ImageSet, read_image, to_rgb
from lion_fast.errors import DataError


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
    images = ImageSet(files, [0, 1, 1], ["a", "b"], transform=pil_to_tensor)
    batch, labels = next(iter(torch.utils.data.DataLoader(images, batch_size=3)))
    assert batch.shape == (3, 3, 10, 12) and labels.tolist() == [0, 1, 1]
