"""Image sets: where pixels come from, and the torch Dataset over them."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lion_fast.data.draws import as_labels
from lion_fast.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image as RGB: grey is repeated, alpha composited on white, integer grey scaled from 16 bits to 8.

    Raises ValueError for floating-point images, for integers outside 0..65535, and where one side is more
    than 1000 times the other.

    >>> from PIL import Image
    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    _refuse(image)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("integer image with values outside 0..65535")
        eight = np.where(grey == image.info.get("transparency"), 255, (grey + 128) // 257)
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _layout(image: Image.Image) -> str:
    """How the pixels lie in a file that was opened and not read, in PIL's words."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles else ""


def _refuse(image: Image.Image) -> None:
    """ValueError for what cannot be used, or is read wrongly by PIL, as far as the file's head tells."""
    if max(image.size) > 1000 * min(image.size):  # the short side resized to 224, it would fill the memory
        raise ValueError("one side is more than 1000 times the other")
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range; save them as 8 or 16 bit")
    if (
        _layout(image) == "RGB;16B" and "transparency" in image.info
    ):  # reads 8 bits of each colour, 16 of this one
        raise ValueError("16-bit colour with one transparent colour; save it with an alpha channel")
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0:  # reads the negative
        raise ValueError("16-bit TIFF in which 0 is white; save it with 0 as black")


def _decode(image: Image.Image) -> Image.Image:
    """A file that was just opened as an upright RGB image."""
    _refuse(image)
    scale = {"L;2": 85, "L;4": 17}.get(_layout(image))
    if scale and "transparency" in image.info:  # PIL scales the levels to 0..255 and not this one
        image.info["transparency"] *= scale
    image.filename = ""  # no memory map: PIL mixes up the sides of a turned TIFF in it
    if image.format != "TIFF":  # PIL turns it while it reads, and some versions would turn it once more
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def read_image(path: str | Path) -> Image.Image:
    """Decode a file to a PIL RGB image; DataError names the file when that fails.

    EXIF orientation is applied. Of an animation, the first frame.
    """
    try:
        with Image.open(path) as image:
            return _decode(image)
    except FileNotFoundError as error:
        raise DataError(f"the image {path} does not exist") from error
    except Exception as error:  # PIL raises many kinds on damaged files
        reason = str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise DataError(f"the image {path} cannot be decoded ({reason}); replace or remove it") from error


def _ends_as_jpeg(path: str | Path) -> bool:
    """Whether the end-of-image mark is among the last bytes; a file cut off in its middle has none there."""
    with open(path, "rb") as file:
        file.seek(-min(64, os.path.getsize(path)), os.SEEK_END)
        return b"\xff\xd9" in file.read()


def problem_of(path: str | Path, check: str) -> str | None:
    """Why a file is not a usable image, or None.

    check: "header" opens it and runs PIL's `verify` (structure and, for PNG, checksums), and decodes a
    JPEG that does not end as one; "decode" decodes every file; "none" looks at nothing.
    """
    if check == "none":
        return None
    try:
        with Image.open(path) as image:
            if check == "decode" or (image.format in ("JPEG", "MPO") and not _ends_as_jpeg(path)):
                _decode(image)
            else:
                _refuse(image)
                image.verify()
    except Exception as error:  # PIL raises many kinds on damaged files
        return str(error) or type(error).__name__
    return None


class FileImages:
    """Images on disk, by path."""

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [str(p) for p in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> Image.Image:
        try:
            return read_image(self.paths[i])
        except DataError as error:
            raise DataError(
                f'{error}, or load with check="decode", which finds and skips every such file at the start'
            ) from error

    def stored(self, i: int) -> str:
        return self.paths[i]


class CutOuts(FileImages):
    """Images on disk that are padded with white to squares, the picture in the centre."""

    def open(self, i: int) -> Image.Image:
        image = super().open(i)
        return ImageOps.pad(image, (max(image.size),) * 2, color="white")


class ArrayImages:
    """Images in memory: uint8, (N, H, W) grey or (N, H, W, 3) RGB.

    there: bool (N,), False where the image was left out of the array; opening one raises DataError.
    """

    def __init__(self, array: np.ndarray, there: np.ndarray | None = None):
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
            raise DataError(
                f"images must be uint8 (N, H, W) or (N, H, W, 3); got {array.dtype} {array.shape}"
            )
        self.array, self.there = array, there

    def __len__(self) -> int:
        return len(self.array)

    def open(self, i: int) -> Image.Image:
        if self.there is not None and not self.there[i]:
            raise DataError(
                f"image {i} was left out: these files hold a part of the set, made for other draws"
            )
        return Image.fromarray(self.array[i]).convert("RGB")

    def stored(self, i: int) -> np.ndarray | None:
        return None if self.there is not None and not self.there[i] else self.array[i]


class ImageSet(Dataset):
    """A torch Dataset of (image, class index).

    store: `FileImages` or `ArrayImages`, shared by subsets. labels: int64 (N,) in 0..K-1.
    classes: the K class names. names: an identifier of each item (path relative to the source, or
    "train/17"). transform: called with the PIL RGB image; None returns that image itself.
    groups: of each item, what it belongs to: a split keeps the items of a group together. domains: of each
    item, where it comes from. None where nothing is known.

    `.labels` LongTensor (N,), `.classes` list of str, `.names` list of str; `.groups`, `.domains` lists of
    str or None.

    >>> import numpy as np
    >>> from lion_fast.data import ArrayImages, ImageSet
    >>> images = ImageSet(ArrayImages(np.zeros((3, 8, 8), np.uint8)), [0, 1, 1], ["a", "b"])
    >>> len(images), images[2][0].size, images[2][1], images.subset([2]).names
    (3, (8, 8), 1, ['2'])
    """

    def __init__(
        self,
        store: FileImages | ArrayImages,
        labels: Sequence[int] | Tensor | np.ndarray,
        classes: Sequence[str],
        names: Sequence[str] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        groups: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
    ):
        self.labels = as_labels(labels).clone()
        self.classes = [str(c) for c in classes]
        self.names = [str(n) for n in (range(len(store)) if names is None else names)]
        self.groups = None if groups is None else [str(g) for g in groups]
        self.domains = None if domains is None else [str(d) for d in domains]
        self.transform = transform
        self._store = store
        self._where = torch.arange(len(store))
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"a class is named twice: {', '.join(self.classes[:20])}")
        if not len(store) == len(self.labels) == len(self.names):
            raise DataError(
                f"{len(store)} images, {len(self.labels)} labels and {len(self.names)} names must be as many"
            )
        for what, of in (("groups", self.groups), ("domains", self.domains)):
            if of is not None and len(of) != len(store):
                raise DataError(f"{len(store)} images and {len(of)} {what} must be as many")
        if len(store) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels must lie in 0..{len(self.classes) - 1} for {len(self.classes)} classes; "
                f"found {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image as PIL RGB, before the transform."""
        return self._store.open(int(self._where[i]))

    def stored(self) -> list[str | np.ndarray | None]:
        """What each image is read from: its path, or uint8 pixels; None where it was left out."""
        return [self._store.stored(i) for i in self._where.tolist()]

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = self.image(i)
        return (image if self.transform is None else self.transform(image)), int(self.labels[i])

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "ImageSet":
        """The same items under another transform; this set is not changed."""
        return self._copy(torch.arange(len(self)), transform)

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> "ImageSet":
        """The items at these positions, in this order, with the same transform and classes."""
        return self._copy(torch.as_tensor(indices, dtype=torch.int64), self.transform)

    def _copy(self, indices: Tensor, transform) -> "ImageSet":
        new = copy.copy(self)
        new.labels, new._where, new.classes = self.labels[indices], self._where[indices], list(self.classes)
        new.names, new.transform = [self.names[i] for i in indices.tolist()], transform
        for name in ("groups", "domains"):
            of = getattr(self, name)
            setattr(new, name, None if of is None else [of[i] for i in indices.tolist()])
        return new

    @classmethod
    def join(cls, sets: Sequence["ImageSet"]) -> "ImageSet":
        """The items of sets with the same classes one after the other, without a transform."""
        if len(sets) == 1:
            return sets[0].with_transform(None)
        stored = [one for images in sets for one in images.stored()]
        if all(isinstance(one, str) for one in stored):
            store: FileImages | ArrayImages = type(sets[0]._store)(stored)
        else:
            there = np.array([one is not None for one in stored])
            blank = np.zeros_like(next(one for one in stored if one is not None))
            store = ArrayImages(np.stack([blank if one is None else one for one in stored]), there)
        known = {}
        for name in ("names", "groups", "domains"):
            lists = [getattr(images, name) for images in sets]
            known[name] = None if None in lists else [one for of in lists for one in of]
        return cls(store, torch.cat([images.labels for images in sets]), sets[0].classes, **known)

    def counts(self) -> dict[str, int]:
        """Number of items of each class, in class order; classes without items included."""
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images, {len(self.classes)} classes)"
