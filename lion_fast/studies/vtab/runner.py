"""The protocol, run: what rows there are is not run again, and every row is written when it is there."""

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lion_fast.backbones import Backbone
from lion_fast.data import Splits, load_data, transforms
from lion_fast.errors import CheckpointError, DataError, OptionError
from lion_fast.inspection import parameter_counts
from lion_fast.methods import create
from lion_fast.methods.files import describe_images
from lion_fast.studies.environment import context
from lion_fast.studies.vtab import report, tasks
from lion_fast.studies.vtab.protocol import Configuration, Protocol
from lion_fast.studies.vtab.rows import Rows
from lion_fast.training import FeatureStore, Metrics, TrainConfig, TrainingError, evaluate, fit
from lion_fast.training.checkpoints import list_checkpoints


def run(
    folders: Mapping[str, Path],
    backbone: Backbone,
    protocol: Protocol,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    check: str = "header",
    strict: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a protocol on task folders; returns the summary, see `report.summarize`.

    Of each task: every configuration is trained on the 800 images and judged on the 200 at its last epoch;
    the best one (by accuracy, then loss, then order) is trained anew on the 1,000 images with every seed,
    and each of these models reads the test images once. A task with one configuration is not tuned.

    Args:
        folders: Folder of each task, see `tasks.find_tasks`.
        backbone: The frozen backbone; its `resize` should be "direct".
        protocol: Method, configurations and seeds.
        out: Folder of `rows.json` (every run), `report.md`, `accuracy.png`, `adapters/TASK-seedN` and `runs/`
            (the curves of each run).
        resume: Go on from the rows and checkpoints in `out`.
        check: What is checked of every image file, see `load_data`.
        strict: An unreadable image is an error and not skipped.
        progress: Show progress bars on stderr.

    Raises:
        OptionError: A configuration that the backbone cannot take; rows in `out` that are not resumed, or are
            of another protocol.
        DataError: A list or image that cannot be used, or other images than those of the rows.
        KeyboardInterrupt: Asked to stop; the rows are kept and the run at hand has a checkpoint.
    """
    out = Path(out)
    device = "cpu" if protocol.train.get("device") == "cpu" or not torch.cuda.is_available() else "cuda"
    about = {"protocol": protocol.describe(), "backbone": _describe(backbone)}
    rows = Rows(out, about, resume=resume)
    plans = {task: protocol.configurations(task) for task in folders}
    _try_all(backbone, protocol.method, plans)
    work = _Work(folders, backbone, protocol, rows, out, check, strict, progress)
    work.total = sum((len(plan) if len(plan) > 1 else 0) + len(protocol.seeds) for plan in plans.values())
    work.where = context(torch.device(device))
    configurations = sorted({len(plan) for plan in plans.values()})
    _say(
        f"{protocol.method} on {backbone.name}: {len(folders)} of 19 tasks, "
        f"{' or '.join(map(str, configurations))} configurations each, seeds {list(protocol.seeds)}; "
        f"{work.total} runs"
    )
    missing = tasks.absent(folders)
    if missing:
        _say(f"not run: {', '.join(missing)}")
    try:
        for task, plan in plans.items():
            if work.task(task, plan):
                report.write(out, rows, plot=False)
    except KeyboardInterrupt as error:
        error.args = error.args or ("interrupted",)
        error.hint = f"the rows so far are in {rows.path}; the same command with --resume goes on from there"
        raise
    return report.write(out, rows)


class _Work:
    def __init__(self, folders, backbone, protocol: Protocol, rows: Rows, out: Path, check, strict, progress):
        self.folders, self.backbone, self.protocol = folders, backbone, protocol
        self.rows, self.out, self.progress = rows, out, progress
        self.reading = {"check": check, "strict": strict}
        self.total, self.at, self.where = 0, 0, {}
        self.store = FeatureStore(limit=1)  # of the task at hand: its configurations read the same images

    def task(self, task: str, plan: list[Configuration]) -> bool:
        """Run what a task lacks; whether there was anything."""
        before = len(self.rows.rows)
        tuned = len(plan) > 1
        left = [seed for seed in self.protocol.seeds if not self.rows.find("test", task, seed=seed)]
        runs = (len(plan) if tuned else 0) + len(self.protocol.seeds)
        if not left:
            self.at += runs
            return False
        chosen = plan[0]
        if tuned:
            self._tune(task, plan)
            chosen = self._best(task, plan)
        self.at += len(self.protocol.seeds) - len(left)
        if chosen is not None:
            self._test(task, chosen, left, len(plan))
        return len(self.rows.rows) > before

    def _tune(self, task: str, plan: list[Configuration]) -> None:
        splits = None
        for number, one in enumerate(plan):
            self.at += 1
            if self._row(task, one) is not None:
                continue
            # test=0: no test image is so much as opened before the choice is made
            splits = splits or self._load(task, "tune", test=0)
            seed = self.protocol.seeds[0]
            what = f"{task}, {number + 1} of {len(plan)}: {one.label()}"
            row, model = self._fit(task, "tune", one, seed, splits, f"tune-{number + 1:02d}", what)
            if model is not None and (found := self._evaluate(model, splits.val, one, row, what)):
                row |= {"val_accuracy": found.accuracy, "val_loss": found.loss, "val_images": found.n}
                self._told(what, f"validation {found.accuracy:.4f}", row)
            self._finish(row, f"tune-{number + 1:02d}")

    def _best(self, task: str, plan: list[Configuration]) -> Configuration | None:
        """By validation accuracy, then loss, then order; None where every configuration diverged."""
        found = [(one, self._row(task, one)) for one in plan]
        found = [(one, row) for one, row in found if row["status"] == "done"]
        if not found:
            _say(f"{task}: no configuration could be trained; there is no test")
            return None
        return max(found, key=lambda pair: (pair[1]["val_accuracy"], -pair[1]["val_loss"]))[0]

    def _test(self, task: str, chosen: Configuration, seeds: list[int], tried: int) -> None:
        splits = self._load(task, "test", val=0)
        tuned = self._row(task, chosen) if tried > 1 else None
        for seed in seeds:
            self.at += 1
            what = f"{task}, all {len(splits.train):,} images, seed {seed}: {chosen.label()}"
            name = f"final-seed{seed}"
            row, model = self._fit(task, "test", chosen, seed, splits, name, what)
            row |= {
                "group": tasks.group_of(task),
                "tried": tried,
                "val_accuracy": tuned and tuned["val_accuracy"],
                "train_images": len(splits.train),
                "test_images": len(splits.test),
                "classes": len(splits.classes),
                "skipped": splits.description["skipped"]["count"],
                "differs": tasks.differences(task, len(splits.classes), len(splits.train), len(splits.test)),
            }
            if model is not None and (found := self._evaluate(model, splits.test, chosen, row, what)):
                model.save_adapter(self.out / "adapters" / f"{task}-seed{seed}")
                row |= {
                    "accuracy": found.accuracy,
                    "balanced_accuracy": found.balanced_accuracy,
                    "loss": found.loss,
                    "parameters": parameter_counts(model),
                    "adapter": f"adapters/{task}-seed{seed}",
                }
                self._told(what, f"test {found.accuracy:.4f}", row)
            self._finish(row, name)

    def _row(self, task: str, one: Configuration) -> dict | None:
        key = {"options": dict(one.options), "train": _plain_train(one)}
        found = self.rows.find("tune", task, seed=self.protocol.seeds[0], **key)
        return found[0] if found else None

    def _load(self, task: str, phase: str, **parts: float) -> Splits:
        splits = load_data(self.folders[task], **parts, **self.reading)
        others = {row["data"] for row in self.rows.find(phase, task)} - {splits.description["fingerprint"]}
        if others:
            raise DataError(
                f"{self.folders[task]} lists other images by now than those of the rows in {self.rows.path}: "
                "restore the lists, or choose another --out"
            )
        skipped = splits.description["skipped"]
        if skipped["count"]:
            named = ", ".join(entry["file"] for entry in skipped["files"][:5])
            _say(f"{task}: {skipped['count']} unreadable images are skipped: {named}")
        return splits

    def _fit(self, task, phase, one: Configuration, seed: int, splits: Splits, name: str, what: str):
        """The trained model and the beginning of its row; no model where training diverged."""
        config = TrainConfig.from_dict(dict(one.train) | {"seed": seed})
        model = _create(self.backbone, self.protocol.method, len(splits.classes), seed, one.options)
        folder = self.out / "runs" / task / name
        # without validation images no epoch can be chosen by them
        train_only = Splits(splits.train, None, None, splits.classes, splits.description)
        row = {
            "phase": phase,
            "task": task,
            "seed": seed,
            "status": "done",
            "options": dict(one.options),
            "train": _plain_train(one),
            "varied": dict(one.varied),
            "data": splits.description["fingerprint"],
            **self.where,
        }
        resume = bool(list_checkpoints(folder / "checkpoints"))
        shared = {"progress": self.progress, "store": self.store}
        started = time.perf_counter()
        try:
            try:
                fitted = fit(model, train_only, config, folder, resume=resume, **shared)
            except CheckpointError as error:
                if not resume:
                    raise
                _say(f"{what}: begun again, its checkpoint cannot be used ({error})")
                model = _create(self.backbone, self.protocol.method, len(splits.classes), seed, one.options)
                fitted = fit(model, train_only, config, folder, overwrite=True, **shared)
        except TrainingError as error:
            row |= {"status": "diverged", "reason": str(error), "seconds": time.perf_counter() - started}
            self._told(what, f"diverged: {error}", row)
            return row, None
        last = fitted.history[-1]
        row |= {
            "epochs": fitted.epochs,
            "steps": fitted.steps,
            "train_loss": last["train_loss"],
            "train_accuracy": last["train_accuracy"],
            "seconds": fitted.seconds,
            "peak_memory_bytes": fitted.peak_memory_bytes,
            "memory_measured": fitted.memory_measured,
        }
        return row, model

    def _evaluate(self, model, images, one: Configuration, row: dict, what: str) -> Metrics | None:
        """The metrics; None, said in the row, where the model's outputs are not finite."""
        config = TrainConfig.from_dict(dict(one.train))
        found = evaluate(
            model,
            images.with_transform(transforms(self.backbone)),
            config.eval_batch_size or config.batch_size,
            num_workers=config.num_workers,
            mixed_precision=config.mixed_precision,
            progress=self.progress,
        )
        if math.isfinite(found.loss):
            return found
        row |= {"status": "diverged", "reason": "the trained model's outputs are not finite"}
        self._told(what, f"diverged: {row['reason']}", row)
        return None

    def _finish(self, row: dict, name: str) -> None:
        self.rows.add(row)
        shutil.rmtree(self.out / "runs" / row["task"] / name / "checkpoints", ignore_errors=True)

    def _told(self, what: str, result: str, row: dict) -> None:
        width = len(str(self.total))
        _say(f"[{self.at:{width}}/{self.total}] {what}: {result} ({row['seconds']:.0f} s)")


def _create(backbone: Backbone, method: str, classes: int, seed: int, options: Mapping):
    return create(backbone, method, num_classes=classes, seed=seed, **options)


def _try_all(backbone: Backbone, method: str, plans: Mapping[str, list[Configuration]]) -> None:
    """An option that a method or backbone refuses is refused before the first run and not in the middle."""
    tried: list[dict] = []
    for task, plan in plans.items():
        for one in plan:
            if dict(one.options) in tried:
                continue
            tried.append(dict(one.options))
            try:
                _create(backbone, method, 2, 0, one.options)
            except OptionError as error:
                raise OptionError(f"{task}, {one.label()}: {error}") from error


def _plain_train(one: Configuration) -> dict[str, Any]:
    """The settings that decide numbers: a resumed command may read with more workers."""
    settings = TrainConfig.from_dict(dict(one.train)).to_fingerprint()
    return {name: value for name, value in settings.items() if name != "seed"}  # the row has its own


def _describe(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "weights_source": backbone.weights_source,
        "sha256": backbone.weights_sha256,
        "precision": backbone.precision,
        **describe_images(backbone),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
