"""Image sets and decoding."""

import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from image_helpers import write_image, write_noise
from PIL import Image, TiffImagePlugin
from torchvision.transforms.functional import pil_to_tensor

from lion_fast.data import ArrayImages, FileImages, ImageSet, read_image, to_rgb
from lion_fast.data.images import problem_of
from lion_fast.errors import DataError


def pixels(image):
    """The pixels of an RGB image, row by row; a grey one as a number."""
    assert image.mode == "RGB"
    rows = np.asarray(image).reshape(-1, 3).tolist()
    return [row[0] if len(set(row)) == 1 else tuple(row) for row in rows]


def test_modes_become_rgb(tmp_path):
    assert pixels(to_rgb(Image.new("L", (1, 1), 90))) == [90]
    assert pixels(to_rgb(Image.new("1", (1, 1), 1))) == [255]
    assert pixels(to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))) == [(255, 0, 0)]
    assert pixels(to_rgb(Image.new("I", (1, 1), 257 * 9))) == [9]
    for value, want in ((0, 0), (257 * 100, 100), (257 * 100 + 129, 101), (65535, 255)):
        Image.new("I;16", (1, 1), value).save(tmp_path / "deep.png")
        assert pixels(read_image(tmp_path / "deep.png")) == [want]
    Image.frombytes("I;16B", (1, 1), bytes([100, 100])).save(tmp_path / "big-endian.tif")
    assert pixels(read_image(tmp_path / "big-endian.tif")) == [100]
    with pytest.raises(ValueError, match="0..65535"):
        to_rgb(Image.new("I", (1, 1), -1))


def test_alpha_is_composited_on_white(tmp_path):
    value, alpha = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256)))
    exact = np.floor((value * (alpha / 255) + 255 * (1 - alpha / 255)) + 0.5)
    for bands in ([value, alpha], [value] * 3 + [alpha]):  # LA, RGBA
        Image.fromarray(np.dstack(bands)).save(tmp_path / "a.png")
        got = np.asarray(read_image(tmp_path / "a.png"))
        np.testing.assert_array_equal(got, np.repeat(exact[..., None], 3, axis=2))
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 100, 0, 0])
    palette.putpixel((1, 0), 1)
    for suffix, clear, want in (
        ("png", 0, [255, (100, 0, 0)]),
        ("png", b"\x00\x80", [255, (177, 127, 127)]),
        ("gif", 1, [9, 255]),
    ):
        palette.save(tmp_path / f"p.{suffix}", transparency=clear)
        assert pixels(read_image(tmp_path / f"p.{suffix}")) == want
    assert pixels(to_rgb(palette.convert("PA"))) == [9, (100, 0, 0)]
    grey = Image.frombytes("L", (2, 1), bytes([10, 20]))
    grey.save(tmp_path / "plain.png")
    assert pixels(read_image(tmp_path / "plain.png")) == [10, 20]


def png(bits, kind, row, clear):
    """A PNG of one row of two pixels with one transparent value, byte by byte."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)), (b"tRNS", clear))
    parts += ((b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("file", "want"),
    [
        (png(8, 0, b"\x0a\x14", b"\0\x0a"), [255, 20]),
        (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), b"\0\1\0\2\0\3"), [255, (4, 5, 6)]),
        (png(1, 0, b"\x80", b"\0\0"), [255, 255]),
        (png(1, 0, b"\x80", b"\0\1"), [255, 0]),
        (png(2, 0, b"\x60", b"\0\1"), [255, 170]),
        (png(4, 0, b"\x12", b"\0\1"), [255, 34]),
        (png(16, 0, b"\x64\x64\x64\x65", b"\x64\x64"), [255, 100]),
    ],
    ids=["grey", "colour", "1 bit, black", "1 bit, white", "2 bits", "4 bits", "16 bits"],
)
def test_a_transparent_value_is_white(tmp_path, file, want):
    (tmp_path / "t.png").write_bytes(file)
    assert pixels(read_image(tmp_path / "t.png")) == want


# where the light of (row, column) 0..5 of a 2 x 3 image stands after each EXIF orientation
TURNED = {
    1: [[0, 1, 2], [3, 4, 5]], 2: [[2, 1, 0], [5, 4, 3]], 3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]], 5: [[0, 3], [1, 4], [2, 5]], 6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]], 8: [[2, 5], [1, 4], [0, 3]],
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_orientation_is_applied(tmp_path, suffix, mode):
    stored = Image.fromarray(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)).resize((24, 16), 0)
    for orientation, want in TURNED.items():
        exif = Image.Exif()
        exif[274] = orientation
        lossless = {"lossless": True} if suffix == "webp" else {}
        stored.convert(mode).save(tmp_path / f"o.{suffix}", exif=exif, **lossless)
        got = np.asarray(read_image(tmp_path / f"o.{suffix}"))[4::8, 4::8, 0] / 40
        np.testing.assert_allclose(got, want, atol=0.1)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 1), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for suffix, how in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **how)
        assert pixels(read_image(path)) == [(200, 0, 0)] * 2


def unreadable(folder):
    """{why: a file} of what is no image, or none that has one meaning."""
    folder.mkdir()
    Image.new("F", (1, 1), 0.5).save(folder / "floating.tif")
    Image.new("I", (1, 1), 70_000).save(folder / "0..65535.tif")
    Image.new("L", (2001, 2)).save(folder / "1000 times.png")
    negative = TiffImagePlugin.ImageFileDirectory_v2()
    negative[262] = 0
    Image.new("I;16", (1, 1), 7).save(folder / "white.tif", tiffinfo=negative)
    (folder / "transparent.png").write_bytes(png(16, 2, bytes(range(12)), b"\0\1\2\3\4\5"))
    bomb = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "bomb.bmp").write_bytes(bomb)
    (folder / "cannot identify.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(write_noise(folder / "whole.png", 0).read_bytes()[:3000])
    (folder / "whole.png").unlink()
    return {path.stem: path for path in folder.iterdir()}


def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path):
    files = unreadable(tmp_path / "files")
    for why, path in files.items():
        with pytest.raises(DataError, match=f"{path.name}.*{why}"):
            read_image(path)
        assert why in problem_of(path, "decode")
    # the head of the file tells of all but the damage and the values inside
    missed = {why for why, path in files.items() if problem_of(path, "header") is None}
    assert missed <= {"truncated", "0..65535"}
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


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
    with pytest.raises(DataError, match="twice"):
        ImageSet(ArrayImages(array), [0, 1, 1, 0], ["a", "a"])
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
