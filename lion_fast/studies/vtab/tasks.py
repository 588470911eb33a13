"""The 19 tasks of VTAB-1k: their groups and sizes, and their folders below a root."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lion_fast.data.published import VTAB_LISTS, vtab_list
from lion_fast.errors import DataError, OptionError
from lion_fast.training.presets import NATURAL, SPECIALIZED, STRUCTURED, VTAB

GROUPS = {"natural": NATURAL, "specialized": SPECIALIZED, "structured": STRUCTURED}
# classes and test images of each task as the benchmark defines it; a copy may differ, and the report says so
SIZES = {
    "cifar": (100, 10_000), "caltech101": (102, 6_084), "dtd": (47, 1_880), "oxford_flowers102": (102, 6_149),
    "oxford_iiit_pet": (37, 3_669), "svhn": (10, 26_032), "sun397": (397, 21_750),
    "patch_camelyon": (2, 32_768), "eurosat": (10, 5_400), "resisc45": (45, 6_300),
    "diabetic_retinopathy": (5, 42_670),
    "clevr_count": (8, 15_000), "clevr_dist": (6, 15_000), "dmlab": (6, 22_735), "kitti": (4, 711),
    "dsprites_loc": (16, 73_728), "dsprites_ori": (16, 73_728), "smallnorb_azi": (18, 12_150),
    "smallnorb_ele": (9, 12_150),
}  # fmt: skip
# folder names of other copies
ALIASES = {
    "cifar": ("cifar100",),
    "oxford_flowers102": ("flowers102", "flowers"),
    "oxford_iiit_pet": ("oxford_pet", "pets"),
}


def find_tasks(root: str | os.PathLike, wanted: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders of the tasks below `root`, in the order of the benchmark; each has its four lists.

    wanted: task names, every one of which must be there; None: all of the 19 that are.

    Raises `OptionError` for a name that is no task, `DataError` for a root without tasks, a wanted task that
    is not there, or a task folder that is not complete.
    """
    called = {name: task for task in VTAB for name in (task, *ALIASES.get(task, ()))}
    for name in wanted or ():
        if name not in VTAB:
            near = difflib.get_close_matches(name, called, 1)
            hint = f"; did you mean {called[near[0]]}?" if near else "."
            raise OptionError(f"no VTAB-1k task is named {name!r}{hint} The tasks are {', '.join(VTAB)}")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder; --root takes the folder that holds one folder per VTAB-1k task"
        )
    if _is_task(root):
        raise DataError(f"{root} is a single task; give its parent, {root.parent}, and --tasks {root.name}")
    found = {task: folder for task in VTAB if (folder := _folder(root, task)) is not None}
    if not found:
        inside = next((f.name for f in sorted(root.iterdir()) if f.is_dir() and _holds_tasks(f)), None)
        hint = f"; {root / inside} does: give that" if inside else ""
        raise DataError(
            f"{root} holds none of the 19 VTAB-1k tasks{hint}. Expected folders such as "
            f"{root / 'cifar'} with {', '.join(VTAB_LISTS.values())} and images/"
        )
    absent = [name for name in wanted or () if name not in found]
    if absent:
        raise DataError(f"{root} does not hold {', '.join(absent)}; it holds {', '.join(found)}")
    chosen = {task: folder for task, folder in found.items() if wanted is None or task in wanted}
    for folder in chosen.values():
        _check(folder)
    return chosen


def differences(task: str, classes: int, train_images: int, test_images: int) -> list[str]:
    """In words, what of a copy's sizes is not as the benchmark has it.

    >>> differences("kitti", 4, 1000, 700)
    ['700 test images and not 711']
    """
    said = (
        (classes, SIZES[task][0], "classes"),
        (train_images, 1000, "images in train800val200"),
        (test_images, SIZES[task][1], "test images"),
    )
    return [f"{here:,} {what} and not {there:,}" for here, there, what in said if here != there]


def absent(found: Mapping[str, object]) -> list[str]:
    """The tasks of the benchmark that are not among these."""
    return [task for task in VTAB if task not in found]


def _is_task(folder: Path) -> bool:
    return any((folder / VTAB_LISTS[name]).is_file() for name in ("train800", "train1000"))


def _folder(root: Path, task: str) -> Path | None:
    return next((root / n for n in (task, *ALIASES.get(task, ())) if _is_task(root / n)), None)


def _holds_tasks(folder: Path) -> bool:
    return any(_folder(folder, task) is not None for task in VTAB)


def _check(folder: Path) -> None:
    """All four lists are there and their first and last images: before hours of tuning, not after."""
    for name in VTAB_LISTS.values():
        items = vtab_list(folder, name, "")
        for item in (items[0], items[-1]):
            if not item.path.is_file():
                raise DataError(f"{folder / name} lists {item.name}, which does not exist")
