"""Checkpoints: exact resume after any stop, whole files or none, refusals that name what differs."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_helpers import needs_timm
from safetensors.torch import load_file
from training_helpers import (
    QUICK,
    random_splits,
    read_csv,
    run,
    same_bits,
    start,
    tiny_backbone,
    tiny_model,
    wait_for_step,
)  # fmt: skip

import lion_fast
from lion_fast.backbones import Backbone
from lion_fast.errors import CheckpointError, OptionError
from lion_fast.training import Interrupted, TrainConfig, checkpoints, fit

FOUR = TrainConfig(**QUICK | {"epochs": 4})
WRITTEN = {"augment": "crop", "checkpoint_every": 3, "log_every": 1}


def names(folder):
    return [path.name for path in checkpoints.list_checkpoints(folder / "checkpoints")]


# -- interrupt and resume


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(images, out, **WRITTEN)
    return out


def test_killed_at_a_random_step_and_resumed_it_ends_with_the_same_bits(images, uninterrupted, tmp_path):
    step = random.SystemRandom().randint(4, 16)
    with start(images, tmp_path, **WRITTEN) as process:
        wait_for_step(process, tmp_path, step)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(OptionError, match="another run is writing"):
            fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path, overwrite=True)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "result.safetensors").exists()
    run(images, tmp_path, resume="latest", **WRITTEN)
    results = [load_file(folder / "result.safetensors") for folder in (tmp_path, uninterrupted)]
    assert same_bits(*results), f"killed after step {step}"
    rows = [read_csv(folder / "metrics.csv") for folder in (tmp_path, uninterrupted)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours | {"seconds": ""} == theirs | {"seconds": ""}
    logged = [int(row["step"]) for row in read_csv(tmp_path / "steps.csv")]
    assert logged == list(range(1, logged[-1] + 1))


def test_a_termination_signal_writes_a_checkpoint_at_that_step(images, uninterrupted, tmp_path):
    settings = {"augment": "crop", "log_every": 1}
    with start(images, tmp_path, **settings) as process:
        wait_for_step(process, tmp_path, 7)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=180)[1]
    assert process.returncode != 0 and "Interrupted" in told and names(tmp_path)[-1] in told
    run(images, tmp_path, resume="latest", **settings)
    assert same_bits(*(load_file(folder / "result.safetensors") for folder in (tmp_path, uninterrupted)))


@pytest.mark.parametrize("method,config", [("lion", {}), ("vpt", {"optimizer": "sgd"}), ("probe", {})])
def test_interrupted_in_any_batch_even_while_validating(tmp_path, method, config):
    """Two epochs of three steps and a batch of validation."""
    settings = TrainConfig(**QUICK | config)
    whole = tiny_model(method)
    expected = fit(whole, random_splits(), settings, tmp_path / "whole").history
    for last in range(1, 9):
        model, out, left = tiny_model(method), tmp_path / str(last), iter(range(last))

        def stop(*_, left=left, last=last):
            if next(left, None) == last - 1:
                os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[last % 2])

        model.head.register_forward_hook(stop)
        with pytest.raises(Interrupted) as stopped:
            fit(model, random_splits(), settings, out)
        assert stopped.value.checkpoint.is_dir()
        again = tiny_model(method, seed=7)  # whatever it starts with, the checkpoint decides
        history = fit(again, random_splits(), settings, out, resume=True).history
        assert same_bits(again.adapter_state_dict(), whole.adapter_state_dict())
        for ours, theirs in zip(history, expected, strict=True):
            assert ours | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.mark.parametrize("step", [pytest.param(9, marks=needs_timm("1.0.23")), 12])
def test_checkpoints_of_format_1_still_resume(tmp_path, monkeypatch, step):
    """Files of a finished pruned run from before; from step 9 the last epoch is trained again.

    Of another timm the same seed draws other frozen weights.
    """
    shutil.copytree(Path(__file__).with_name("format_1"), tmp_path / "checkpoints")
    before = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "step-00000012")
    model = tiny_model(state_dim=2)
    # another processor may draw the frozen weights with other last bits
    monkeypatch.setattr(Backbone, "weights_sha256", before.state["fingerprint"]["backbone"]["sha256"])
    config = TrainConfig(**QUICK | {"epochs": 4}, prune=0.5)
    result = fit(model, random_splits(), config, tmp_path, resume=f"step-{step:08d}")
    state = model.adapter_state_dict()
    assert result.best_epoch == 4 and result.pruning["kept_share"] == pytest.approx(0.5, abs=0.01)
    assert {f"best/{name}" for name in state} == {name for name in before.tensors if name.startswith("best/")}
    tolerance = 0.0 if step == 12 else 1e-4
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, before.tensors[f"best/{name}"], rtol=tolerance, atol=tolerance)
    history = before.state["progress"]["history"]
    assert result.history[:3] == history[:3]
    assert result.history[3]["val_loss"] == pytest.approx(history[3]["val_loss"], rel=tolerance)


def test_a_run_of_a_border_that_was_held_normalised_is_not_gone_on_with(tmp_path):
    """Its moments are of other numbers; its adapter is still read."""
    shape = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "img_size": 32}
    frozen = lion_fast.load_backbone("resnet18", pretrained=False, **shape)
    model = lion_fast.create(frozen, "vpt", num_classes=3, length=1)
    fit(model, random_splits(), TrainConfig(**QUICK), tmp_path)
    folder = tmp_path / "checkpoints"
    found = checkpoints.read_checkpoint(checkpoints.list_checkpoints(folder)[-2])
    tensors = {k.replace("row_pixels", "rows").replace("column_pixels", "columns"): v
               for k, v in found.tensors.items()}  # fmt: skip
    shutil.rmtree(folder)
    written = checkpoints.write_checkpoint(folder, 3, tensors, found.state)
    with pytest.raises(CheckpointError, match="border.*older lion-fast"):
        fit(model, random_splits(), TrainConfig(**QUICK), tmp_path, resume=written.name)


# -- files


def trained(tmp_path: Path) -> list[Path]:
    fit(tiny_model(), random_splits(), FOUR, tmp_path)
    return checkpoints.list_checkpoints(tmp_path / "checkpoints")


def test_two_checkpoints_are_kept_without_a_pickle_and_nothing_else(tmp_path):
    found = trained(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000009", "step-00000012"]
    for path in found:
        assert sorted(os.listdir(path)) == ["manifest.json", "state.json", "tensors.safetensors"]
        json.loads((path / "state.json").read_text())
        parts = {name.split("/")[0] for name in load_file(path / "tensors.safetensors")}
        assert parts == {"model", "best", "optimizer"}


def test_checkpoints_by_steps_hold_at_the_end_of_an_epoch_too(tmp_path):
    config = replace(FOUR, checkpoint_epochs=0, checkpoint_every=3)  # an epoch has 3 steps
    fit(tiny_model("probe"), random_splits(), config, tmp_path)
    assert names(tmp_path) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, fault):
    before, last = trained(tmp_path)
    tensors, manifest = last / "tensors.safetensors", last / "manifest.json"
    data = tensors.read_bytes()
    if fault == "truncated":
        tensors.write_bytes(data[:-100])
    elif fault == "flipped":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        (tensors if fault == "missing" else manifest).unlink()
    with pytest.raises(CheckpointError, match=f"damaged.*{before.name}"):
        fit(tiny_model(), random_splits(), FOUR, tmp_path, resume=True)
    for which in ("previous", before.name):
        assert fit(tiny_model(), random_splits(), FOUR, tmp_path, resume=which).steps == 12


def test_damage_with_nothing_before_it_says_so(tmp_path):
    for path in trained(tmp_path):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no whole one"):
        fit(tiny_model(), random_splits(), FOUR, tmp_path, resume=True)


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(3)}
    first = checkpoints.write_checkpoint(tmp_path, 1, tensors, {})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space"):
        checkpoints.write_checkpoint(tmp_path, 2, tensors, {})
    assert os.listdir(tmp_path) == [first.name] and checkpoints.check_whole(first) is None


# -- refusals


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("earlier")
    trained(out)
    return out


def other_labels():
    splits = random_splits()
    splits.train.labels = splits.train.labels.flip(0)
    return splits


def other_backbone():
    backbone = tiny_backbone(seed=1)
    return lion_fast.create(backbone, num_classes=3, seed=0, form="residual", state_dim=8)


@pytest.mark.parametrize(
    "model,splits,config,told",
    [
        (lambda: tiny_model("vpt"), random_splits, {}, 'method was "lion", now "vpt"'),
        (lambda: tiny_model(state_dim=9), random_splits, {}, "options.state_dim was 8, now 9"),
        (tiny_model, random_splits, {"lr": 0.5}, "config.lr was 0.01, now 0.5"),
        (tiny_model, random_splits, {"epochs": 5}, "config.epochs was 4, now 5"),
        (tiny_model, other_labels, {}, "data.train.sha256 was"),
        (other_backbone, random_splits, {}, "backbone.sha256 was"),
    ],
)
def test_a_foreign_checkpoint_is_refused_naming_the_difference(earlier, model, splits, config, told):
    with pytest.raises(CheckpointError, match=told):
        fit(model(), splits(), replace(FOUR, **config), earlier, resume=True)


def test_a_finished_run_resumes_to_itself_and_speed_options_may_differ(earlier):
    speed = {"num_workers": 1, "log_every": 3, "checkpoint_every": 2}
    found = []
    for more in ({}, speed):
        model = tiny_model()
        result = fit(model, random_splits(), replace(FOUR, **more), earlier, resume=True)
        assert result.steps == 12 and result.best_epoch > 0
        found.append(model.adapter_state_dict())
    best = load_file(checkpoints.list_checkpoints(earlier / "checkpoints")[-1] / "tensors.safetensors")
    for state in found:
        assert same_bits(state, {name: best[f"best/{name}"] for name in state})


def test_an_earlier_run_is_not_overwritten_by_accident_and_resume_names_what_is_there(tmp_path):
    config = TrainConfig(**QUICK)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        fit(tiny_model(), random_splits(), config, tmp_path, resume=True)
    trained(tmp_path)
    with pytest.raises(CheckpointError, match="earlier run, up to step-00000012"):
        fit(tiny_model(), random_splits(), config, tmp_path)
    fit(tiny_model(), random_splits(), config, tmp_path, overwrite=True)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]
    with pytest.raises(CheckpointError, match="latest, previous, step-00000003, step-00000006"):
        fit(tiny_model(), random_splits(), config, tmp_path, resume="step-00000005")
