"""`load_data`: from a source to training, validation and test sets, with a record of what was done."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lion_fast.data.draws import draw_fraction, draw_long_tail, draw_per_class, draw_total
from lion_fast.data.images import ImageSet
from lion_fast.data.offline import OFFLINE
from lion_fast.data.published import PUBLISHED, read_vtab
from lion_fast.data.sources import Raw, check_classes, collect, read_csv, read_folder
from lion_fast.errors import DataError, OptionError, check_choice, check_number, check_seed
from lion_fast.files import cache_dir
from lion_fast.options import CHECK


@dataclass(frozen=True)
class Splits:
    """Three image sets over the same classes; `val` and `test` are None where there is none.

    `description` is JSON-able: source, seed, sizes, images of each class, how the split and the
    draw were made, files that were skipped, licence, and a fingerprint of the exact item lists.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    classes: list[str]
    description: dict[str, Any]


def load_data(
    source: str | os.PathLike,
    *,
    val: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    n_per_class: int | None = None,
    imbalance: float | None = None,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    classes: Sequence[str] | None = None,
    check: str = "header",
    strict: bool = False,
    cache: str | os.PathLike | None = None,
) -> Splits:
    """Training, validation and test images of a folder, a CSV file or a built-in set.

    source: a folder with one sub-folder per class, directly or inside train/, val/ and test/; a VTAB-1k
    task folder (train800.txt, ...); an FGVC folder (train.json, test.json; or the published lists of CUB,
    NABirds and Stanford Dogs); a CSV file with the columns path,label[,split], paths relative to its own
    folder; or one of "fashion-mnist", "mnist-5k", "elpv", "digits".

    val, test: share of the images when the source has no such split, stratified and seeded; 0 for
    none. A source with its own train and test split gives `val` from its training images; one with train
    and val but no test gets no test split. Of a VTAB-1k task, `val` = 0 takes the 1,000 images of
    train800val200.txt, and `test` = 0 opens no test image.
    n_train, n_val, n_test: exact sizes instead, stratified (they shorten an existing split).
    n_per_class: keep so many training images of each class. imbalance: keep a long tail of the
    training images, class k of K with n_max * imbalance^(-k / (K - 1)). Neither touches val or test.
    seed: of every draw. The same seed gives the same items whatever the machine.
    classes: names in the order wanted; labels meet them by name, and one that is not among them is an
    error. Where none of them is an integer, integer labels count them from 0. Default: sorted as found.
    check: "header" looks at the structure of every file and the end of a JPEG, "decode" decodes all of
    them, "none" trusts them.
    Files that fail are left out and listed in `description["skipped"]`; strict: raise instead.
    cache: folder for downloads; default `lion_fast.files.cache_dir()`.

    Raises DataError for data that cannot be used, OptionError for options that make no sense.

    >>> from lion_fast.data import load_data
    >>> splits = load_data("digits", n_test=200, n_per_class=16)  # doctest: +SKIP
    >>> len(splits.train), len(splits.test)  # doctest: +SKIP
    (160, 200)
    """
    for name, share in (("val", val), ("test", test)):
        check_number(name, share, least=0, below=1, note=f"a share of the images (exact sizes: n_{name})")
    if val + test >= 1:
        raise OptionError(f"val + test must leave training images; got {val} + {test}")
    check_seed("seed", seed)
    given = [n for n, v in (("n_per_class", n_per_class), ("imbalance", imbalance)) if v is not None]
    if len(given) == 2 or (n_per_class is not None and n_train is not None):
        raise OptionError("n_per_class sets the size of every class: give it without imbalance and n_train")

    raw = _read(source, val=val, test=test, check=check, strict=strict, classes=classes, cache=cache)
    parts = dict(raw.parts)
    made = []
    if "all" in parts:
        rest = parts.pop("all")
        wanted = (("test", test, n_test), ("val", val, n_val))
        total = len(rest)
    else:
        rest = parts.pop("train")
        wanted = (("val", val, n_val),) if "val" not in parts and "test" in parts else ()
        total = len(rest)
        made.append(f"{', '.join(['train', *parts])} as the source has them")
        for name, size in (("val", n_val), ("test", n_test)):
            if size is not None and name in parts:
                parts[name] = parts[name].subset(draw_total(parts[name].labels, size, _stream(seed, name)))
                made.append(f"{name} shortened to {size}, stratified")
    for name, share, size in wanted:
        if size is not None:
            drawn = draw_total(rest.labels, size, _stream(seed, name))
            made.append(f"{name}: {size} images, stratified by class")
        elif share:
            drawn = draw_fraction(rest.labels, share * total / len(rest), _stream(seed, name))
            made.append(f"{name}: {share:g} of {total} images, stratified by class")
        else:
            continue
        if len(drawn) == len(rest):
            raise DataError(f"n_{name}={size} leaves no training image of {total}")
        keep = torch.ones(len(rest), dtype=torch.bool)
        keep[drawn] = False
        if len(drawn):
            parts[name] = rest.subset(drawn)
        rest = rest.subset(keep.nonzero().flatten())
    draw = "all training images"
    if n_train is not None:
        rest = rest.subset(draw_total(rest.labels, n_train, _stream(seed, "train")))
        draw = f"{n_train} training images, stratified by class"
    if n_per_class is not None:
        _all_present(rest, "n_per_class")
        rest = rest.subset(draw_per_class(rest.labels, n_per_class, seed))
        draw = f"{n_per_class} training images of each class"
    if imbalance is not None:
        _all_present(rest, "imbalance")
        rest = rest.subset(draw_long_tail(rest.labels, imbalance, seed))
        counts = list(rest.counts().values())
        draw = (
            "long tail of the training images, class 0 the largest: "
            f"n_k = floor({counts[0]} * {imbalance:g}^(-k / {len(counts) - 1}))"
        )
    sets = {"train": rest, "val": parts.get("val"), "test": parts.get("test")}
    description = {
        "source": str(source),
        **raw.about,
        "seed": seed,
        "split": "; ".join(made) if made else "no split: all images are training images",
        "draw": draw,
        "sizes": {name: len(s) if s is not None else 0 for name, s in sets.items()},
        "class_counts": {name: s.counts() for name, s in sets.items() if s is not None},
        "fingerprint": _fingerprint(sets),
    }
    return Splits(sets["train"], sets["val"], sets["test"], raw.classes, description)


def load_images(
    source: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    check: str = "header",
    strict: bool = False,
    cache: str | os.PathLike | None = None,
) -> ImageSet:
    """All images of a source as one set, without splitting: to evaluate on a folder or a list.

    split: "train", "val" or "test" takes that part of a source that has parts; None takes all of a
    source without parts, and of one with parts its test (or else val) part.
    classes: the classes of the model, in its order; the source may lack some of them. See `load_data`.
    Raises DataError as `load_data` does.
    """
    if split is not None:
        check_choice("split", split, ("train", "val", "test"))
    # of VTAB-1k's parts one is wanted: no file of the test list is opened for another
    test = 0.0 if split in ("train", "val") else 0.2
    raw = _read(source, val=0.2, test=test, check=check, strict=strict, classes=classes, cache=cache)
    if split is None:
        split = next(name for name in ("all", "test", "val", "train") if name in raw.parts)
    if split not in raw.parts:
        raise DataError(f"{source} has no {split} part; it has: {', '.join(raw.parts)}")
    return raw.parts[split]


def _read(source, *, val, test, check, strict, classes, cache) -> Raw:
    check_choice("check", check, CHECK)
    if classes is not None:
        check_classes(classes)
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(f"source must be a path or a name; got {type(source).__name__}")
    if isinstance(source, str) and source in OFFLINE:
        try:
            raw = OFFLINE[source](Path(cache).expanduser() if cache is not None else cache_dir())
        except OSError as error:
            raise DataError(
                f"{source} cannot be kept in the cache folder ({error}); choose another: cache=, --cache or "
                "$LION_FAST_CACHE"
            ) from error
        if classes is not None and list(classes) != raw.classes:
            raise DataError(f"the classes of {source} are fixed: {', '.join(raw.classes)}")
        return raw
    path = Path(source).expanduser()
    names = ", ".join(OFFLINE)
    if path.is_dir():
        for reader, lists in PUBLISHED.items():
            if any(all((path / name).is_file() for name in marks) for marks in lists):
                more = {"val": val, "test": test} if reader is read_vtab else {}
                listed = reader(path, classes, **more)
                return collect(listed, path, check=check, strict=strict, classes=classes)
        return collect(read_folder(path, classes), path, check=check, strict=strict, classes=classes)
    if path.is_file() and path.suffix.lower() == ".csv":
        return collect(read_csv(path, classes), path, check=check, strict=strict, classes=classes)
    if path.is_file():
        raise DataError(f"{path} is a file but no .csv; expected a folder, a CSV file or one of: {names}")
    near = difflib.get_close_matches(str(source), OFFLINE, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{str(source)!r} is neither an existing folder or CSV file nor a built-in set ({names}){hint}"
    )


def _all_present(images: ImageSet, option: str) -> None:
    absent = [name for name, count in images.counts().items() if not count]
    if absent:
        raise DataError(f"{option} needs training images of every class; none of: {', '.join(absent[:5])}")


def _stream(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, so that the draws are independent of each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


def _fingerprint(sets: dict[str, ImageSet | None]) -> str:
    digest = hashlib.sha256()
    for split, images in sets.items():
        if images is not None:
            for name, label in zip(images.names, images.labels.tolist(), strict=True):
                digest.update(f"{split}\t{name}\t{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
