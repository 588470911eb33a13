"""What stands in front of every trained part is computed once, and kept between runs."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset
from training_helpers import random_splits, tiny_backbone, tiny_model

import lion_fast
from lion_fast.errors import OptionError
from lion_fast.training import FeatureStore, TrainConfig, evaluate, features, fit, loop, predict
from lion_fast.training.features import encode

QUICK = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "device": "cpu", "log_every": 1}
STATES = {"form": "states", "state_dim": 4, "grid": 2}


class Counting(torch.utils.data.Dataset):
    """A data set that counts what is read of it, and takes its time over the first item."""

    def __init__(self, items, first_takes=0.0):
        self.items, self.reads, self.first_takes = items, 0, first_takes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        time.sleep(self.first_takes if i == 0 else 0)
        return self.items[i]


@pytest.mark.parametrize("method,options", [("probe", {}), ("lion", STATES)])
def test_rows_and_their_head_are_the_model(method, options):
    model = tiny_model(method, **options).eval()
    splits = random_splits()
    rows = encode(model, splits.val, 3)
    images = torch.stack([splits.val[i][0] for i in range(len(splits.val))])
    assert not any(p.requires_grad for p in model.backbone.parameters())
    torch.testing.assert_close(model.behind()(rows.tensors[0]), model(images), rtol=1e-5, atol=1e-5)
    assert rows.tensors[1].tolist() == splits.val.labels.tolist()


def test_the_states_form_trains_on_rows_as_it_does_on_images(tmp_path):
    splits, found = random_splits(), []
    for cached in (True, False):
        model = tiny_model(**STATES)
        told = fit(model, splits, TrainConfig(**QUICK, cache_features=cached), tmp_path / str(cached))
        assert told.cached_features == cached
        assert {"output_iterations", "output_residual"} <= told.history[-1].keys()
        found.append((model.adapter_state_dict(), [row["train_loss"] for row in told.history]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    assert found[0][1][-1] < found[0][1][0]
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"form": "residual"}, {**STATES, "ends": ("input", "output")}, {**STATES, "ends": "input"}]
)
def test_nothing_is_cached_where_the_input_end_is_trained(options):
    assert not loop.features_are_constant(tiny_model(**options), TrainConfig(**QUICK))


@pytest.mark.parametrize(
    "method,options", [("vpt", {}), ("ssf", {}), ("lion", {**STATES, "ends": ("input", "output")})]
)
def test_what_a_method_has_in_front_counts_when_it_is_frozen(tmp_path, method, options):
    """A head trained anew on an adapter: its rows are those of the method, not of the bare backbone."""
    found = []
    for cache in (True, False):
        model = tiny_model(method, **options)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone"):
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(name.startswith("head"))
        fit(model, random_splits(), TrainConfig(**QUICK, cache_features=cache), tmp_path / str(cache))
        found.append(model.head.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["features", "forward", "loss_terms"])
def test_nothing_is_cached_where_a_method_overrides_what_rows_leave_out(name):
    model = tiny_model("probe")
    model.__class__ = type("Own", (type(model),), {name: lambda self, *args: getattr(super(), name)(*args)})
    assert not loop.features_are_constant(model, TrainConfig(**QUICK))


def test_the_part_behind_has_the_mode_of_its_model():
    model = tiny_model(**STATES).eval()
    rows = encode(model, random_splits().val)
    predict(model.behind(), rows)
    assert not any(module.training for module in model.modules())


def test_a_store_reads_images_once_for_models_that_read_alike(tmp_path):
    splits, store, backbone = random_splits(), FeatureStore(), tiny_backbone()
    splits.train, splits.val = Counting(splits.train, 0.3), Counting(splits.val)
    seconds = []

    def run(method, name, batch_size=8, **options):
        model = lion_fast.create(backbone, method, num_classes=3, seed=0, **options)
        config = TrainConfig(**QUICK | {"batch_size": batch_size})
        seconds.append(fit(model, splits, config, tmp_path / name, store=store).seconds)
        return model

    first = run("lion", "a", **STATES)
    run("lion", "b", **STATES | {"state_dim": 8})
    assert (splits.train.reads, splits.val.reads) == (23, 7)
    run("lion", "c", **STATES | {"grid": 1})
    assert splits.train.reads == 46
    run("probe", "d")
    run("probe", "e")
    assert splits.train.reads == 69 and repr(store) == "FeatureStore(6 of 16)"
    run("probe", "g", batch_size=4)  # the last bits of a row depend on the batch it was computed in
    assert splits.train.reads == 92
    assert min(seconds) >= 0.3  # reading belongs to the time of every run that trains on it
    alone = lion_fast.create(backbone, "lion", num_classes=3, seed=0, **STATES)
    fit(alone, splits, TrainConfig(**QUICK), tmp_path / "f")
    for name, tensor in alone.adapter_state_dict().items():
        assert torch.equal(tensor, first.adapter_state_dict()[name])


def test_a_store_forgets_the_oldest_and_never_mixes_backbones():
    store = FeatureStore(limit=2)
    model, other = tiny_model("probe"), tiny_model("probe")
    items = random_splits().train
    made = []

    def compute(name):
        made.append(name)
        return TensorDataset(torch.zeros(4))

    for turn in (model, other, model):
        store.rows(turn, items, "no", 8, lambda turn=turn: compute(turn))
    assert made == [model, other]
    store.rows(model, items, "bf16", 8, lambda: compute("bf16"))  # drops the other backbone's
    store.rows(model, items, "no", 8, lambda: compute("never"))
    store.rows(other, items, "no", 8, lambda: compute("again"))
    assert made == [model, other, "bf16", "again"]


def test_a_store_forgets_what_is_too_much(monkeypatch):
    monkeypatch.setattr("lion_fast.training.features.MEMORY_LIMIT", 100)
    store, model = FeatureStore(), tiny_model("probe")
    held = [random_splits().train for _ in range(3)]
    for items, numbers in zip(held, (10, 10, 200), strict=True):  # of 4 bytes
        store.rows(model, items, "no", 8, lambda numbers=numbers: TensorDataset(torch.zeros(numbers)))
    assert repr(store) == "FeatureStore(1 of 16)"  # the latest one stays, whatever its size
    assert store.rows(model, held[2], "no", 8, lambda: None)[0].tensors[0].numel() == 200


def test_a_transform_of_the_callers_is_used_in_training_and_may_be_random(tmp_path):
    """Images with a transform of their own are read by it, anew in every epoch."""
    splits, seen = random_splits(), []

    class Images(torch.utils.data.Dataset):
        labels, transform = splits.train.labels, "the caller's"

        def __len__(self):
            return len(splits.train)

        def with_transform(self, transform):
            raise AssertionError("the caller's transform would be lost")

        def __getitem__(self, i):
            seen.append(i)
            return splits.train[i]

    given = SimpleNamespace(train=Images(), val=None)
    found = fit(tiny_model(**STATES), given, TrainConfig(**QUICK), tmp_path)
    assert not found.cached_features
    assert sorted(seen) == sorted(list(range(len(splits.train))) * TrainConfig(**QUICK).epochs)


def test_augmentation_and_a_transform_of_the_callers_do_not_go_together(tmp_path):
    train = random_splits().train
    train.transform = "the caller's"
    given = SimpleNamespace(train=train, val=None)
    with pytest.raises(OptionError, match="images have a transform of their own"):
        fit(tiny_model(**STATES), given, TrainConfig(**QUICK, augment="flip"), tmp_path)


def test_without_checkpoints_a_run_ends_with_the_same_weights(tmp_path):
    splits, models = random_splits(), [tiny_model(**STATES) for _ in range(2)]
    for epochs, model in zip((1, 0), models, strict=True):
        config = TrainConfig(**QUICK, checkpoint_epochs=epochs)
        fit(model, splits, config, tmp_path / str(epochs))
        found = list((tmp_path / str(epochs) / "checkpoints").glob("step-*"))
        assert bool(found) == bool(epochs)
    for name, tensor in models[0].adapter_state_dict().items():
        assert torch.equal(tensor, models[1].adapter_state_dict()[name])


def test_weights_that_are_not_finite_are_told_without_checkpoints_too(tmp_path, monkeypatch):
    model = tiny_model(**STATES)
    plain = loop._Run._step

    def step(self, batches):
        plain(self, batches)
        if self.at.step == 2:
            with torch.no_grad():
                model.output_end.layer.A[0, 0] = float("inf")

    monkeypatch.setattr(loop._Run, "_step", step)
    splits = replace_val(random_splits())
    with pytest.raises(lion_fast.training.TrainingError, match="output_end.layer.A is not finite"):
        fit(model, splits, TrainConfig(**QUICK, checkpoint_epochs=0), tmp_path)


def replace_val(splits):
    splits.val = None
    return splits


def test_evaluate_on_rows_is_evaluate_on_images(tmp_path):
    model, splits = tiny_model(**STATES), random_splits()
    rows = encode(model, splits.val, 4)
    on_rows = evaluate(model.behind(), rows, num_classes=3)
    on_images = evaluate(model, splits.val)
    assert on_rows.accuracy == on_images.accuracy
    assert on_rows.loss == pytest.approx(on_images.loss, rel=1e-5)


def test_rows_that_would_not_fit_are_computed_in_every_epoch(tmp_path, monkeypatch):
    splits, width = random_splits(), 32 + 4 * 32  # class token, 2 x 2 cells of a width of 32
    bytes_needed = 4 * width * 23
    for limit, cached in ((bytes_needed, True), (bytes_needed - 1, False)):
        monkeypatch.setattr(features, "MEMORY_LIMIT", limit)
        told = fit(tiny_model(**STATES), splits, TrainConfig(**QUICK), tmp_path / str(limit))
        assert told.cached_features == cached
