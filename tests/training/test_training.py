"""Training: steps against their formulas, processes that agree, logs, faults that are told."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_helpers import QUICK, Tensors, random_splits, read_csv, run, same_bits, start, tiny_model

from lion_fast.errors import CheckpointError, DataError, OptionError
from lion_fast.training import Plan, TrainConfig, TrainingError, checkpoints, evaluate, fit


@pytest.fixture
def after_step():
    """Calls back after every optimiser step, with their number."""
    callbacks, done = [], []

    def hook(*_):
        done.append(True)
        for callback in callbacks:
            callback(len(done))

    handle = register_optimizer_step_post_hook(hook)
    yield callbacks.append
    handle.remove()


# -- the numbers


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_adamw_with_warmup_cosine_smoothing_decay_and_clipping(tmp_path, accumulation):
    """Against the formulas in float64 on a linear head; tolerance: float32 rounding over 12 steps."""
    splits, model = random_splits(n=21, n_val=0), tiny_model("probe")
    config = {"epochs": 4, "lr": 0.05, "weight_decay": 0.3, "warmup_epochs": 1.5, "label_smoothing": 0.2}
    config |= {"clip_norm": 0.4, "grad_accumulation": accumulation}
    with torch.no_grad():
        features = model.eval().features(splits.train.images).double()
    weight, bias = parameters = [p.detach().double().clone() for p in (model.head.weight, model.head.bias)]
    groups = [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    warm, total = 4, 12  # round(1.5 * 3) steps of warm-up, an even number rounds to even
    for step in range(total):
        up, down = (step + 1) / (warm + 1), 0.5 * (1 + np.cos(np.pi * (step - warm) / (total - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (up if step < warm else down)
        chosen = list(Plan(n=21, batch_size=8, epochs=4, seed=0).indices(step))
        x, y = features[chosen], splits.train.labels[chosen]
        target = torch.nn.functional.one_hot(y, 3).double() * 0.8 + 0.2 / 3
        error = ((x @ weight.T + bias).softmax(1) - target) / len(chosen)
        grads = [error.T @ x, error.sum(0)]
        norm = sum(g.square().sum() for g in grads).sqrt().item()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * min(1.0, 0.4 / (norm + 1e-6))
        optimizer.step()
    fit(model, splits, TrainConfig(**QUICK | config), tmp_path)
    torch.testing.assert_close(model.head.weight.double(), weight, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(model.head.bias.double(), bias, rtol=2e-4, atol=2e-5)


def test_sgd_has_momentum_and_the_head_its_own_rate(tmp_path):
    splits, model, reference = random_splits(n=16, n_val=0), tiny_model(), tiny_model().train()
    config = {"batch_size": 16, "optimizer": "sgd", "lr": 0.1, "lr_head": 0.02}
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    momentum = {name: torch.zeros_like(p) for name, p in trained.items()}
    for step in range(2):
        chosen = list(Plan(n=16, batch_size=16, epochs=2, seed=0).indices(step))
        logits = reference(splits.train.images[chosen])
        loss = torch.nn.functional.cross_entropy(logits, splits.train.labels[chosen])
        grads = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (name, parameter), grad in zip(trained.items(), grads, strict=True):
                momentum[name] = 0.9 * momentum[name] + grad
                parameter -= (0.02 if name.startswith("head.") else 0.1) * (1.0, 0.5)[step] * momentum[name]
    fit(model, splits, TrainConfig(**QUICK | config, weight_decay=0.0, warmup_epochs=0), tmp_path)
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


DROPPED = {"dropout": 0.3}
PROMPTS = [DROPPED | {"form": form} for form in ("naive", "exact")]


@pytest.mark.parametrize(
    "method,options",
    [
        ("dyt", DROPPED), ("lora", DROPPED), ("adaptformer", DROPPED), ("houlsby", DROPPED),
        *((method, options) for method in ("vpt", "e2vpt", "vfpt", "cvpt") for options in PROMPTS),
    ],
)  # fmt: skip
def test_one_step_is_one_step_whatever_is_random_in_it(tmp_path, method, options):
    """The same masks and gates for an image in one part or in three, and one loss of the whole step."""
    states = []
    for parts in (1, 3):
        model = tiny_model(method, **options)
        config = TrainConfig(**QUICK, optimizer="sgd", grad_accumulation=parts)
        fit(model, random_splits(), config, tmp_path / str(parts))
        states.append(model.adapter_state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-5, atol=1e-6)
    other = tiny_model(method, **options)
    fit(other, random_splits(), TrainConfig(**QUICK, optimizer="sgd", seed=1), tmp_path / "other")
    assert not same_bits(other.adapter_state_dict(), states[0])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_learns_and_the_frozen_backbone_keeps_every_bit(tmp_path, precision):
    model = tiny_model()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    result = fit(model, random_splits(), TrainConfig(**QUICK, mixed_precision=precision), tmp_path)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert same_bits(before, model.backbone.state_dict())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_deterministic_mode_is_only_for_the_run(tmp_path, monkeypatch, after_step):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    after_step(lambda step: seen.append(torch.are_deterministic_algorithms_enabled()))
    for asked in (True, False):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK, deterministic=asked), tmp_path / str(asked))
    assert seen == [True] * 6 + [False] * 6 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_early_stopping_counts_from_the_best_epoch_and_keeps_what_is_asked(tmp_path, keep):
    splits = random_splits()
    splits.val.labels = (splits.val.labels + 1) % 3  # the better it learns, the worse it does here
    model = tiny_model()
    config = TrainConfig(**QUICK | {"epochs": 9}, early_stop=2, monitor="loss", keep=keep)
    result = fit(model, splits, config, tmp_path)
    losses = [row["val_loss"] for row in result.history]
    best = losses.index(min(losses)) + 1
    assert result.stopped_early and result.epochs == len(losses) == best + 2 < 9
    assert result.best_epoch == (best if keep == "best" else best + 2)
    assert evaluate(model, splits.val).loss == pytest.approx(losses[result.best_epoch - 1], rel=1e-5)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_logs_have_a_row_per_epoch_and_the_solver_in_them(tmp_path, tensorboard):
    if tensorboard:
        pytest.importorskip("tensorboard")
    config = TrainConfig(**QUICK, log_every=2, tensorboard=tensorboard)
    result = fit(tiny_model(), random_splits(), config, tmp_path)
    assert any(tmp_path.glob("tensorboard/events.*")) == tensorboard
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_loss"]) == result.history[1]["val_loss"]
    assert float(rows[1]["input_iterations"]) >= 1 and 0 <= float(rows[1]["output_residual"]) < 1
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == ["2", "3", "4", "6"]


# -- faults told before and during training


def test_an_unwritable_output_is_found_before_training(tmp_path, monkeypatch, after_step):
    (tmp_path / "file").write_text("in the way")
    after_step(lambda step: pytest.fail("it has started to train"))
    with pytest.raises(CheckpointError, match="cannot write"):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path / "file" / "out")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="is full"):
        fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path / "out")


def test_a_disk_that_takes_less_than_it_says_is_found_before_training(images, tmp_path):
    """A limit on file size stands for a quota: the operating system refuses the write itself."""
    resource = pytest.importorskip("resource")
    limits = (resource.RLIMIT_FSIZE, (100000, 100000))
    with start(images, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(*limits)) as process:
        told = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "CheckpointError: cannot write" in told
    assert not (tmp_path / "out" / "steps.csv").exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, after_step):
    splits, steps = random_splits(), []
    bad = Plan(n=23, batch_size=8, epochs=2, seed=0).indices(4)[0]
    original = splits.train.images[bad].clone()
    config = TrainConfig(**QUICK, checkpoint_every=1)

    def spoil(step):
        steps.append(step)
        if step == 4:
            splits.train.images[bad] = torch.inf

    after_step(spoil)
    with pytest.raises(TrainingError, match="loss is nan at step 5; .*00000004"):
        fit(tiny_model(), splits, config, tmp_path)
    assert steps == [1, 2, 3, 4, 5]
    newest = checkpoints.read_checkpoint(checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1])
    assert all(torch.isfinite(t).all() for t in newest.tensors.values())
    splits.train.images[bad] = original
    assert fit(tiny_model(), splits, config, tmp_path, resume=True).steps == 6


def test_weights_that_are_not_finite_are_told_without_checkpoints_too(tmp_path, after_step):
    model = tiny_model(form="states", reading="fixed", state_dim=4, grid=2)

    def spoil(step):
        if step == 3:
            with torch.no_grad():
                model.output_end.layer.A[0, 0] = float("inf")

    after_step(spoil)
    with pytest.raises(TrainingError, match="output_end.layer.A is not finite"):
        fit(model, random_splits(n_val=0), TrainConfig(**QUICK, checkpoint_epochs=0), tmp_path)


def test_a_rate_that_explodes_is_told(tmp_path):
    with pytest.raises(TrainingError, match="Try a lower lr"):
        fit(tiny_model("vpt"), random_splits(), TrainConfig(**QUICK | {"lr": 1e38, "epochs": 3}), tmp_path)


@pytest.mark.parametrize(
    "labels,told",
    [([0, 1, 5], "label 5 is out of range"), ([1, 1, 1], "one class"), ([], "no training images")],
)
def test_data_that_cannot_be_learnt_is_refused(tmp_path, labels, told):
    splits = random_splits()
    splits.train = Tensors(torch.zeros(len(labels), 3, 32, 32), torch.tensor(labels, dtype=torch.long))
    with pytest.raises(DataError, match=told):
        fit(tiny_model(), splits, TrainConfig(**QUICK), tmp_path)


def test_options_that_cannot_be_here_are_refused_and_the_next_run_works(tmp_path):
    for name, value in (("mixed_precision", "fp16"), ("early_stop", 3)):
        with pytest.raises(OptionError, match=name):
            fit(tiny_model(), random_splits(n_val=0), TrainConfig(**QUICK, **{name: value}), tmp_path)
    fit(tiny_model(), random_splits(), TrainConfig(**QUICK), tmp_path)


@pytest.mark.parametrize(
    "options,told",
    [
        ({"lr": -1.0}, "above 0; got -1.0"), ({"lr": float("nan")}, "lr"), ({"epochs": True}, "epochs"),
        ({"epochs": 0}, "at least 1; got 0"), ({"batch_size": 1.5}, "batch_size"),
        ({"deterministic": 1}, "deterministic"), ({"label_smoothing": 1.0}, "below 1"),
        ({"optimizer": "adam"}, "adamw, sgd; got 'adam'"),
        ({"learning_rate": 0.1}, "'learning_rate'.*Valid: epochs, batch_size"),
    ],
)  # fmt: skip
def test_wrong_options_say_what_is_valid(options, told):
    with pytest.raises(OptionError, match=told):
        TrainConfig.from_dict(options)


# -- several processes


@pytest.mark.parametrize("method,precision", [("lion", "no"), ("dyt", "no"), ("states", "bf16")])
def test_two_processes_give_the_adapter_of_one(images, tmp_path, method, precision):
    """Gradients are summed in another order, so float32 rounding; Adam divides by their size, hence the
    tolerance of 1e-3 where an update can be as large as the rate, 1e-2, at each of 20 steps. Features
    computed once are the same in both, and what reads them computes in float32."""
    alone, together = tmp_path / "one", tmp_path / "two"
    run(images, alone, method=method, mixed_precision=precision)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(images, together, method=method, launch=launch, mixed_precision=precision)
    one, two = (load_file(folder / "result.safetensors") for folder in (alone, together))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3 if method == "lion" else 1e-5)
    rows = [read_csv(folder / "metrics.csv") for folder in (alone, together)]
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
    with pytest.raises(DataError, match="x, y, z.*ant, bee, cat"):
        fit(other, splits, TrainConfig(**QUICK), tmp_path / "b")
    with pytest.raises(DataError, match="num_classes=3"):
        fit(tiny_model("probe", num_classes=5), splits, TrainConfig(**QUICK), tmp_path / "c")


@pytest.mark.parametrize("progress, lines", [(None, 2), (False, 0)])
def test_without_a_terminal_every_epoch_has_a_line(tmp_path, capsys, progress, lines):
    fit(tiny_model("probe"), random_splits(), TrainConfig(**QUICK), tmp_path, progress=progress)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(told) == lines and all("of 2: loss" in line and "val accuracy" in line for line in told)
