"""VTAB-1k's protocol on a small copy of three tasks: what is run, read, chosen, kept and reported."""

import copy
import itertools
import json
import os
import signal
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_helpers import TINY, tiny_backbone

import lion_fast
from lion_fast.commands.main import main
from lion_fast.data import images as data_images
from lion_fast.data import load_data, sources, transforms
from lion_fast.errors import DataError, OptionError
from lion_fast.studies import work
from lion_fast.studies.rows import Store, read_rows
from lion_fast.studies.vtab import report, runner, tasks
from lion_fast.studies.vtab.protocol import Protocol
from lion_fast.studies.vtab.tasks import find_tasks
from lion_fast.training import TrainConfig, evaluate, fit
from lion_fast.training.presets import NATURAL, VTAB, preset

SPLITS = {"train800": 16, "val200": 8, "train800val200": 24, "test": 10}
# cifar under another copy's name; classes of each
TREE = {"cifar100": 3, "eurosat": 2, "kitti": 3}
N_TEST, N_TASKS = SPLITS["test"], len(TREE)
# what a clock or the machine's load decides
VOLATILE = {"seconds", "training_seconds", "peak_memory_bytes", "last_epoch"}


def write_task(folder, classes, seed=0):
    rng = np.random.default_rng(seed)
    for split, n in SPLITS.items():
        lines = []
        for i in range(n):
            pixels = rng.integers(0, 150, (24, 40, 3))
            pixels[..., i % classes] += rng.integers(0, 60)
            path = folder / "images" / split / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            lines.append(f"images/{split}/{path.name} {i % classes}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("vtab") / "vtab-1k"  # alone in its parent
    for seed, (task, classes) in enumerate(TREE.items()):
        write_task(root / task, classes, seed)
    return root


def backbone():
    found = tiny_backbone()
    found.resize = "direct"
    return found


TRAIN = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0.0, "device": "cpu"}


def protocol(method="probe", train=None, **given):
    given = {"grid": {"lr": (1e-7, 1e-2)}, "seeds": (5,)} | given
    return Protocol(method, train=TRAIN | (train or {}), **given)


def run(root, out, tasks=None, *, resume=False, **given):
    return runner.run(find_tasks(root, tasks), backbone(), protocol(**given), out, resume=resume)


def read(out):
    """The rows of runs."""
    return [row for row in read_rows(out) if row.get("stage") != "draw"]


def steady(rows):
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


class Reads:
    """Counts the images that are decoded and the files that are looked at, by their part."""

    def __init__(self, monkeypatch):
        self.decoded, self.looked = [], []
        real, problem = data_images.read_image, sources.problem_of

        def read_image(path):
            self.decoded.append(str(path))
            return real(path)

        def problem_of(path, check):
            self.looked.append(str(path))
            return problem(path, check)

        monkeypatch.setattr(data_images, "read_image", read_image)
        monkeypatch.setattr(sources, "problem_of", problem_of)

    def of(self, part):
        return [path for path in self.decoded if f"/images/{part}/" in path]


# ---- the whole protocol


def test_the_protocol_from_the_first_image_to_the_report(root, tmp_path, monkeypatch):
    reads, seen = Reads(monkeypatch), []
    add = Store.add

    def noting(self, *rows):
        paths = [path for path in reads.decoded + reads.looked if "/images/test/" in path]
        tested = {path.split("/images/")[0] for path in paths}
        seen.extend((row["stage"], row["set"], tested) for row in rows if row["stage"] != "draw")
        add(self, *rows)

    monkeypatch.setattr(Store, "add", noting)
    summary = run(root, tmp_path, train={"epochs": 6}, grid={"lr": (1e-7, 5e-2)})
    rows = read(tmp_path)
    assert [(r["stage"], r["set"]) for r in rows] == [
        (stage, task) for task in ("cifar", "eurosat", "kitti") for stage in ("tune", "tune", "final")
    ]
    # no test image of a task is decoded, or looked at, before the choice on it is made
    folders = find_tasks(root)
    for stage, task, tested in seen:
        assert (str(folders[task]) in tested) == (stage == "final")
    # each test image is read once
    assert sorted(reads.of("test")) == sorted(
        str(root / t / f"images/test/{i:06d}.png") for t in TREE for i in range(N_TEST)
    )
    # nor is a training image read twice in tuning: both rates train on the same rows of the frozen backbone
    assert len(reads.of("train800")) == len(set(reads.of("train800"))) == N_TASKS * SPLITS["train800"]
    # the better rate was chosen on the validation images, and the summary says so
    for task in ("cifar", "eurosat", "kitti"):
        slow, fast, test = (r for r in rows if r["set"] == task)
        assert fast["val"]["accuracy"] > slow["val"]["accuracy"] and test["train"]["lr"] == 5e-2
        assert summary["tasks"][task]["val_accuracy"] == fast["val"]["accuracy"]
        assert test["data"]["sizes"]["train"] == 24 and test["test"]["n"] == N_TEST and test["seed"] == 5
        assert fast["train"]["epochs"] == fast["epochs"] == 6 and fast["val"]["n"] == 8
        assert fast["test"] is None  # a tuning row knows nothing of the test images
        backbone = test["protocol"]["backbone"]
        assert backbone["resize"] == "direct" and len(backbone["sha256"]) == 64
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert summary == report.summarize(read_rows(tmp_path))

    text = (tmp_path / "report.md").read_text()
    assert "The mean is over 3 of 19 tasks" in text and "**natural** (1 of 7)" in text
    assert "svhn, sun397, patch_camelyon, resisc45" in text  # what is not there, by name
    assert "cifar: 3 classes and not 100" in text and "kitti: 10 test images and not 711" in text
    assert text.count("| not run ") == 16


def test_a_final_run_is_a_fit_on_the_thousand(root, tmp_path):
    run(root, tmp_path, tasks=["kitti"], method="vpt", options={"length": 2})
    row = read(tmp_path)[-1]
    frozen = backbone()
    splits = load_data(root / "kitti", val=0)
    model = lion_fast.create(frozen, "vpt", num_classes=3, seed=5, length=2)
    settings = {**preset("vpt", "common").train, **TRAIN, "lr": row["train"]["lr"], "seed": 5}
    splits = type(splits)(splits.train, None, splits.test, splits.classes, splits.description)
    fit(model, splits, TrainConfig(**settings), tmp_path / "by hand", progress=False)
    view = transforms(frozen, resize="direct")
    found = evaluate(model, splits.test.with_transform(view), 8)
    assert row["test"]["accuracy"] == found.accuracy
    assert row["test"]["loss"] == pytest.approx(found.loss, rel=1e-5)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    own = sum(n for name, n in trained.items() if not name.startswith("head."))
    assert row["parameters"]["kept"] == model.num_trainable() == own
    assert row["parameters"]["kept_with_head"] == row["parameters"]["kept"] + 3 * 32 + 3
    again = lion_fast.load_adapter(tmp_path / "adapters" / "kitti-seed5", frozen)
    assert evaluate(again, splits.test.with_transform(view), 8).loss == pytest.approx(found.loss, abs=1e-6)


@pytest.mark.parametrize("stop_at", [3, 9, 13, 20])
def test_interrupted_and_resumed_is_the_same(root, tmp_path, monkeypatch, stop_at):
    """Ctrl-C in a step of tuning or of the final run: rows stay, and the rest comes out alike."""
    given = {"tasks": ["eurosat", "kitti"], "method": "lion", "options": {"state_dim": 4, "reading": "fixed"}}
    run(root, tmp_path / "whole", **given)
    whole = read(tmp_path / "whole")

    steps = []

    def interrupting(*_):
        steps.append(1)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(interrupting)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt, match="interrupted") as stopped:
        run(root, out, **given)
    assert "--resume" in stopped.value.hint and str(out) in stopped.value.hint
    before = read(out)
    # 4, 4 and 6 steps of the three runs of a task: the finished ones have their rows
    assert len(before) == {3: 0, 9: 2, 13: 2, 20: 4}[stop_at]
    reads = Reads(monkeypatch)
    run(root, out, resume=True, **given)
    resumed = read(out)
    assert steady(resumed) == steady(whole)
    assert resumed[: len(before)] == before
    hook.remove()
    assert len(steps) == 28  # no step twice
    assert len(reads.of("test")) == N_TEST * sum(r["stage"] == "final" for r in resumed[len(before) :])


def test_what_has_a_row_is_not_run_again_and_seeds_and_tasks_may_follow(root, tmp_path, monkeypatch):
    run(root, tmp_path, tasks=["kitti"])
    first = read(tmp_path)
    reads = Reads(monkeypatch)
    run(root, tmp_path, tasks=["kitti"], resume=True)
    assert reads.decoded == [] and read(tmp_path) == first
    summary = run(root, tmp_path, tasks=["eurosat", "kitti"], seeds=(5, 6), resume=True)
    rows = read(tmp_path)
    assert rows[:3] == first and len(rows) == 3 + 4 + 1
    assert [(r["set"], r["stage"], r["seed"]) for r in rows[3:]] == [
        ("eurosat", "tune", 5), ("eurosat", "tune", 5), ("eurosat", "final", 5), ("eurosat", "final", 6),
        ("kitti", "final", 6),
    ]  # fmt: skip
    assert len(reads.of("test")) == 2 * N_TEST  # the seeds share one pass through the frozen backbone
    own = [r["test"]["accuracy"] for r in rows if r["set"] == "kitti" and r["stage"] == "final"]
    assert summary["tasks"]["kitti"]["accuracy"] == pytest.approx(statistics.mean(own))
    assert summary["tasks"]["kitti"]["sd"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    assert summary["tasks"]["kitti"]["seeds"] == [5, 6]


def test_rows_of_another_command_are_never_mixed_in(root, tmp_path):
    """What no one gave counts too: a later version may mean something else by it."""
    given = {"tasks": ["kitti"]}
    run(root, tmp_path, **given)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(OptionError, match="--resume"):
        run(root, tmp_path, **given)
    for changed, told in (
        ({"method": "ssf"}, 'protocol.method is "probe" there and "ssf" here'),
        ({"train": {"epochs": 3}}, "protocol.train.epochs is 2 there and 3 here"),
        ({"grid": {"lr": (0.1,)}}, r"protocol.grid.lr is \[1e-07, 0.01\] there and \[0.1\] here"),
    ):
        with pytest.raises(OptionError, match=told):
            run(root, tmp_path, resume=True, **given | changed)
    found = find_tasks(root, ["kitti"])
    with pytest.raises(OptionError, match=r'backbone.resize is "direct" there and "crop" here'):
        runner.run(found, tiny_backbone(), protocol(), tmp_path, resume=True)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    run(root, tmp_path, train={"num_workers": 1}, resume=True, **given)  # it decides no number
    rows = read(tmp_path)
    for part, name, value in (("options", "length", 7), ("train", "clip_norm", 1.0)):
        others = copy.deepcopy(rows)
        for row in others:
            row["protocol"]["protocol"]["defaults"][part][name] = value
        with Store(tmp_path) as store:
            store.add(*others)
        with pytest.raises(OptionError, match=f"defaults.{part}.{name} is {value} there"):
            run(root, tmp_path, resume=True, **given)
    (tmp_path / "rows.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="no rows"):
        run(root, tmp_path, resume=True, **given)
    (tmp_path / "rows.json").write_text('{"format": 1, "rows": [{"key": "of another study"}]}')
    with pytest.raises(DataError, match="not of VTAB-1k"):
        run(root, tmp_path, resume=True, **given)


def test_other_images_than_those_of_the_rows(tmp_path):
    write_task(tmp_path / "root" / "kitti", 3)
    run(tmp_path / "root", tmp_path / "out", tasks=["kitti"])
    path = tmp_path / "root" / "kitti" / "test.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="other images"):
        run(tmp_path / "root", tmp_path / "out", seeds=(5, 6), resume=True)


def test_a_configuration_that_diverges_does_not_end_the_rest(root, tmp_path):
    sgd = {"optimizer": "sgd"}
    summary = run(root, tmp_path, tasks=["kitti"], train=sgd, grid={"lr": (1e38, 1e-1)})
    rows = read(tmp_path)
    assert [bool(row["failed"]) for row in rows] == [True, False, False] and rows[-1]["train"]["lr"] == 0.1
    assert len(summary["diverged"]) == 1 and "kitti, tuning, seed 5: lr 1e+38" in summary["diverged"][0]
    assert "diverged, and so without a result: kitti, tuning" in (tmp_path / "report.md").read_text()
    none = run(root, tmp_path / "b", tasks=["kitti"], train=sgd, grid={"lr": (1e38, 2e38)})
    assert none["n"] == 0 and none["mean"] is None and none["mean_of_groups"] is None
    assert len(read(tmp_path / "b")) == 2
    assert "mean is over 0 of 19" in (tmp_path / "b" / "report.md").read_text()


def test_outputs_that_are_not_finite_are_a_divergence_too(root, tmp_path, monkeypatch):
    real, calls = work.predict, itertools.count()

    def predict(model, images, *args, **kwargs):
        if len(images) == SPLITS["val200"] and next(calls) == 0 or len(images) == N_TEST:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return real(model, images, *args, **kwargs)

    monkeypatch.setattr(work, "predict", predict)
    run(root, tmp_path, tasks=["kitti"])
    rows = read(tmp_path)
    assert [bool(row["failed"]) for row in rows] == [True, False, True]
    assert "not finite" in rows[0]["failed"] and rows[2].get("test") is None
    assert not list(tmp_path.glob("adapters/*"))
    assert run(root, tmp_path, tasks=["kitti"], resume=True)["n"] == 0


def test_ties_are_broken_by_loss_and_then_by_order():
    grid = protocol(grid={"lr": (0.1, 0.2, 0.3, 0.4)}).on("kitti", "kitti")
    cell = ("backbone", "kitti", "probe")
    found = [(0.5, 0.1), (0.75, 0.9), (0.75, 0.8), (0.75, 0.8)]
    rows = {
        item.run: {"failed": None, "val": {"accuracy": accuracy, "loss": loss}}
        for item, (accuracy, loss) in zip(grid.tuning(*cell), found, strict=True)
    }
    assert grid.choose(*cell, rows) == 2
    assert grid.choose(*cell, {run: {"failed": "diverged"} for run in rows}) is None


def test_one_configuration_is_not_tuned(root, tmp_path):
    run(root, tmp_path, tasks=["kitti"], grid={"lr": (1e-2,)})
    (row,) = read(tmp_path)
    assert (row["stage"], row["val"]) == ("final", None)
    assert "(with one, nothing was chosen)" in (tmp_path / "report.md").read_text()


def test_an_unreadable_image_is_skipped_told_and_reported(tmp_path, capsys):
    folder = write_task(tmp_path / "root" / "kitti", 3)
    (folder / "images/test/000004.png").write_bytes(b"no image")
    run(tmp_path / "root", tmp_path / "out")
    row = read(tmp_path / "out")[-1]
    assert (row["data"]["skipped"], row["test"]["n"]) == (1, N_TEST - 1)
    assert "images/test/000004.png" in capsys.readouterr().err
    assert "kitti: 1 unreadable images were skipped" in (tmp_path / "out" / "report.md").read_text()


def test_a_value_out_of_range_is_refused_before_anything_is_run(root, tmp_path):
    with pytest.raises(OptionError, match="lr must be a"):
        run(root, tmp_path / "a", grid={"lr": (0.1, -1)})
    with pytest.raises(OptionError, match="length"):
        run(root, tmp_path / "b", tasks=["kitti"], method="vpt", grid={"length": (1, 0)})
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


# ---- folders


def test_finding_tasks(root, tmp_path):
    assert list(find_tasks(root)) == ["cifar", "eurosat", "kitti"]
    assert find_tasks(root, ["cifar"]) == {"cifar": root / "cifar100"}
    assert tasks.absent({"kitti": 1, **dict.fromkeys(NATURAL)}) == [
        t for t in VTAB if t not in (*NATURAL, "kitti")
    ]
    for where, wanted, error, told in (
        (root, ["kity"], OptionError, "did you mean kitti"),
        (root, ["pets"], OptionError, "did you mean oxford_iiit_pet"),
        (root, ["svhn", "kitti"], DataError, "does not hold svhn; it holds cifar, eurosat, kitti"),
        (root / "kitti", None, DataError, "is a single task; give its parent"),
        (root / "nowhere", None, DataError, "is no folder"),
        (root.parent, None, DataError, f"holds none of the 19 .*; {root} does: give that"),
    ):
        with pytest.raises(error, match=told):
            find_tasks(where, wanted)
    folder = write_task(tmp_path / "kitti", 3)
    (folder / "images/test/000009.png").unlink()
    with pytest.raises(DataError, match="test.txt lists images/test/000009.png, which does not exist"):
        find_tasks(tmp_path)
    (folder / "val200.txt").unlink()
    with pytest.raises(DataError, match="val200.txt is missing"):
        find_tasks(tmp_path)


# ---- the command


def command(root, out, *more):
    flags = ["vtab", "--root", str(root), "--out", str(out), "--no-pretrained", "--img-size", "32"]
    flags += ["--backbone", "vit_tiny_patch16_224", "--device", "cpu", "--no-progress", "--batch-size", "8"]
    flags += [part for key, value in TINY.items() for part in ("--backbone-set", f"{key}={value}")]
    return [*flags, "--epochs", "1", *more]


def test_the_command(root, tmp_path, capsys):
    given = ["--method", "vpt", "--set", "length=2", "--grid", "lr=1e-3,1e-2", "--tasks", "kitti", "eurosat"]
    assert main(command(root, tmp_path, *given)) == 0
    told = capsys.readouterr()
    assert "[2/2] 3 done, 0 left: final vpt on kitti" in told.err and "2 of 19 tasks" in told.err
    assert "not run: cifar, caltech101" in told.err
    assert "| **mean** (2 of 19)" in told.out
    rows = read(tmp_path)
    about = rows[0]["protocol"]
    assert about["backbone"]["resize"] == "direct" and about["protocol"]["options"] == {"length": 2}
    assert {row["train"]["epochs"] for row in rows} == {1} and {row["seed"] for row in rows} == {42}

    assert main(command(root, tmp_path, *given)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(command(root, tmp_path, *given, "--resume", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["n"] == 2 and summary["tasks"]["kitti"]["accuracy"] == rows[-1]["test"]["accuracy"]
    assert read(tmp_path) == rows


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--tasks", "kity"], 2, "did you mean kitti"),
        (["--grid", "lenght=1"], 2, "unknown name in the grid of lion: 'lenght'"),
        (["--resize", "pad"], 2, "resize must be one of crop, direct"),
        (["--img-size", "36"], 2, "nearest valid sizes: 32 or 40"),
        (["--root", "nowhere"], 1, "nowhere is no folder"),
    ],
)
def test_what_the_command_refuses(root, tmp_path, capsys, more, code, told):
    assert main(command(root, tmp_path / "out", *more)) == code
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(root, tmp_path)) == 2
    assert "vtab runs in one process" in capsys.readouterr().err


def test_a_damaged_checkpoint_begins_the_run_again(root, tmp_path, capsys):
    folder = tmp_path / "runs" / "kitti" / "tune-01" / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    run(root, tmp_path, tasks=["kitti"])
    assert "begun again, its checkpoint cannot be used" in capsys.readouterr().err
    run(root, tmp_path / "clean", tasks=["kitti"])
    ours, clean = (read(folder) for folder in (tmp_path, tmp_path / "clean"))
    assert steady(ours) == steady(clean)
    assert torch.isfinite(torch.tensor(ours[-1]["test"]["loss"]))


KEPT = ("seed", "seconds", "versions", "device", "device_name", "threads", "git", "git_code", "git_changed")


def as_of_the_first_format(row):
    old = {name: row[name] for name in KEPT}
    old |= {"task": "kitti", "status": "done", "options": {}, "varied": {"lr": row["train"]["lr"]}}
    old |= {"train": {k: v for k, v in row["train"].items() if k != "seed"}}
    old |= {"data": row["data"]["fingerprint"]}
    if row["stage"] == "tune":
        old |= {"phase": "tune", "val_images": row["val"]["n"]}
        return old | {f"val_{name}": row["val"][name] for name in ("accuracy", "loss")}
    counts = row["parameters"]
    old |= {"phase": "test", "train_images": 24, "test_images": N_TEST, "classes": 3, "skipped": 0}
    old |= {"parameters": {"kept": counts["kept"], "with_head": counts["kept_with_head"]}}
    return old | {name: row["test"][name] for name in ("accuracy", "balanced_accuracy", "loss")}


def test_rows_of_the_first_format_go_on_to_count(root, tmp_path):
    """What a folder of an earlier version holds is not run again, and is in the report."""
    run(root, tmp_path, tasks=["kitti"])
    new = read(tmp_path)
    before, text = report.summarize(new), (tmp_path / "report.md").read_text()
    rows = [as_of_the_first_format(row) for row in new]
    body = {"format": "lion_fast.vtab/1", "protocol": new[0]["protocol"], "rows": rows}
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(body))
    assert run(root, tmp_path, tasks=["kitti"], resume=True) == before
    assert (tmp_path / "report.md").read_text() == text
    again = run(root, tmp_path, tasks=["kitti"], resume=True, seeds=(5, 6))
    assert again["tasks"]["kitti"]["seeds"] == [5, 6]
