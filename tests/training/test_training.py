"""Training: exact steps, exact resume, processes that agree, faults that are told."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import Tensors, random_splits, tiny_backbone, tiny_model, write_images

import lion_fast
from lion_fast.data import load_data, transforms
from lion_fast.errors import CheckpointError, DataError, OptionError
from lion_fast.training import (
    Interrupted,
    PeakMemory,
    Plan,
    TrainConfig,
    TrainingError,
    checkpoints,
    evaluate,
    fit,
    loop,
    predict,
    predict_files,
)

HELPER = Path(__file__).with_name("training_helpers.py")
QUICK = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": "cpu"}


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def train_command(
    data: Path, out: Path, *, method: str = "lion", resume: str = "no", **settings
) -> list[str]:
    told = [f"{key}={value}" for key, value in settings.items()]
    return [
        sys.executable,
        str(HELPER),
        str(data),
        str(out),
        str(out / "result.safetensors"),
        method,
        resume,
        *told,
    ]


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def reference_step_adamw(
    state: dict, grad: torch.Tensor, p: torch.Tensor, lr: float, decay: float
) -> torch.Tensor:
    """AdamW as its paper writes it, in float64."""
    state["t"] += 1
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["v"] = 0.999 * state["v"] + 0.001 * grad**2
    m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    return p * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)


# -- order and seeds


def test_an_epoch_is_a_permutation_and_another_one_each_time():
    plan = Plan(n=23, batch_size=8, epochs=3, seed=5)
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in plan.indices(step)] for e in range(plan.epochs)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(plan.indices(step)) for step in range(3)] == [8, 8, 7]
    assert Plan(n=23, batch_size=8, epochs=3, seed=5).indices(4) == plan.indices(4)
    assert Plan(n=23, batch_size=8, epochs=3, seed=6).indices(4) != plan.indices(4)


@pytest.mark.parametrize("processes,accumulation", [(1, 1), (2, 1), (1, 3), (2, 3), (5, 2)])
def test_shares_make_up_the_step_whoever_handles_them(processes, accumulation):
    whole = Plan(n=23, batch_size=8, epochs=2, seed=0)
    plan = Plan(n=23, batch_size=8, epochs=2, seed=0, processes=processes, accumulation=accumulation)
    for step in range(whole.steps):
        shares = [i for rank in range(processes) for share in plan.shares(step, rank) for i in share]
        assert shares == list(whole.indices(step))


def test_augmentation_is_a_function_of_seed_epoch_and_image(images):
    splits = load_data(images)
    view = splits.train.with_transform(transforms(tiny_model().backbone, True, "crop"))
    items = loop.SeededItems(view, seed=3)
    first = items[(0, 4)][0]
    torch.manual_seed(99)
    random.seed(99)
    before = torch.get_rng_state()
    assert torch.equal(items[(0, 4)][0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(items[(1, 4)][0], first)
    assert not torch.equal(loop.SeededItems(view, seed=4)[(0, 4)][0], first)


def test_workers_change_nothing(images, tmp_path):
    states = []
    for workers in (0, 2):
        model = tiny_model()
        fit(
            model,
            load_data(images),
            TrainConfig(**QUICK, augment="crop", num_workers=workers),
            tmp_path / str(workers),
        )
        states.append(model.adapter_state_dict())
    assert same_bits(*states)


def test_the_callers_generators_come_back(tmp_path):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


# -- the numbers


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_adamw_with_warmup_cosine_smoothing_decay_and_clipping(tmp_path, accumulation):
    """Against the formulas in float64 on a linear head; tolerance: float32 rounding over 12 steps."""
    splits, classes = random_splits(n=21, n_val=0), 3
    model = tiny_model("probe")
    config = TrainConfig(
        epochs=4,
        batch_size=8,
        lr=0.05,
        weight_decay=0.3,
        warmup_epochs=1.5,
        label_smoothing=0.2,
        clip_norm=0.4,
        grad_accumulation=accumulation,
        device="cpu",
    )
    with torch.no_grad():
        features = model.eval().features(splits.train.images).double()
    weight, bias = (p.detach().double().clone() for p in (model.head.weight, model.head.bias))
    states = [{"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in (weight, bias)]
    plan = Plan(n=21, batch_size=8, epochs=4, seed=0)
    warm, total = 4, 12  # round(1.5 * 3) steps of warm-up, an even number rounds to even
    assert (plan.steps, round(1.5 * 3)) == (total, warm)
    for step in range(total):
        rate = 0.05 * (
            (step + 1) / (warm + 1)
            if step < warm
            else 0.5 * (1 + np.cos(np.pi * (step - warm) / (total - warm)))
        )
        chosen = list(plan.indices(step))
        x, y = features[chosen], splits.train.labels[chosen]
        target = torch.nn.functional.one_hot(y, classes).double() * 0.8 + 0.2 / classes
        error = ((x @ weight.T + bias).softmax(1) - target) / len(chosen)
        grads = [error.T @ x, error.sum(0)]
        norm = sum(g.square().sum() for g in grads).sqrt()
        grads = [g * min(1.0, 0.4 / (norm.item() + 1e-6)) for g in grads]
        weight = reference_step_adamw(states[0], grads[0], weight, rate, 0.3)
        bias = reference_step_adamw(states[1], grads[1], bias, rate, 0.0)
    fit(model, splits, config, tmp_path)
    torch.testing.assert_close(model.head.weight.double(), weight, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(model.head.bias.double(), bias, rtol=2e-4, atol=2e-5)


def test_sgd_has_momentum_and_the_head_its_own_rate(tmp_path):
    splits = random_splits(n=16, n_val=0)
    model = tiny_model("lion")
    model.train()
    config = TrainConfig(
        epochs=2,
        batch_size=16,
        optimizer="sgd",
        lr=0.1,
        lr_head=0.02,
        weight_decay=0.0,
        warmup_epochs=0,
        device="cpu",
    )
    reference = tiny_model("lion").train()
    momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters() if p.requires_grad}
    for step in range(2):
        chosen = list(Plan(n=16, batch_size=16, epochs=2, seed=0).indices(step))
        loss = torch.nn.functional.cross_entropy(
            reference(splits.train.images[chosen]), splits.train.labels[chosen]
        )
        names = list(momentum)
        grads = torch.autograd.grad(loss, [dict(reference.named_parameters())[name] for name in names])
        with torch.no_grad():
            for name, grad in zip(names, grads, strict=True):
                momentum[name] = 0.9 * momentum[name] + grad
                rate = (0.02 if name.startswith("head.") else 0.1) * (1.0, 0.5)[step]
                dict(reference.named_parameters())[name] -= rate * momentum[name]
    fit(model, splits, config, tmp_path)
    for name, value in model.adapter_state_dict().items():
        torch.testing.assert_close(value, reference.adapter_state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["lion", "vpt"])
def test_accumulation_gives_the_same_adapter(tmp_path, method):
    """The same sums in another order: float32 rounding, through Adam's division, over six steps."""
    states = []
    for parts in (1, 3):
        model = tiny_model(method)
        fit(model, random_splits(), TrainConfig(**QUICK, grad_accumulation=parts), tmp_path / str(parts))
        states.append(model.adapter_state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-3, atol=1e-4)
    assert not same_bits(tiny_model(method).adapter_state_dict(), states[0])


def test_the_frozen_backbone_keeps_every_bit(tmp_path):
    model = tiny_model()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    fit(model, random_splits(), TrainConfig(**QUICK), tmp_path)
    assert same_bits(before, model.backbone.state_dict())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_cached_features_train_the_same_probe(tmp_path):
    """Features in other batches differ by rounding."""
    states, cached = [], []
    for cache in (True, False):
        model = tiny_model("probe")
        result = fit(
            model, random_splits(), TrainConfig(**QUICK, cache_features=cache), tmp_path / str(cache)
        )
        states.append(model.adapter_state_dict())
        cached.append(result.cached_features)
    assert cached == [True, False]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-5)


def test_features_are_not_cached_under_augmentation_or_with_a_method(tmp_path):
    augmented = TrainConfig(**QUICK, augment="flip")
    assert not loop.features_are_constant(tiny_model("probe"), augmented)
    assert not loop.features_are_constant(tiny_model("lion"), TrainConfig(**QUICK))
    assert loop.features_are_constant(tiny_model("probe"), TrainConfig(**QUICK))


def test_bf16_trains(tmp_path):
    result = fit(tiny_model(), random_splits(), TrainConfig(**QUICK, mixed_precision="bf16"), tmp_path)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_deterministic_mode_is_only_for_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    plain = loop._Run._step

    def step(self, batches):
        seen.append(torch.are_deterministic_algorithms_enabled())
        plain(self, batches)

    monkeypatch.setattr(loop._Run, "_step", step)
    for asked in (True, False):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK, deterministic=asked), tmp_path / str(asked))
    assert seen == [True] * 6 + [False] * 6 and not torch.are_deterministic_algorithms_enabled()


def test_fp16_on_a_cpu_is_refused_and_the_next_run_works(tmp_path):
    with pytest.raises(OptionError, match="mixed_precision='fp16' cannot run here"):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK, mixed_precision="fp16"), tmp_path)
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path)


def test_early_stopping_counts_from_the_best_epoch_and_keeps_it(tmp_path):
    splits = random_splits()
    splits.val.labels = (splits.val.labels + 1) % 3  # the better it learns, the worse it does here
    model = tiny_model()
    result = fit(model, splits, TrainConfig(**QUICK | {"epochs": 9}, early_stop=2, monitor="loss"), tmp_path)
    losses = [row["val_loss"] for row in result.history]
    assert result.stopped_early and result.epochs == len(losses) == result.best_epoch + 2 < 9
    assert min(losses) == losses[result.best_epoch - 1]
    assert evaluate(model, splits.val).loss == pytest.approx(losses[result.best_epoch - 1], rel=1e-5)


def test_keep_last_keeps_the_last(tmp_path):
    splits = random_splits()
    splits.val.labels = (splits.val.labels + 1) % 3
    model = tiny_model()
    result = fit(model, splits, TrainConfig(**QUICK | {"epochs": 4}, keep="last", monitor="loss"), tmp_path)
    assert result.best_epoch == 4
    assert evaluate(model, splits.val).loss == pytest.approx(result.history[-1]["val_loss"], rel=1e-5)


def test_logs_have_a_row_per_epoch_and_the_solver_in_them(tmp_path):
    result = fit(tiny_model(), random_splits(), TrainConfig(**QUICK, log_every=2), tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_loss"]) == result.history[1]["val_loss"]
    assert float(rows[1]["input_iterations"]) >= 1 and 0 <= float(rows[1]["output_residual"]) < 1
    with open(tmp_path / "steps.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "3", "4", "6"]


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK, tensorboard=True), tmp_path)
    assert any((tmp_path / "tensorboard").glob("events.*"))


# -- evaluation


def test_metrics_against_counting_by_hand():
    """Logits chosen so that every number can be counted."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    guesses = [0, 0, 0, 1, 1, 2, 0]
    logits = torch.nn.functional.one_hot(torch.tensor(guesses), 4).float() * 2

    class Given(torch.nn.Module):
        num_classes = 4

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    metrics = evaluate(Given(), Tensors(logits, labels), batch_size=3)
    assert metrics.accuracy == 4 / 7
    assert metrics.recall == [3 / 4, 1 / 2, None, 0.0]
    assert metrics.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    right, wrong = -np.log(np.e**2 / (np.e**2 + 3)), -np.log(1 / (np.e**2 + 3))
    assert metrics.loss == pytest.approx((4 * right + 3 * wrong) / 7, rel=1e-6)
    counted = Counter(zip(labels.tolist(), guesses, strict=True))
    assert all(metrics.confusion[i][j] == counted[(i, j)] for i in range(4) for j in range(4))
    assert (metrics.n, metrics.counts) == (7, [4, 2, 0, 1])


def test_evaluation_refuses_labels_out_of_range_and_nothing():
    splits = random_splits()
    splits.val.labels[2] = 3
    with pytest.raises(DataError, match="label 3 is out of range: the model has 3 classes, 0 to 2"):
        evaluate(tiny_model(), splits.val)
    with pytest.raises(DataError, match="no images"):
        evaluate(tiny_model(), Tensors(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.long)))


def test_image_sets_without_a_transform_get_the_backbones(images):
    model, splits = tiny_model(), load_data(images)
    view = transforms(model.backbone)
    assert splits.test.transform is None
    given, own = evaluate(model, splits.test.with_transform(view)), evaluate(model, splits.test)
    assert own.confusion == given.confusion and own.loss == given.loss
    assert torch.equal(predict(model, splits.test), predict(model, splits.test.with_transform(view)))
    mirrored = splits.test.with_transform(lambda image: view(image).flip(0))
    assert evaluate(model, mirrored).loss != own.loss, "a transform that is there is kept"


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 2.5}, {"num_workers": -1}])
def test_loading_options_are_checked(wrong, images):
    name = next(iter(wrong))
    for call, items in (
        (evaluate, random_splits().val),
        (predict, torch.rand(2, 3, 32, 32)),
        (predict_files, []),
    ):
        with pytest.raises(OptionError, match=name):
            call(tiny_model(), items, **wrong)


def test_peak_memory_sees_an_allocation_that_is_gone_again():
    with PeakMemory("cpu") as memory:
        x = torch.ones(16 * 2**20)
        del x
    assert 60e6 < memory.bytes < 90e6
    assert "resident memory" in memory.how


# -- interrupt and resume


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(train_command(images, out, augment="crop", checkpoint_every=3, log_every=1))
    return out


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until the log says that a step is done."""
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        try:
            rows = (out / "steps.csv").read_text().splitlines()
        except FileNotFoundError:
            rows = []
        if len(rows) > 1 and rows[-1].split(",")[0].isdigit() and int(rows[-1].split(",")[0]) >= step:
            return
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    raise AssertionError("the training never got there")


def test_killed_at_a_random_step_and_resumed_it_ends_with_the_same_bits(images, uninterrupted, tmp_path):
    step = random.SystemRandom().randint(4, 16)
    settings = {"augment": "crop", "checkpoint_every": 3, "log_every": 1}
    with subprocess.Popen(
        train_command(images, tmp_path, **settings), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(process, tmp_path, step)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "result.safetensors").exists()
    run(train_command(images, tmp_path, resume="latest", **settings))
    results = [load_file(folder / "result.safetensors") for folder in (tmp_path, uninterrupted)]
    assert same_bits(*results), f"killed after step {step}"
    rows = [list(csv.DictReader(open(folder / "metrics.csv"))) for folder in (tmp_path, uninterrupted)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours | {"seconds": ""} == theirs | {"seconds": ""}
    logged = [int(row["step"]) for row in csv.DictReader(open(tmp_path / "steps.csv"))]
    assert logged == list(range(1, logged[-1] + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_at_that_step(images, uninterrupted, tmp_path, number):
    settings = {"augment": "crop", "log_every": 1}
    with subprocess.Popen(
        train_command(images, tmp_path, **settings), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(process, tmp_path, 7)
        process.send_signal(number)
        told = process.communicate(timeout=180)[1]
    assert process.returncode != 0 and "Interrupted" in told and "resume to continue" in told
    newest = checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name in told
    run(train_command(images, tmp_path, resume="latest", **settings))
    assert same_bits(*(load_file(folder / "result.safetensors") for folder in (tmp_path, uninterrupted)))


class StopAt:
    """Stands for the signals' record: asks to stop from the n-th question on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("method,config", [("lion", {}), ("vpt", {"optimizer": "sgd"}), ("probe", {})])
def test_interrupted_at_any_question_even_while_validating(tmp_path, monkeypatch, method, config):
    settings = TrainConfig(**QUICK | config)
    whole = tiny_model(method)
    expected = fit(whole, random_splits(), settings, tmp_path / "whole").history
    for after in range(0, 8):
        model, out = tiny_model(method), tmp_path / str(after)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_Interruption", lambda after=after: StopAt(after))
            try:
                fit(model, random_splits(), settings, out)
            except Interrupted as error:
                assert error.checkpoint.is_dir()
            except KeyboardInterrupt:
                continue  # while features are computed there is nothing to keep yet
        again = tiny_model(method, seed=7)  # whatever it starts with, the checkpoint decides
        history = fit(again, random_splits(), settings, out, resume=True).history
        assert same_bits(again.adapter_state_dict(), whole.adapter_state_dict())
        for ours, theirs in zip(history, expected, strict=True):
            for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "step"):
                assert ours[name] == theirs[name]


def test_a_finished_run_resumes_to_itself(tmp_path):
    model = tiny_model()
    fit(model, random_splits(), TrainConfig(**QUICK), tmp_path)
    again = tiny_model()
    result = fit(again, random_splits(), TrainConfig(**QUICK), tmp_path, resume=True)
    assert result.steps == 6 and same_bits(again.adapter_state_dict(), model.adapter_state_dict())


# -- checkpoints


def trained(tmp_path: Path, **more) -> list[Path]:
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK | {"epochs": 4} | more), tmp_path)
    return checkpoints.list_checkpoints(tmp_path / "checkpoints")


def test_two_checkpoints_are_kept_and_nothing_else(tmp_path):
    found = trained(tmp_path)
    assert [path.name for path in found] == ["step-00000009", "step-00000012"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [path.name for path in found]
    for path in found:
        assert sorted(os.listdir(path)) == ["manifest.json", "state.json", "tensors.safetensors"]


def test_checkpoints_by_steps_hold_at_the_end_of_an_epoch_too(tmp_path):
    config = TrainConfig(**QUICK | {"epochs": 4}, checkpoint_epochs=0, checkpoint_every=3)
    fit(tiny_model("probe"), random_splits(), config, tmp_path)  # an epoch has 3 steps
    found = checkpoints.list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, fault):
    before, last = trained(tmp_path)
    tensors, manifest = last / "tensors.safetensors", last / "manifest.json"
    data = tensors.read_bytes()
    if fault == "truncated":
        tensors.write_bytes(data[:-100])
    elif fault == "flipped":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "missing":
        tensors.unlink()
    elif fault == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    config, splits = TrainConfig(**QUICK | {"epochs": 4}), random_splits()
    with pytest.raises(CheckpointError, match=f"damaged.*resume from {before.name}"):
        fit(tiny_model(), splits, config, tmp_path, resume=True)
    for which in ("previous", before.name):
        assert fit(tiny_model(), splits, config, tmp_path, resume=which).steps == 12


def test_damage_with_nothing_before_it_says_so(tmp_path):
    before, last = trained(tmp_path)
    for path in (before, last):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no whole one before it"):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK | {"epochs": 4}), tmp_path, resume=True)


@pytest.mark.parametrize(
    "model,config,told",
    [
        ({"method": "vpt"}, {}, 'method was "lion", now "vpt"'),
        ({"state_dim": 9}, {}, "options.state_dim was 8, now 9"),
        ({}, {"lr": 0.5}, "config.lr was 0.01, now 0.5"),
        ({}, {"epochs": 5}, "config.epochs was 4, now 5"),
    ],
)
def test_a_foreign_checkpoint_is_refused_naming_the_difference(tmp_path, model, config, told):
    trained(tmp_path)
    with pytest.raises(CheckpointError, match="from another run") as raised:
        fit(
            tiny_model(**model),
            random_splits(),
            TrainConfig(**QUICK | {"epochs": 4} | config),
            tmp_path,
            resume=True,
        )
    assert told in str(raised.value)


def test_other_data_and_another_backbone_are_foreign_too(tmp_path):
    trained(tmp_path)
    config = TrainConfig(**QUICK | {"epochs": 4})
    splits = random_splits()
    splits.train.labels = splits.train.labels.flip(0)
    with pytest.raises(CheckpointError, match="data.train.sha256 was"):
        fit(tiny_model(), splits, config, tmp_path, resume=True)
    options = {"form": "residual", "state_dim": 8}
    other = lion_fast.create(tiny_backbone(seed=1), "lion", num_classes=3, seed=0, **options)
    with pytest.raises(CheckpointError, match="backbone.sha256 was"):
        fit(other, random_splits(), config, tmp_path, resume=True)


def test_speed_options_may_differ_on_resume(tmp_path):
    trained(tmp_path)
    config = TrainConfig(**QUICK | {"epochs": 4}, num_workers=1, log_every=3, checkpoint_every=2)
    assert fit(tiny_model(), random_splits(), config, tmp_path, resume=True).steps == 12


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path):
    trained(tmp_path)
    config = TrainConfig(**QUICK)
    with pytest.raises(CheckpointError, match="earlier run, up to step-00000012"):
        fit(tiny_model(), random_splits(), config, tmp_path)
    fit(tiny_model(), random_splits(), config, tmp_path, overwrite=True)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]


def test_resume_names_what_is_there(tmp_path):
    config = TrainConfig(**QUICK)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        fit(tiny_model(), random_splits(), config, tmp_path, resume=True)
    fit(tiny_model(), random_splits(), config, tmp_path)
    with pytest.raises(CheckpointError, match="latest, previous, step-00000003, step-00000006"):
        fit(tiny_model(), random_splits(), config, tmp_path, resume="step-00000005")


def test_no_checkpoint_holds_a_pickle(tmp_path):
    for path in trained(tmp_path):
        json.loads((path / "state.json").read_text())
        names = load_file(path / "tensors.safetensors")
        assert {name.split("/")[0] for name in names} == {"model", "best", "optimizer"}


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(3)}
    first = checkpoints.write_checkpoint(tmp_path, 1, tensors, {})

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write_synced", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left"):
        checkpoints.write_checkpoint(tmp_path, 2, tensors, {})
    assert os.listdir(tmp_path) == [first.name] and checkpoints.check_whole(first) is None


# -- faults told before and during training


def test_an_unwritable_output_is_found_before_training(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    model = tiny_model()
    monkeypatch.setattr(loop._Run, "_step", lambda *args: pytest.fail("it has started to train"))
    with pytest.raises(CheckpointError, match="cannot write to the output folder"):
        fit(model, random_splits(), TrainConfig(**QUICK), blocked / "out")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="is full: 0.0 MB free"):
        fit(model, random_splits(), TrainConfig(**QUICK), tmp_path / "out")


def test_a_disk_that_takes_less_than_it_says_is_found_before_training(images, tmp_path):
    """A limit on file size stands for a quota: the operating system refuses the write itself."""
    pytest.importorskip("resource")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        f"sys.argv = {train_command(images, tmp_path / 'out')[1:]!r};"
        f"sys.path.insert(0, {str(HELPER.parent)!r});"
        "import training_helpers; training_helpers.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "CheckpointError: cannot write to the output folder" in done.stderr
    assert not (tmp_path / "out" / "steps.csv").exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    splits = random_splits()
    model = tiny_model()
    bad = Plan(n=23, batch_size=8, epochs=2, seed=0).indices(4)[0]
    original = splits.train.images[bad].clone()
    config = TrainConfig(**QUICK, checkpoint_every=1)
    steps = []
    plain = loop._Run._step

    def step(self, batches):
        if self.at.step == 4:
            splits.train.images[bad] = torch.inf
        steps.append(self.at.step)
        plain(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_step", step)
        with pytest.raises(
            TrainingError, match="the loss is nan at step 5; the last good checkpoint is .*00000004"
        ):
            fit(model, splits, config, tmp_path)
    assert steps[-1] == 4
    newest = checkpoints.read_checkpoint(checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1])
    assert all(torch.isfinite(t).all() for t in newest.tensors.values())
    splits.train.images[bad] = original
    assert fit(tiny_model(), splits, config, tmp_path, resume=True).steps == 6


def test_a_rate_that_explodes_is_told(tmp_path):
    with pytest.raises(TrainingError, match="Try a lower lr"):
        fit(tiny_model("vpt"), random_splits(), TrainConfig(**QUICK | {"lr": 1e38, "epochs": 3}), tmp_path)


def test_data_that_cannot_be_learnt_is_refused(tmp_path):
    config = TrainConfig(**QUICK)
    splits = random_splits()
    splits.train.labels[3] = 5
    with pytest.raises(DataError, match="label 5 is out of range"):
        fit(tiny_model(), splits, config, tmp_path)
    splits = random_splits()
    splits.train.labels[:] = 1
    with pytest.raises(DataError, match="one class"):
        fit(tiny_model(), splits, config, tmp_path)
    splits.train = Tensors(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.long))
    with pytest.raises(DataError, match="no training images"):
        fit(tiny_model(), splits, config, tmp_path)
    with pytest.raises(OptionError, match="early_stop needs validation images"):
        fit(tiny_model(), random_splits(n_val=0), TrainConfig(**QUICK, early_stop=3), tmp_path)


@pytest.mark.parametrize(
    "options,told",
    [
        ({"lr": -1.0}, "lr must be a finite number above 0; got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1; got 0"),
        ({"epochs": True}, "epochs must be a whole"),
        ({"batch_size": 1.5}, "batch_size must be a whole"),
        ({"label_smoothing": 1.0}, "below 1; got 1.0"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd; got 'adam'"),
        ({"deterministic": 1}, "deterministic must be true or false"),
        ({"learning_rate": 0.1}, "unknown option 'learning_rate'.*Valid: epochs, batch_size"),
    ],
)
def test_wrong_options_say_what_is_valid(options, told):
    with pytest.raises(OptionError, match=told):
        TrainConfig.from_dict(options)


# -- several processes


@pytest.mark.parametrize("method,precision", [("lion", "no"), ("probe", "bf16"), ("states", "bf16")])
def test_two_processes_give_the_adapter_of_one(images, tmp_path, method, precision):
    """Gradients are summed in another order, so float32 rounding; Adam divides by their size, hence the
    tolerance of 1e-3 where an update can be as large as the rate, 1e-2, at each of 20 steps. Rows computed
    once are the same in both, and what reads them computes in float32."""
    alone, together = tmp_path / "one", tmp_path / "two"
    command = train_command(images, alone, method=method, mixed_precision=precision)
    run(command)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = train_command(images, together, method=method, mixed_precision=precision)
    run([command[0], *launch, *command[1:]])
    one, two = (load_file(folder / "result.safetensors") for folder in (alone, together))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3 if method == "lion" else 1e-5)
    rows = [list(csv.DictReader(open(folder / "metrics.csv"))) for folder in (alone, together)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["val_accuracy"] == theirs["val_accuracy"]
        assert float(ours["val_loss"]) == pytest.approx(float(theirs["val_loss"]), rel=1e-3)
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-3)


def test_class_names_of_the_data_reach_the_model(tmp_path):
    splits = random_splits()
    splits.classes = ["ant", "bee", "cat"]
    model = tiny_model("probe")
    fit(model, splits, TrainConfig(**QUICK), tmp_path / "a")
    assert model.classes == ["ant", "bee", "cat"]
    other = tiny_model("probe")
    other.classes = ["x", "y", "z"]
    with pytest.raises(DataError, match="the model's classes are x, y, z, the data's ant, bee, cat"):
        fit(other, splits, TrainConfig(**QUICK), tmp_path / "b")
    with pytest.raises(DataError, match="3 classes and the model 5 outputs; .*num_classes=3"):
        fit(tiny_model("probe", num_classes=5), splits, TrainConfig(**QUICK), tmp_path / "c")


@pytest.mark.parametrize("progress, lines", [(None, 2), (False, 0)])
def test_without_a_terminal_every_epoch_has_a_line(tmp_path, capsys, progress, lines):
    config = TrainConfig(**{**QUICK, "epochs": 2})
    fit(tiny_model("probe"), random_splits(), config, tmp_path, progress=progress)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(told) == lines and all("of 2: loss" in line and "val accuracy" in line for line in told)
