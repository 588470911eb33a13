"""`load_data`: from a source to training, validation and test sets, with a record of what was done."""

import difflib
import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lion_fast.data.draws import draw_fraction, draw_long_tail, draw_per_class, draw_total
from lion_fast.data.duplicates import find_duplicates
from lion_fast.data.images import ImageSet
from lion_fast.data.offline import OFFLINE
from lion_fast.data.published import PUBLISHED, read_vtab
from lion_fast.data.record import PARTS, WORDS, Record, fingerprint, read_record, recall, write_record
from lion_fast.data.sources import SHOWN, Raw, check_classes, collect, read_csv, read_folder, some
from lion_fast.errors import DataError, OptionError, check_choice, check_number, check_seed, one_line
from lion_fast.files import cache_dir, say_once
from lion_fast.options import CHECK, DUPLICATES, SCARCE


@dataclass(frozen=True)
class Splits:
    """Three image sets over the same classes; `val` and `test` are None where there is none.

    `description` is JSON-able: source, seed, sizes, images of each class, how the split and the
    draw were made, files that were skipped, images that are there twice, licence, and a fingerprint of the
    exact item lists. With a record, "changes" says what is not as it was. `unused` names the images of the
    source that no part holds.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    classes: list[str]
    description: dict[str, Any]
    unused: Sequence[str] = ()

    def save(self, path: str | os.PathLike) -> None:
        """Write the split down image by image, for `load_data(source, record=path)`.

        A CSV file of path, label, split, class, bytes and sha256, whole or not at all. Every file of the
        three parts is read once.
        """
        write_record(path, self._parts(), self.classes, self.unused)

    def _parts(self) -> dict[str, ImageSet | None]:
        return {name: getattr(self, name) for name in PARTS}


def load_data(
    source: str | os.PathLike,
    *,
    val: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    n_per_class: int | None = None,
    scarce: str = "error",
    imbalance: float | None = None,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    domain: str | None = None,
    classes: Sequence[str] | None = None,
    check: str = "header",
    strict: bool = False,
    duplicates: str = "content",
    cache: str | os.PathLike | None = None,
    record: str | os.PathLike | Record | None = None,
    needed: Collection[str] = PARTS,
) -> Splits:
    """Training, validation and test images of a folder, a CSV file or a built-in set.

    source: a folder with one sub-folder per class, directly or inside train/, val/ and test/; a VTAB-1k
    task folder (train800.txt, ...); an FGVC folder (train.json, test.json; or the published lists of CUB,
    NABirds and Stanford Dogs); a CSV file with the columns path,label[,split][,group][,domain], paths
    relative to its own folder; or one of `lion_fast.data.OFFLINE`: "fashion-mnist", "mnist-5k", "elpv",
    "digits", "deepsky5", "furniture10", "ifct9", "tux", "emoji", "openclipart22", "shapes-position",
    "shapes-count", "shapes-connected".

    val, test: share of the images when the source has no such split, stratified and seeded; 0 for
    none. A source with its own train and test split gives `val` from its training images; one with train
    and val but no test gets no test split. Of a VTAB-1k task, `val` = 0 takes the 1,000 images of
    train800val200.txt, and `test` = 0 opens no test image.
    Where a source says which images belong together, these are whole groups of about as many images: no
    group stands in two parts.
    n_train, n_val, n_test: exact sizes instead, stratified (they shorten an existing split). Of whole groups
    as near as they allow.
    n_per_class: keep so many training images of each class; scarce: of a class that has fewer, "all" keeps
    all there are and "error" raises. imbalance: keep a long tail of the
    training images, class k of K with n_max * imbalance^(-k / (K - 1)). Neither touches val or test.
    domain: take train and val from the images of this domain, and test from those of all others. Of the
    groups that lie in both, the share `test` is set aside for testing.
    seed: of every draw. The same seed gives the same items whatever the machine.
    classes: names in the order wanted; labels meet them by name, and one that is not among them is an
    error. Where none of them is an integer, integer labels count them from 0. Default: sorted as found.
    check: "header" looks at the structure of every file and the end of a JPEG, "decode" decodes all of
    them, "none" trusts them.
    Files that fail are left out and listed in `description["skipped"]`; strict: raise instead, and also where
    an image stands in more than one part or class.
    duplicates: "content" finds images whose bytes are the same (only files of the same size are read), "near"
    decodes every image and also finds what was resized or saved anew, "none" does not look. They are said
    on stderr and in `description["duplicates"]`, and stay where they are.
    cache: folder for downloads; default `lion_fast.files.cache_dir()`.
    record: what `Splits.save` wrote. The parts are then those images, by name, and nothing is drawn: `val`,
    `test` and `seed` have no meaning. What has changed is said and in `description["changes"]`.
    needed: parts of a record whose images must all be there, with their labels, and whose content is
    compared; the others hold what is still there.

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

    check_choice("duplicates", duplicates, DUPLICATES)
    check_choice("scarce", scarce, SCARCE)
    reading = {"check": check, "strict": strict, "classes": classes, "cache": cache}
    if record is not None:
        sizes = {"n_train": n_train, "n_val": n_val, "n_test": n_test, "domain": domain}
        if drawn := given + [name for name, size in sizes.items() if size is not None]:
            raise OptionError(f"a record says which images there are: give it without {', '.join(drawn)}")
        return _load_recorded(source, record, needed, duplicates, reading)
    raw = _read(source, val=val, test=test, **reading)
    parts, made = dict(raw.parts), []
    if domain is not None:
        parts, told = _of_domain(source, parts, domain, test, _stream(seed, "domain"))
        made.append(told)
    if "all" in parts:
        rest = parts.pop("all")
        wanted = (("test", test, n_test), ("val", val, n_val))
        total = len(rest)
    else:
        rest = parts.pop("train")
        shared_out = "all" in raw.parts
        wanted = (("val", val, n_val),) if "val" not in parts and ("test" in parts or shared_out) else ()
        total = len(rest)
        if not shared_out:
            made.append(f"{', '.join(['train', *parts])} as the source has them")
        for name, size in (("val", n_val), ("test", n_test)):
            if size is not None and name in parts:
                parts[name] = parts[name].subset(draw_total(parts[name].labels, size, _stream(seed, name)))
                made.append(f"{name} shortened to {size}, stratified")
    by = "stratified by class" + (" in whole groups" if rest.groups is not None else "")
    for name, share, size in wanted:
        if size is not None:
            drawn = draw_total(rest.labels, size, _stream(seed, name), rest.groups)
            asked = f" of {size} asked for" if len(drawn) != size else ""
            made.append(f"{name}: {len(drawn)} images{asked}, {by}")
        elif share:
            drawn = draw_fraction(rest.labels, share * total / len(rest), _stream(seed, name), rest.groups)
            made.append(f"{name}: {share:g} of {total} images, {by}")
        else:
            continue
        if len(drawn) == len(rest):
            raise DataError(f"n_{name}={size} leaves no training image of {total}")
        keep = torch.ones(len(rest), dtype=torch.bool)
        keep[drawn] = False
        if len(drawn):
            parts[name] = rest.subset(drawn)
        else:
            _say(
                source, f"there is no {name} part: no class has a second image, or group, that could go to it"
            )
        rest = rest.subset(keep.nonzero().flatten())
    draw = "all training images"
    if n_train is not None:
        rest = rest.subset(draw_total(rest.labels, n_train, _stream(seed, "train")))
        draw = f"{n_train} training images, stratified by class"
    if n_per_class is not None:
        if scarce == "error":
            _all_present(rest, "n_per_class")
        rest = rest.subset(draw_per_class(rest.labels, n_per_class, seed, scarce))
        few = [f"{name} ({n})" for name, n in rest.counts().items() if n < n_per_class]
        draw = f"{n_per_class} training images of each class"
        draw += f"; all there are of {', '.join(few)}" if few else ""
    if imbalance is not None:
        _all_present(rest, "imbalance")
        rest = rest.subset(draw_long_tail(rest.labels, imbalance, seed))
        counts = list(rest.counts().values())
        draw = (
            "long tail of the training images, class 0 the largest: "
            f"n_k = floor({counts[0]} * {imbalance:g}^(-k / {len(counts) - 1}))"
        )
    sets = {"train": rest, "val": parts.get("val"), "test": parts.get("test")}
    used = {name for images in sets.values() if images is not None for name in images.names}
    unused = [name for images in raw.parts.values() for name in images.names if name not in used]
    told = {
        "seed": seed,
        "split": "; ".join(made) if made else "no split: all images are training images",
        "draw": draw,
    }
    return _described(source, sets, raw, raw.classes, told, duplicates, strict, unused)


def _of_domain(
    source: object, parts: dict[str, ImageSet], domain: str, test: float, seed: int
) -> tuple[dict[str, ImageSet], str]:
    """Training (and validation) images of one domain, test images of the others; and that in words.

    Of a source without parts, what lies in both, by group, is shared out: a `test` share of these groups is
    for testing and the others are for training.
    """
    known = sorted({d for images in parts.values() for d in images.domains or ()})
    if not known:
        raise OptionError(f"{source} has no domains: domain= needs a set or a CSV file that names them")
    check_choice("domain", domain, known)
    inside = {part: torch.tensor([d == domain for d in images.domains]) for part, images in parts.items()}
    if "all" not in parts:
        chosen = {part: inside[part] ^ (part == "test") for part in parts}
        told = f"train and val of {domain}, test of the other domains"
    else:
        images, here = parts["all"], inside["all"]
        groups = images.groups or list(range(len(images)))
        lies = here.tolist()
        both = {g for g, h in zip(groups, lies, strict=True) if h}
        both &= {g for g, h in zip(groups, lies, strict=True) if not h}
        shared = torch.tensor([g in both for g in groups])
        candidates = (here & shared).nonzero().flatten()
        if test and len(candidates):
            of = [groups[i] for i in candidates.tolist()]
            drawn = candidates[draw_fraction(images.labels[candidates], test, seed, of)]
            aside = {groups[i] for i in drawn.tolist()}
        else:
            aside = set()
        tested = torch.tensor([g in aside for g in groups])
        chosen = {"train": here & ~tested, "test": ~here & (tested | ~shared)}
        told = (
            f"train and val of {domain}, test of the other domains: {len(aside)} of the {len(both)} groups "
            f"that lie in both, and all groups that are not in {domain}"
        )
        parts = {"train": images, "test": images}
    found = {part: images.subset(chosen[part].nonzero().flatten()) for part, images in parts.items()}
    if not len(found["train"]):
        raise DataError(f"{source} has no training image of the domain {domain!r}")
    return {part: images for part, images in found.items() if len(images)}, told


def _load_recorded(
    source: str | os.PathLike,
    record: str | os.PathLike | Record,
    needed: Collection[str],
    duplicates: str,
    reading,
) -> Splits:
    for part in needed:
        check_choice("needed", part, PARTS)
    if not isinstance(record, (str, os.PathLike, Record)):
        raise OptionError(f"record must be a path; got {type(record).__name__}")
    record = record if isinstance(record, Record) else read_record(record)
    if reading["classes"] is not None and list(reading["classes"]) != record.classes:
        raise OptionError(f"{record.file} has the classes {some(record.classes)}: give the same, or none")
    # of VTAB-1k the lists that the record is of, and no test image where none is needed
    shares = {part: 0.2 if record.parts[part] else 0.0 for part in ("val", "test")}
    if "test" not in needed:
        shares["test"] = 0.0
    raw = _read(source, **shares, **reading, known=record.classes)
    sets, changes = recall(raw, record, source, needed)
    for change, found in changes.items():
        _say(source, f"{found['count']} image(s) {WORDS[change]}: {_first(found)}")
    told = {
        "seed": None,
        "split": f"as written down in {record.file}",
        "draw": "as written down",
        "changes": changes,
    }
    return _described(source, sets, raw, record.classes, told, duplicates, reading["strict"], record.unused)


def _described(source, sets, raw: Raw, classes, told, duplicates, strict, unused) -> Splits:
    """The splits with their description, after what is wrong with them has been said."""
    twice = find_duplicates(sets, duplicates)
    like = {"near": "nearly the same content"}.get(duplicates, "the same content")
    problems = [
        f"{twice[k]['count']} image(s) stand in more than one {where} with {like}: {_first(twice[k])}"
        for k, where in (("across", "of train, val and test"), ("labels", "class"))
        if twice[k]["count"]
    ]
    if problems and strict:
        raise DataError(f'{source}: {"; ".join(problems)} (strict; remove them, or set duplicates to "none")')
    counts = {name: images.counts() for name, images in sets.items() if images is not None}
    for name, of_class in counts.items():
        if absent := [label for label, count in of_class.items() if not count]:
            problems.append(f"{len(absent)} of {len(of_class)} classes have no {name} image: {some(absent)}")
    for problem in problems:
        _say(source, f"{problem}")
    description = {
        "source": str(source),
        **raw.about,
        **told,
        "sizes": {name: len(images) if images is not None else 0 for name, images in sets.items()},
        "class_counts": counts,
        "duplicates": twice,
        "fingerprint": _fingerprint(sets),
    }
    return Splits(sets["train"], sets["val"], sets["test"], classes, description, unused)


def _say(source: object, text: str) -> None:
    say_once(one_line(f"{source}: {text}"))


def _first(found: dict[str, Any]) -> str:
    more = found["count"] - len(found["images"])
    return ", ".join(found["images"]) + (f" and {more} more" if more else "")


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
    count, failed = (raw.about.get("skipped") or {"count": 0, "files": []}).values()
    if count:
        told = {"count": count, "images": [f"{one['file']} ({one['reason']})" for one in failed[:SHOWN]]}
        _say(source, f"{count} image(s) cannot be read and are left out: {_first(told)}")
    return raw.parts[split]


def _read(source, *, val, test, check, strict, classes, cache, known=None) -> Raw:
    """known: classes of a record; the source may lack some of them and hold others."""
    check_choice("check", check, CHECK)
    if classes is not None:
        check_classes(classes)
    if source == "":  # which would be the current folder
        raise OptionError("no source given: name an image folder, a CSV file or a built-in set")
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(f"source must be a path or a name; got {type(source).__name__}")
    if isinstance(source, str) and source in OFFLINE:
        try:
            raw = OFFLINE[source](Path(os.path.expanduser(cache)) if cache is not None else cache_dir())
        except OSError as error:
            raise DataError(
                f"{source} cannot be kept in the cache folder ({error}); choose another: cache=, --cache or "
                "$LION_FAST_CACHE"
            ) from error
        if classes is not None and list(classes) != raw.classes:
            raise DataError(f"the classes of {source} are fixed: {', '.join(raw.classes)}")
        return raw
    path, listed = Path(os.path.expanduser(source)), None  # Path's own raises for a user that is not there
    names, wanted = ", ".join(OFFLINE), classes or known
    if os.path.isdir(path):
        published = (r for r, lists in PUBLISHED.items() if any(_lie_in(path, marks) for marks in lists))
        reader = next(published, read_folder)
        listed = reader(path, wanted, **({"val": val, "test": test} if reader is read_vtab else {}))
    elif os.path.isfile(path) and path.suffix.lower() == ".csv":
        listed = read_csv(path, wanted)
    if listed is not None:
        if known is not None:
            classes = [*known, *(name for name in listed.classes if name not in known)]
        return collect(listed, path, check=check, strict=strict, classes=classes)
    if os.path.isfile(path):
        raise DataError(f"{path} is a file but no .csv; expected a folder, a CSV file or one of: {names}")
    near = difflib.get_close_matches(str(source), OFFLINE, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{str(source)!r} is neither an existing folder or CSV file nor a built-in set ({names}){hint}"
    )


def _lie_in(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _all_present(images: ImageSet, option: str) -> None:
    absent = [name for name, count in images.counts().items() if not count]
    if absent:
        raise DataError(f"{option} needs training images of every class; none of: {', '.join(absent[:5])}")


def _stream(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, so that the draws are independent of each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


def _fingerprint(sets: dict[str, ImageSet | None]) -> str:
    there = {part: images for part, images in sets.items() if images is not None}
    return fingerprint({p: zip(i.names, i.labels.tolist(), strict=True) for p, i in there.items()})
