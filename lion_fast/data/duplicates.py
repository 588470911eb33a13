"""Images that are there twice: of the same content, or nearly the same, in several parts or classes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lion_fast.data.images import ImageSet
from lion_fast.data.sources import SHOWN
from lion_fast.files import sha256_file

# "near": the root mean square difference of two images at SIDE x SIDE grey pixels is at most NEAR of 255
SIDE, NEAR = 16, 2.0

Stored = str | np.ndarray | None


def size_of(stored: Stored) -> int:
    """Bytes of a file or of pixels; 0 for an image that was left out or cannot be read."""
    try:
        return 0 if stored is None else os.path.getsize(stored) if isinstance(stored, str) else stored.nbytes
    except OSError:
        return 0


def digests(stored: Sequence[Stored]) -> list[str]:
    """sha256 of each file's bytes or of its pixels, in hexadecimal; "" where `size_of` is 0."""
    if not any(isinstance(one, str) for one in stored):
        return list(map(_digest, stored))
    with ThreadPoolExecutor() as pool:  # files may be far away
        return list(pool.map(_digest, stored))


def _digest(stored: Stored) -> str:
    try:
        if isinstance(stored, str):
            return sha256_file(stored)
    except OSError:  # whoever decodes it says so
        return ""
    return "" if stored is None else hashlib.sha256(stored.tobytes()).hexdigest()


def find_duplicates(sets: Mapping[str, ImageSet | None], how: str) -> dict[str, Any]:
    """What stands in several parts, and what has several labels; JSON-able, with the first few by name.

    how: "content" compares bytes, of equally large files only, so that most are not even opened; "near" opens
    and decodes every image and compares small grey copies, all with all; "none" looks at nothing.

    Returns "by" (how), "across" (of images in more than one part) and "labels" (in more than one class), each
    with "count" (of different images) and "images" (texts).
    """
    there = {part: images for part, images in sets.items() if images is not None}
    parts = [part for part, images in there.items() for _ in images.names]
    names = [name for images in there.values() for name in images.names]
    labels = [images.classes[k] for images in there.values() for k in images.labels.tolist()]
    groups: list[list[int]] = []
    if how == "content":
        groups = _by_content([one for images in there.values() for one in images.stored()])
    elif how == "near":
        groups = _nearly(list(there.values()))

    def named(group: Sequence[int], of: Sequence[str]) -> str:
        told = [f"{names[i]} ({of[i]})" for i in group[:SHOWN]]
        return " = ".join(told) + (f" = {len(group) - SHOWN} more" if len(group) > SHOWN else "")

    found: dict[str, Any] = {"by": how}
    for name, of in (("across", parts), ("labels", labels)):
        several = [group for group in groups if len({of[i] for i in group}) > 1]
        found[name] = {"count": len(several), "images": [named(group, of) for group in several[:SHOWN]]}
    return found


def _by_content(stored: Sequence[Stored]) -> list[list[int]]:
    sizes = defaultdict(list)
    for i, one in enumerate(stored):
        sizes[size_of(one)].append(i)
    alike = sorted(i for size, same in sizes.items() if size and len(same) > 1 for i in same)
    groups = defaultdict(list)
    for i, digest in zip(alike, digests([stored[i] for i in alike]), strict=True):
        groups[digest].append(i)
    return [group for digest, group in groups.items() if digest and len(group) > 1]


def _nearly(sets: Sequence[ImageSet]) -> list[list[int]]:
    stored = [one for images in sets for one in images.stored()]
    items = [(images, i) for images in sets for i in range(len(images))]
    there = [k for k, one in enumerate(stored) if one is not None]
    small = torch.stack([_small(images.image(i)) for images, i in map(items.__getitem__, there)])
    first = list(range(len(there)))  # of each image, an earlier one that it is nearly the same as

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    for start in range(0, len(small), 256):
        distance = torch.cdist(small[start : start + 256], small[start:])
        for i, j in (distance <= NEAR * SIDE).nonzero().tolist():
            a, b = root(start + i), root(start + j)
            first[max(a, b)] = min(a, b)
    groups = defaultdict(list)
    for i, k in enumerate(there):
        groups[root(i)].append(k)
    return [group for group in groups.values() if len(group) > 1]


def _small(image: Image.Image) -> Tensor:
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey, np.float32).ravel() - 128)
