"""VTAB-1k's protocol on a small copy of three tasks: what is run, read, chosen, kept and reported."""

import itertools
import json
import os
import signal
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import TINY, tiny_backbone

import lion_fast
from lion_fast.commands.main import main
from lion_fast.data import images as data_images
from lion_fast.data import load_data, sources, transforms
from lion_fast.errors import DataError, OptionError
from lion_fast.methods import available
from lion_fast.studies.vtab import report, runner, tasks
from lion_fast.studies.vtab.protocol import Protocol
from lion_fast.studies.vtab.rows import Rows, read
from lion_fast.training import TrainConfig, evaluate, fit, loop
from lion_fast.training.presets import NATURAL, VTAB, preset

SPLITS = {"train800": 16, "val200": 8, "train800val200": 24, "test": 10}
# cifar under another copy's name; classes of each
TREE = {"cifar100": 3, "eurosat": 2, "kitti": 3}
N_TEST, N_TASKS = SPLITS["test"], len(TREE)
# what a clock or the machine's load decides
VOLATILE = {"seconds", "peak_memory_bytes"}


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
    root = tmp_path_factory.mktemp("vtab-1k")
    for seed, (task, classes) in enumerate(TREE.items()):
        write_task(root / task, classes, seed)
    return root


def backbone():
    found = tiny_backbone()
    found.resize = "direct"
    return found


def protocol(method="probe", **given):
    train = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0.0, "device": "cpu"} | given.pop("train", {})
    return Protocol(method, **{"grid": {"lr": (1e-7, 1e-2)}, "train": train, "seeds": (5,)} | given)


def run(root, out, **given):
    resume = given.pop("resume", False)
    found = tasks.find_tasks(root, given.pop("tasks", None))
    return runner.run(found, backbone(), protocol(**given), out, resume=resume)


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
    add = Rows.add

    def noting(self, row):
        tested = [path for path in reads.decoded + reads.looked if "/images/test/" in path]
        seen.append((row["phase"], row["task"], {path.split("/images/")[0] for path in tested}))
        add(self, row)

    monkeypatch.setattr(Rows, "add", noting)
    summary = run(root, tmp_path, train={"epochs": 6}, grid={"lr": (1e-7, 5e-2)})
    header, rows = read(tmp_path / "rows.json")
    assert [(r["phase"], r["task"]) for r in rows] == [
        (phase, task) for task in ("cifar", "eurosat", "kitti") for phase in ("tune", "tune", "test")
    ]
    # no test image of a task is decoded, or looked at, before the choice on it is made
    folders = {"cifar": "cifar100"}
    for phase, task, tested in seen:
        own = str(root / folders.get(task, task))
        assert (own in tested) == (phase == "test")
    # each test image is read once
    assert sorted(reads.of("test")) == sorted(
        str(root / t / f"images/test/{i:06d}.png") for t in TREE for i in range(N_TEST)
    )
    # nor is a training image read twice in tuning: both rates train on the same rows of the frozen backbone
    assert len(reads.of("train800")) == len(set(reads.of("train800"))) == N_TASKS * SPLITS["train800"]
    # the better rate was chosen on the validation images, and its row says so
    for task in ("cifar", "eurosat", "kitti"):
        slow, fast, test = (r for r in rows if r["task"] == task)
        assert fast["val_accuracy"] > slow["val_accuracy"] and test["train"]["lr"] == 5e-2
        assert test["val_accuracy"] == fast["val_accuracy"] and test["tried"] == 2
        assert test["train_images"] == 24 and test["test_images"] == N_TEST and test["seed"] == 5
        assert fast["train"]["epochs"] == fast["epochs"] == 6 and fast["val_images"] == 8
        assert "accuracy" not in fast  # a tuning row knows nothing of the test images
    assert header["backbone"]["resize"] == "direct" and len(header["backbone"]["sha256"]) == 64
    assert (
        not list(tmp_path.glob("runs/*/*/checkpoints")) and (tmp_path / "accuracy.png").stat().st_size > 5000
    )
    assert summary == report.summarize(rows)

    text = (tmp_path / "report.md").read_text()
    assert "The mean is over 3 of 19 tasks" in text and "**natural** (1 of 7)" in text
    assert "svhn, sun397, patch_camelyon, resisc45" in text  # what is not there, by name
    assert "cifar: 3 classes and not 100" in text and "kitti: 10 test images and not 711" in text
    assert text.count("| not run ") == 16


def test_a_final_run_is_a_fit_on_the_thousand(root, tmp_path):
    run(root, tmp_path, tasks=["kitti"], method="vpt", options={"length": 2})
    row = read(tmp_path / "rows.json")[1][-1]
    frozen = backbone()
    splits = load_data(root / "kitti", val=0)
    model = lion_fast.create(frozen, "vpt", num_classes=3, seed=5, **row["options"])
    settings = dict(preset("vpt", "common").train) | {
        "epochs": 2, "batch_size": 8, "warmup_epochs": 0.0, "device": "cpu",
        "lr": row["train"]["lr"], "seed": 5,
    }  # fmt: skip
    splits = type(splits)(splits.train, None, splits.test, splits.classes, splits.description)
    fit(model, splits, TrainConfig(**settings), tmp_path / "by hand", progress=False)
    view = transforms(frozen, resize="direct")
    found = evaluate(model, splits.test.with_transform(view), 8)
    assert (row["accuracy"], row["loss"]) == (found.accuracy, found.loss)
    assert (
        row["parameters"]["kept"]
        == model.num_trainable()
        == sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")
        )
    )
    assert row["parameters"]["with_head"] == row["parameters"]["kept"] + 3 * 32 + 3
    again = lion_fast.load_adapter(tmp_path / row["adapter"], frozen)
    assert evaluate(again, splits.test.with_transform(view), 8).loss == pytest.approx(found.loss, abs=1e-6)


@pytest.mark.parametrize("stop_at", [3, 9, 13, 20])
def test_interrupted_and_resumed_is_the_same(root, tmp_path, monkeypatch, stop_at):
    """Ctrl-C in a step of tuning or of the final run: rows stay, and the rest comes out alike."""
    given = {"tasks": ["eurosat", "kitti"], "method": "lion", "options": {"state_dim": 4}}
    run(root, tmp_path / "whole", **given)
    _, whole = read(tmp_path / "whole" / "rows.json")

    step, steps = loop._Run._step, [0]

    def interrupting(self, batches):
        step(self, batches)
        steps[0] += 1
        if steps[0] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "_step", interrupting)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt, match="interrupted") as stopped:
        run(root, out, **given)
    assert "--resume" in stopped.value.hint
    before = read(out / "rows.json")[1] if (out / "rows.json").exists() else []
    # 4, 4 and 6 steps of the three runs of a task: the finished ones have their rows
    assert len(before) == {3: 0, 9: 2, 13: 2, 20: 4}[stop_at]
    reads = Reads(monkeypatch)
    run(root, out, resume=True, **given)
    _, resumed = read(out / "rows.json")
    assert steady(resumed) == steady(whole)
    assert resumed[: len(before)] == before
    assert steps[0] == 28  # no step twice
    assert len(reads.of("test")) == N_TEST * sum(r["phase"] == "test" for r in resumed[len(before) :])


def test_what_has_a_row_is_not_run_again_and_seeds_and_tasks_may_follow(root, tmp_path, monkeypatch):
    run(root, tmp_path, tasks=["kitti"])
    _, first = read(tmp_path / "rows.json")
    reads = Reads(monkeypatch)
    run(root, tmp_path, tasks=["kitti"], resume=True)
    assert reads.decoded == [] and read(tmp_path / "rows.json")[1] == first
    summary = run(root, tmp_path, tasks=["eurosat", "kitti"], seeds=(5, 6), resume=True)
    _, rows = read(tmp_path / "rows.json")
    assert rows[:3] == first and len(rows) == 3 + 4 + 1
    assert [(r["task"], r["phase"], r["seed"]) for r in rows[3:]] == [
        ("eurosat", "tune", 5), ("eurosat", "tune", 5), ("eurosat", "test", 5), ("eurosat", "test", 6),
        ("kitti", "test", 6),
    ]  # fmt: skip
    assert len(reads.of("test")) == 3 * N_TEST
    own = [r["accuracy"] for r in rows if r["task"] == "kitti" and r["phase"] == "test"]
    assert summary["tasks"]["kitti"]["accuracy"] == pytest.approx(statistics.mean(own))
    assert summary["tasks"]["kitti"]["sd"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    assert summary["tasks"]["kitti"]["seeds"] == [5, 6]


def test_rows_of_another_command_are_never_mixed_in(root, tmp_path):
    given = {"tasks": ["kitti"]}
    run(root, tmp_path, **given)
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(OptionError, match="holds rows of an earlier command: go on from them"):
        run(root, tmp_path, **given)
    with pytest.raises(OptionError, match=r'protocol.method is "probe" there and "ssf" here'):
        run(root, tmp_path, method="ssf", resume=True, **given)
    with pytest.raises(OptionError, match=r"protocol.train.epochs is 2 there and 3 here"):
        run(root, tmp_path, train={"epochs": 3}, resume=True, **given)
    with pytest.raises(OptionError, match=r"protocol.grid.lr is \[1e-07, 0.01\] there and \[0.1\] here"):
        run(root, tmp_path, grid={"lr": (0.1,)}, resume=True, **given)
    found = tasks.find_tasks(root, ["kitti"])
    with pytest.raises(OptionError, match=r'backbone.resize is "direct" there and "crop" here'):
        runner.run(found, tiny_backbone(), protocol(), tmp_path, resume=True)
    assert (tmp_path / "rows.json").read_bytes() == before
    run(root, tmp_path, train={"num_workers": 1}, resume=True, **given)  # it decides no number
    (tmp_path / "rows.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="holds no rows of VTAB-1k"):
        run(root, tmp_path, resume=True, **given)


def test_other_images_than_those_of_the_rows(tmp_path):
    write_task(tmp_path / "root" / "kitti", 3)
    run(tmp_path / "root", tmp_path / "out", tasks=["kitti"])
    path = tmp_path / "root" / "kitti" / "test.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="lists other images by now than those of the rows"):
        run(tmp_path / "root", tmp_path / "out", seeds=(5, 6), resume=True)


def test_a_configuration_that_diverges_does_not_end_the_rest(root, tmp_path):
    sgd = {"optimizer": "sgd"}
    summary = run(root, tmp_path, tasks=["kitti"], train=sgd, grid={"lr": (1e38, 1e-1)})
    _, rows = read(tmp_path / "rows.json")
    assert [row["status"] for row in rows] == ["diverged", "done", "done"] and rows[-1]["train"]["lr"] == 0.1
    assert len(summary["diverged"]) == 1 and "kitti, tuning, seed 5: lr 1e+38" in summary["diverged"][0]
    assert "diverged, and so without a result: kitti, tuning" in (tmp_path / "report.md").read_text()
    none = run(root, tmp_path / "b", tasks=["kitti"], train=sgd, grid={"lr": (1e38, 2e38)})
    assert none["n"] == 0 and none["mean"] is None and none["mean_of_groups"] is None
    assert len(read(tmp_path / "b" / "rows.json")[1]) == 2
    assert "mean is over 0 of 19" in (tmp_path / "b" / "report.md").read_text()


def test_outputs_that_are_not_finite_are_a_divergence_too(root, tmp_path, monkeypatch):
    real = runner.evaluate

    def evaluate(model, images, *args, **kwargs):
        found = real(model, images, *args, **kwargs)
        if len(images) == SPLITS["val200"] and next(calls) == 0 or len(images) == N_TEST:
            found = replace(found, loss=float("nan"))
        return found

    calls = itertools.count()
    monkeypatch.setattr(runner, "evaluate", evaluate)
    run(root, tmp_path, tasks=["kitti"])
    _, rows = read(tmp_path / "rows.json")
    assert [row["status"] for row in rows] == ["diverged", "done", "diverged"]
    assert rows[0]["reason"] == "the trained model's outputs are not finite" and "accuracy" not in rows[2]
    assert not list(tmp_path.glob("adapters/*"))
    assert run(root, tmp_path, tasks=["kitti"], resume=True)["n"] == 0


def test_ties_are_broken_by_loss_and_then_by_order(monkeypatch):
    plan = protocol(grid={"lr": (0.1, 0.2, 0.3, 0.4)}).configurations("kitti")
    found = [(0.5, 0.1), (0.75, 0.9), (0.75, 0.8), (0.75, 0.8)]
    rows = {
        one.label(): {"status": "done", "val_accuracy": accuracy, "val_loss": loss}
        for one, (accuracy, loss) in zip(plan, found, strict=True)
    }
    monkeypatch.setattr(runner._Work, "_row", lambda self, task, one: rows[one.label()])
    assert object.__new__(runner._Work)._best("kitti", plan) is plan[2]


def test_one_configuration_is_not_tuned(root, tmp_path):
    run(root, tmp_path, tasks=["kitti"], grid={"lr": (1e-2,)})
    (row,) = read(tmp_path / "rows.json")[1]
    assert (row["phase"], row["tried"], row["val_accuracy"]) == ("test", 1, None)
    assert "(with one, nothing was chosen)" in (tmp_path / "report.md").read_text()


def test_an_unreadable_image_is_skipped_told_and_reported(tmp_path, capsys):
    folder = write_task(tmp_path / "root" / "kitti", 3)
    (folder / "images/test/000004.png").write_bytes(b"no image")
    run(tmp_path / "root", tmp_path / "out")
    row = read(tmp_path / "out" / "rows.json")[1][-1]
    assert (row["skipped"], row["test_images"]) == (1, N_TEST - 1)
    assert "images/test/000004.png" in capsys.readouterr().err
    assert "kitti: 1 unreadable images were skipped" in (tmp_path / "out" / "report.md").read_text()


# ---- numbers


def a_row(task, accuracy, seed=0, parameters=100, head=30):
    return {
        "phase": "test", "task": task, "seed": seed, "status": "done", "accuracy": accuracy,
        "test_images": 100,
        "val_accuracy": 0.5, "parameters": {"kept": parameters, "with_head": parameters + head},
        "varied": {"lr": 0.1},
    }  # fmt: skip


def test_means_by_hand():
    # natural 10, 20, ..., 70: 40; specialized 80, 90, 100, 90: 90; structured 10 and seven times 30: 27.5
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.9, 0.1, *[0.3] * 7]
    rows = [a_row(task, value) for task, value in zip(VTAB, values, strict=True)]
    found = report.summarize(rows)
    groups = {name: group["accuracy"] for name, group in found["groups"].items()}
    assert groups == pytest.approx({"natural": 0.4, "specialized": 0.9, "structured": 0.275})
    assert found["mean_of_groups"] == pytest.approx(1.575 / 3)
    assert found["mean"] == pytest.approx((2.8 + 3.6 + 2.2) / 19) and found["n"] == 19
    assert found["absent"] == [] and (found["parameters"], found["with_head"]) == (100, 130)

    some = report.summarize(
        [r for r in rows if r["task"] in ("cifar", "svhn", "kitti")] + [a_row("kitti", 0.5, 1)]
    )
    assert some["groups"]["natural"] == {"accuracy": pytest.approx(0.35), "tasks": 2, "of": 7}
    assert some["groups"]["specialized"] == {"accuracy": None, "tasks": 0, "of": 4}
    assert some["mean_of_groups"] is None  # a group without a task is not left out of its mean in silence
    assert some["tasks"]["kitti"]["accuracy"] == pytest.approx(0.4)
    assert some["mean"] == pytest.approx((0.1 + 0.6 + 0.4) / 3) and len(some["absent"]) == 16
    line = next(line for line in report.table(some).splitlines() if "specialized" in line)
    assert "(0 of 4)" in line and " - " in line


def test_tasks_and_groups_are_the_benchmarks():
    assert [len(group) for group in tasks.GROUPS.values()] == [7, 4, 8] and set(tasks.SIZES) == set(VTAB)
    assert tasks.group_of("sun397") == "natural"
    assert tasks.differences("dtd", 47, 1000, 1880) == []


# ---- configurations


@pytest.mark.parametrize("method", sorted(available()))
def test_six_configurations_for_every_method(method):
    # LION's default form wants a stronger decay than methods that tune blocks; six are six
    rates, decays = (1e-3, 5e-3, 1e-2), (1e-4, 1e-2)
    if method == "lion":
        rates, decays = (1e-3, 5e-3), (1e-4, 0.1, 0.3)
    for task in VTAB:
        plan = Protocol(method).configurations(task)
        assert [(c.train["lr"], c.train["weight_decay"]) for c in plan] == [
            (lr, decay) for lr in rates for decay in decays
        ]
        assert all(c.train["keep"] == "last" and c.train["augment"] == "none" for c in plan)
        assert len(Protocol(method, "paper").configurations(task)) == (3 if method == "dyt" else 6)


def test_the_paper_preset_by_task():
    (slow, *_), plan = (Protocol("cvpt", "paper").configurations("kitti"),) * 2
    assert slow.options["length"] == 20 and "seed" not in slow.train  # published seeds are not taken over
    assert [(c.train["lr"], c.train["weight_decay"]) for c in plan] == [
        (lr, decay) for lr in (0.00125, 0.005, 0.02) for decay in (0.005, 0.05)
    ]
    assert [c.options["rate"] for c in Protocol("dyt", "paper").configurations("dtd")] == [0.5, 0.7, 0.9]
    assert Protocol("vpt", "paper").configurations("clevr_dist")[0].options["length"] == 200


def test_fixed_settings_leave_the_grid():
    plan = Protocol("vpt", options={"length": 3}, train={"lr": 0.5, "epochs": 7}).configurations("dtd")
    assert [dict(c.varied) for c in plan] == [{"weight_decay": 1e-4}, {"weight_decay": 1e-2}]
    assert all((c.train["lr"], c.train["epochs"], c.options["length"]) == (0.5, 7, 3) for c in plan)
    (only,) = Protocol("vpt", train={"lr": 0.5, "weight_decay": 0.0}).configurations("dtd")
    assert only.label() == "the only configuration"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "vtp"}, "no method named 'vtp'; the methods are"),
        ({"preset": "best"}, "preset must be one of paper, common"),
        ({"grid": {"lenght": (1,)}}, "unknown name in the grid of vpt: 'lenght'; did you mean length"),
        ({"grid": {"keep": ("best",)}}, "protocol decides keep: the last epoch is kept"),
        ({"train": {"early_stop": 3}}, "protocol decides early_stop"),
        ({"grid": {"lr": (0.1, 0.1)}}, "the grid has lr=0.1 twice"),
        ({"grid": {"lr": ()}}, "the grid needs values for lr"),
        ({"grid": {"lr": (0.1,)}, "train": {"lr": 0.2}}, "lr is both fixed and in the grid"),
        ({"options": {"lr": 1}}, "unknown option of vpt 'lr'"),
        ({"seeds": (1, 1)}, "seeds must be different integers"),
    ],
)
def test_wrong_protocols(given, match):
    with pytest.raises(OptionError, match=match):
        Protocol(**{"method": "vpt"} | given)


def test_a_value_out_of_range_is_refused_before_anything_is_run(root, tmp_path):
    with pytest.raises(OptionError, match="lr must be a"):
        run(root, tmp_path / "a", grid={"lr": (0.1, -1)})
    with pytest.raises(OptionError, match="kitti, length=0:"):
        run(root, tmp_path / "b", tasks=["kitti"], method="vpt", grid={"length": (1, 0)})
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


# ---- folders


def test_finding_tasks(root, tmp_path):
    assert list(tasks.find_tasks(root)) == ["cifar", "eurosat", "kitti"]
    assert tasks.find_tasks(root, ["cifar"]) == {"cifar": root / "cifar100"}
    assert tasks.absent({"kitti": 1, **dict.fromkeys(NATURAL)}) == [
        t for t in VTAB if t not in (*NATURAL, "kitti")
    ]
    with pytest.raises(OptionError, match="no VTAB-1k task is named 'kity'; did you mean kitti"):
        tasks.find_tasks(root, ["kity"])
    with pytest.raises(OptionError, match="did you mean oxford_iiit_pet"):
        tasks.find_tasks(root, ["pets"])
    with pytest.raises(DataError, match="does not hold svhn; it holds cifar, eurosat, kitti"):
        tasks.find_tasks(root, ["svhn", "kitti"])
    with pytest.raises(DataError, match="is a single task; give its parent"):
        tasks.find_tasks(root / "kitti")
    with pytest.raises(DataError, match="is no folder"):
        tasks.find_tasks(root / "nowhere")
    with pytest.raises(DataError, match=f"holds none of the 19 .*; {root} does: give that"):
        tasks.find_tasks(root.parent)
    folder = write_task(tmp_path / "kitti", 3)
    (folder / "images/test/000009.png").unlink()
    with pytest.raises(DataError, match="test.txt lists images/test/000009.png, which does not exist"):
        tasks.find_tasks(tmp_path)
    (folder / "val200.txt").unlink()
    with pytest.raises(DataError, match="val200.txt is missing"):
        tasks.find_tasks(tmp_path)


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
    assert "[6/6] kitti, all 24 images, seed 42: lr=" in told.err and "2 of 19 tasks" in told.err
    assert "not run: cifar, caltech101" in told.err
    assert "| **mean** (2 of 19)" in told.out
    header, rows = read(tmp_path / "rows.json")
    assert header["backbone"]["resize"] == "direct" and header["protocol"]["options"] == {"length": 2}
    assert {row["train"]["epochs"] for row in rows} == {1} and {row["seed"] for row in rows} == {42}

    assert main(command(root, tmp_path, *given)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(command(root, tmp_path, *given, "--resume", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["n"] == 2 and summary["tasks"]["kitti"]["accuracy"] == rows[-1]["accuracy"]
    assert read(tmp_path / "rows.json")[1] == rows


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--tasks", "kity"], 2, "did you mean kitti"),
        (["--method", "lio"], 2, "no method named 'lio'"),
        (["--grid", "lenght=1"], 2, "unknown name in the grid of lion: 'lenght'"),
        (["--set", "lenght=1"], 2, "unknown option of lion 'lenght'"),
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


def test_the_command_interrupted(root, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", stop)
    assert main(command(root, tmp_path, "--method", "probe", "--grid", "lr=0.1,0.2")) == 130
    told = capsys.readouterr().err
    assert "interrupted" in told and f"rows so far are in {tmp_path / 'rows.json'}" in told
    monkeypatch.undo()
    assert main(command(root, tmp_path, "--method", "probe", "--grid", "lr=0.1,0.2", "--resume")) == 0
    assert len(read(tmp_path / "rows.json")[1]) == 3 * N_TASKS


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
    ours, clean = (read(folder / "rows.json")[1] for folder in (tmp_path, tmp_path / "clean"))
    assert steady(ours) == steady(clean)
    assert torch.isfinite(torch.tensor(ours[-1]["loss"]))


@pytest.mark.parametrize("part,name,value", [("options", "gamma", 0.5), ("train", "clip_norm", 1.0)])
def test_rows_taken_with_other_defaults_are_refused(root, tmp_path, part, name, value):
    """What no one gave is not in a row; a later version may mean something else by it."""
    given = {"method": "lion", "grid": {"lr": (1e-2,)}, "options": {"state_dim": 4}, "tasks": ["kitti"]}
    run(root, tmp_path, **given)
    path = tmp_path / "rows.json"
    body = json.loads(path.read_text())
    assert body["protocol"]["protocol"]["defaults"][part].get(name) != value
    body["protocol"]["protocol"]["defaults"][part][name] = value
    path.write_text(json.dumps(body))
    with pytest.raises(OptionError, match=f"defaults.{part}.{name} is {value} there"):
        run(root, tmp_path, resume=True, **given)
