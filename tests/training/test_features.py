"""What stands in front of every trained part is computed once, and kept between runs."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from training_helpers import QUICK, random_splits, same_bits, tiny_backbone, tiny_model

import lion_fast
from lion_fast.errors import OptionError
from lion_fast.training import FeatureStore, Interrupted, TrainConfig, evaluate, features, fit, predict
from lion_fast.training.features import encode, features_are_constant

QUICK = QUICK | {"epochs": 3, "log_every": 1}
STATES = {"form": "states", "state_dim": 4, "grid": 2, "reading": "fixed"}
ENDS = ("input", "output")


class Counting(torch.utils.data.Dataset):
    """A data set that counts what is read of it, takes its time over the first item, and Ctrl-C `at` one."""

    def __init__(self, items, first_takes=0.0, at=None):
        self.items, self.reads, self.first_takes, self.at = items, 0, first_takes, at
        self.constant = True

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        time.sleep(self.first_takes if i == 0 else 0)
        if self.reads == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.items[i]


@pytest.mark.parametrize(
    "method,options", [("probe", {}), ("lion", STATES), ("lion", {**STATES, "ends": ENDS})]
)
def test_features_and_their_head_are_the_model(method, options):
    model = tiny_model(method, **options).eval()
    splits = random_splits()
    found = encode(model, splits.val, 3)
    predict(model.behind(), found)
    assert not any(module.training for module in model.modules())  # the part behind has its model's mode
    images = torch.stack([splits.val[i][0] for i in range(len(splits.val))])
    assert not any(p.requires_grad for p in model.backbone.parameters())
    torch.testing.assert_close(model.behind()(found.tensors[0]), model(images), rtol=1e-5, atol=1e-5)
    assert found.tensors[1].tolist() == splits.val.labels.tolist()
    on_features, on_images = evaluate(model.behind(), found, num_classes=3), evaluate(model, splits.val)
    assert on_features.accuracy == on_images.accuracy
    assert on_features.loss == pytest.approx(on_images.loss, rel=1e-5)


@pytest.mark.parametrize(
    "method,options", [("probe", {}), ("lion", STATES), ("lion", {**STATES, "ends": ENDS})]
)
def test_features_train_as_images_do(tmp_path, method, options):
    """Features in other batches differ by rounding."""
    splits, found = random_splits(), []
    for cached in (True, False):
        model = tiny_model(method, **options)
        told = fit(model, splits, TrainConfig(**QUICK, cache_features=cached), tmp_path / str(cached))
        assert told.cached_features == cached
        assert method == "probe" or {"output_iterations", "output_residual"} <= told.history[-1].keys()
        found.append((model.adapter_state_dict(), [row["train_loss"] for row in told.history]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    assert found[0][1][-1] < found[0][1][0]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if method == "probe" else {"rtol": 1e-3, "atol": 1e-4}
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], **tolerance)


@pytest.mark.parametrize(
    "options",
    [{"form": "residual"}, {**STATES, "ends": ENDS, "front": "residual"}, {**STATES, "ends": "input"}],
)
def test_nothing_is_cached_where_the_input_end_is_trained(options):
    assert not features_are_constant(tiny_model(**options), TrainConfig(**QUICK))


@pytest.mark.parametrize(
    "method,options", [("vpt", {}), ("ssf", {}), ("lion", {**STATES, "ends": ENDS, "front": "residual"})]
)
def test_what_a_method_has_in_front_counts_when_it_is_frozen(tmp_path, method, options):
    """A head trained anew on an adapter: its features are those of the method, not of the bare backbone."""
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
def test_nothing_is_cached_where_a_method_overrides_what_features_leave_out(name):
    model = tiny_model("probe")
    assert features_are_constant(model, TrainConfig(**QUICK))
    assert not features_are_constant(model, TrainConfig(**QUICK, augment="flip"))
    model.__class__ = type("Own", (type(model),), {name: lambda self, *args: getattr(super(), name)(*args)})
    assert not features_are_constant(model, TrainConfig(**QUICK))


@pytest.mark.parametrize("most, reads", [(0, (46, 69, 92)), (500, (23, 23, 46))])
def test_a_store_reads_images_once_for_models_that_read_alike(tmp_path, monkeypatch, most, reads):
    """Of few images it keeps all that any of them may read."""
    monkeypatch.setattr(features, "MOST_IMAGES", most)
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
    assert splits.train.reads == reads[0]
    run("probe", "d")
    run("probe", "e")
    assert splits.train.reads == reads[1] and repr(store) == f"FeatureStore({2 if most else 6} of 16)"
    run("probe", "g", batch_size=4)  # the last bits of a feature depend on the batch it was computed in
    assert splits.train.reads == reads[2]
    assert min(seconds) >= 0.3  # reading belongs to the time of every run that trains on it
    alone = lion_fast.create(backbone, "lion", num_classes=3, seed=0, **STATES)
    fit(alone, splits, TrainConfig(**QUICK), tmp_path / "f")
    assert same_bits(alone.adapter_state_dict(), first.adapter_state_dict())


def test_a_store_forgets_the_oldest_and_never_mixes_backbones():
    store, items = FeatureStore(limit=2), Counting(random_splits(n=1).train)
    model, other = tiny_model("probe"), tiny_model("probe")
    # bf16 drops the other backbone's
    calls = [(model, "no", 1), (other, "no", 2), (model, "no", 2), (model, "bf16", 3), (model, "no", 3)]
    for turn, precision, reads in [*calls, (other, "no", 4)]:
        store.features(turn, items, items, 8, mixed_precision=precision)
        assert items.reads == reads


@pytest.mark.parametrize("write", ["load_state_dict", "data"])
def test_a_store_follows_the_weights_of_a_backbone(write):
    store, items, model = FeatureStore(), random_splits(n=1).train, tiny_model("probe")
    before = store.features(model, items, items, 8)[0].tensors[0].clone()
    if write == "data":
        model.backbone.model.norm.bias.data.add_(1)
    else:
        inside = model.backbone.model
        inside.load_state_dict({k: v * 1.5 for k, v in inside.state_dict().items()})
    found = store.features(model, items, items, 8)[0].tensors[0]
    assert torch.equal(found, features.encode(model, items, 8).tensors[0]) and not torch.equal(found, before)


def test_a_store_forgets_what_is_too_much(monkeypatch):
    monkeypatch.setattr(features, "MEMORY_LIMIT", 1450)  # an image takes 4 * 32 bytes, and 8 for its label
    store, model = FeatureStore(), tiny_model("probe")
    for n, kept in ((5, 1), (5, 2), (11, 1)):  # the latest one stays, whatever its size
        items = random_splits(n=n).train
        store.features(model, items, items, 8)
        assert repr(store) == f"FeatureStore({kept} of 16)"


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
    with pytest.raises(OptionError, match="transform of their own"):
        fit(tiny_model(**STATES), given, TrainConfig(**QUICK, augment="flip"), tmp_path / "flip")


def test_without_checkpoints_a_run_ends_with_the_same_weights(tmp_path):
    splits, models = random_splits(), [tiny_model(**STATES) for _ in range(2)]
    for epochs, model in zip((1, 0), models, strict=True):
        config = TrainConfig(**QUICK, checkpoint_epochs=epochs)
        fit(model, splits, config, tmp_path / str(epochs))
        found = list((tmp_path / str(epochs) / "checkpoints").glob("step-*"))
        assert bool(found) == bool(epochs)
    assert same_bits(*(model.adapter_state_dict() for model in models))


def test_interrupted_while_features_are_computed_there_is_nothing_to_keep(tmp_path):
    splits = random_splits()
    splits.train = Counting(splits.train, at=15)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(tiny_model("probe"), splits, TrainConfig(**QUICK), tmp_path)
    assert not isinstance(stopped.value, Interrupted) and splits.train.reads < 23
    assert not (tmp_path / "checkpoints").exists()


def test_features_that_would_not_fit_are_computed_in_every_epoch(tmp_path, monkeypatch):
    splits, width = random_splits(), 32 + 4 * 32  # class token, 2 x 2 cells of a width of 32
    bytes_needed = 4 * width * 23
    for limit, cached in ((bytes_needed, True), (bytes_needed - 1, False)):
        monkeypatch.setattr(features, "MEMORY_LIMIT", limit)
        told = fit(tiny_model(**STATES), splits, TrainConfig(**QUICK), tmp_path / str(limit))
        assert told.cached_features == cached
