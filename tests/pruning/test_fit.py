"""Pruning inside `fit` and on the command line."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from training_helpers import TINY, random_splits, same_bits, tiny_model, write_images

from lion_fast.adapters import load_adapter, save_adapter
from lion_fast.commands.main import main
from lion_fast.errors import OptionError
from lion_fast.pruning import kept_shares
from lion_fast.pruning.masks import find_layers, find_matrices
from lion_fast.training import TrainConfig, fit


def config(**options):
    values = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "device": "cpu", "prune": 0.4, "checkpoint_every": 1}
    return TrainConfig(**values | options)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_too_short_for_the_cut_is_cut_at_its_end(tmp_path, epochs):
    """The best epoch was dense: what is given back is what the report says, pruned."""
    model = tiny_model()
    result = fit(model, random_splits(), config(epochs=epochs, batch_size=32), tmp_path, progress=False)
    assert result.pruning["kept_share"] == pytest.approx(0.4, abs=1e-3)
    assert kept_shares(model) == {name: m["share"] for name, m in result.pruning["matrices"].items()}
    assert model.num_trainable(kept=True) == result.pruning["parameters"]["kept"] < model.num_trainable()


@pytest.mark.parametrize("form", ["residual", "states"])
@pytest.mark.parametrize("granularity", ["element", "unit"])
def test_fit_prunes_and_reports(tmp_path, granularity, form):
    model = tiny_model(form=form, reading="fixed")
    result = fit(model, random_splits(), config(prune_granularity=granularity), tmp_path, progress=False)
    report = result.pruning
    assert report["phase"] == "hard" and report["step"] == result.steps == 12
    assert json.loads(json.dumps(result.to_dict()))["pruning"] == report
    # The cut is at three quarters: only the last epoch ends with pruned weights.
    assert result.best_epoch == 4
    kept = {}
    for m in find_matrices(find_layers(model)):
        mask = m.module.masks()[m.name]
        assert (m.parameter[~mask] == 0).all()
        kept[m.full_name] = int(mask.sum())
    assert kept == {name: m["kept"] for name, m in report["matrices"].items()}
    total = sum(m["total"] for m in report["matrices"].values())
    assert kept_shares(model) == {name: m["share"] for name, m in report["matrices"].items()}
    if form == "states":
        assert total == 8 * 32 + 8 * 8
    if granularity == "element":
        assert sum(kept.values()) == -(-4 * total // 10)
    elif form == "states":
        assert kept == {"output_end.layer.A": 4 * 32, "output_end.layer.W": 4 * 4}
    parameters = report["parameters"]
    assert parameters["dense"] == model.num_trainable()
    assert (
        parameters["kept"]
        == model.num_trainable(kept=True)
        == parameters["dense"] - total + sum(kept.values())
    )
    assert model.num_trainable(True, kept=True) == parameters["kept_with_head"]
    save_adapter(model, tmp_path / "adapter")
    again, x = load_adapter(tmp_path / "adapter", backbone=model.backbone), torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_the_scope_of_the_ranking_is_the_settings(tmp_path):
    shares = {}
    for scope in ("global", "matrix"):
        model = tiny_model()
        fit(model, random_splits(), config(prune_scope=scope), tmp_path / scope, progress=False)
        shares[scope] = list(kept_shares(model).values())
    assert shares["matrix"] == pytest.approx([0.4] * 6, abs=0.01)
    assert max(shares["global"]) - min(shares["global"]) > 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_pruned_run_resumes_with_the_same_bits(tmp_path, step, optimizer, monkeypatch):
    from lion_fast.training import checkpoints

    monkeypatch.setattr(checkpoints, "KEPT", 99)
    options = config(optimizer=optimizer)
    whole = tiny_model()
    first = fit(whole, random_splits(), options, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    resumed = tiny_model()
    which = f"step-{step:08d}"
    again = fit(resumed, random_splits(), options, tmp_path / "again", resume=which, progress=False)
    state, expected = resumed.adapter_state_dict(), whole.adapter_state_dict()
    assert same_bits(state, expected) and any(key.endswith("_mask") for key in state)
    assert again.pruning == first.pruning and again.best_epoch == first.best_epoch


def test_early_stopping_counts_from_the_cut_on(tmp_path):
    model = tiny_model()
    result = fit(model, random_splits(), config(epochs=8, early_stop=1, lr=1e-6), tmp_path, progress=False)
    # Nothing gets better, and still no run stops before its weights are pruned.
    assert result.best_epoch >= 7 and result.pruning["kept_share"] == pytest.approx(0.4, abs=1e-3)


def test_what_cannot_be_pruned_is_refused(tmp_path):
    with pytest.raises(OptionError, match="no LionLayer"):
        fit(tiny_model("probe"), random_splits(), config(), tmp_path / "a", progress=False)
    for option, wrong in (("prune", 0.0), ("prune_granularity", "row"), ("prune_scope", "row")):
        with pytest.raises(OptionError, match=option):
            config(**{option: wrong})


def test_the_command_line(tmp_path, capsys):
    images = str(write_images(tmp_path / "images", each=10))
    weights = tmp_path / "tiny.safetensors"
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY).state_dict(), weights
    )
    flags = ["--backbone", "vit_tiny_patch16_224", "--weights", str(weights), "--img-size", "32"]
    flags += [f"--backbone-set={key}={value}" for key, value in TINY.items()]
    out = tmp_path / "run"
    command = ["finetune", images, "--out", str(out), *flags, "--epochs", "4", "--device", "cpu"]
    command += ["--set", "state_dim=8", "--set", "form=residual"]
    assert main([*command, "--prune", "0.5", "--batch-size", "8"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["fit"]["pruning"]["kept_share"] == pytest.approx(0.5, abs=1e-3)
    assert results["parameters"]["kept"] < results["parameters"]["dense"]
    capsys.readouterr()
    assert main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["test"]["accuracy"]

    assert main(["info", str(out), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"] == results["parameters"]
    assert info["forms"].keys() == {"input_end", "output_end"}

    pruned = tmp_path / "pruned"
    how = "--keep 0.25 --scope layer --granularity unit --compact --json".split()
    assert main(["prune", str(out), *how, "--out", str(pruned)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(end["now"] for end in told["units"].values()) <= 4 and told["bytes"] < told["bytes_before"]
    assert main(["evaluate", str(pruned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] > 0
    small = load_adapter(pruned / "adapter")
    assert small.num_trainable() == told["parameters"]["dense"]
    assert main(["prune", str(pruned), "--keep", "0.5"]) == 2
    assert "already compacted" in capsys.readouterr().err
