"""Which maps a head reads: candidates, their judging by held-out images, the rule, and a run that chooses."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from method_helpers import FAMILIES, backbone, images
from training_helpers import QUICK, Tensors, same_bits, tiny_backbone

import lion_fast
from lion_fast.errors import AdapterError, DataError
from lion_fast.methods import create
from lion_fast.methods.reading import Reading
from lion_fast.training import FeatureStore, TrainConfig, TrainingError, checkpoints, choosing, features, fit

BOTH = ("input", "output")
CONFIG = TrainConfig(**QUICK | {"epochs": 6, "keep": "last"})


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "STEPS", 40)
        yield


class Watched(Tensors):
    """Images that count how often each was read."""

    def __init__(self, *given):
        super().__init__(*given)
        self.reads = [0] * len(self)

    def __getitem__(self, i):
        self.reads[i] += 1
        return super().__getitem__(i)


class Poisoned(Tensors):
    def __getitem__(self, i):
        raise AssertionError("this image is not for choosing")


def quadrants(count, seed, kind=Watched):
    """Noise with a bright square; the class is the quadrant that it is in."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    found = 0.3 * torch.randn(count, 3, 32, 32, generator=draw)
    for image, label in zip(found, labels.tolist(), strict=True):
        y, x = (
            torch.randint(0, 9, (2,), generator=draw) + 16 * torch.tensor([label // 2, label % 2])
        ).tolist()
        image[:, y : y + 8, x : x + 8] += 3
    return kind(found, labels)


def colours(count, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Tensors(
        torch.randn(count, 3, 32, 32, generator=draw) + 2 * F.one_hot(labels, 3)[..., None, None], labels
    )


def steady(chosen):
    return {k: v for k, v in chosen.items() if k != "seconds"}


# -- candidates


@pytest.mark.parametrize("key", FAMILIES)
def test_what_is_judged_is_what_the_model_reads(key):
    """Bit for bit, for every candidate; and pieces are what the model's head and its states get."""
    net = backbone(key)
    model = create(net, num_classes=3)
    readings, x = choosing.readings_of(model), images(net, 2)
    everything = model.everything()
    parts = everything.split(everything.encode(x))
    assert len(set(readings)) == len(readings)
    for reading in readings:
        given = {"at": reading.at, "grid": reading.grid, "pooled": reading.pooled}
        own = create(net, num_classes=3, reading="fixed", **given).eval()
        rows = own.encode(x)
        assert torch.equal(choosing.encoded_for(*parts, reading), rows)
        head, cells = choosing.pieces(*parts, reading)
        assert (head is None) == (not reading.pooled) and (cells is None) == (not reading.at)
        if cells is None:
            assert torch.equal(head, own.output_end(rows))
        else:
            expected, its = own.output_end.cells.split(rows)
            assert torch.equal(cells, its) and (head is None or torch.equal(head, expected))


@pytest.mark.parametrize(
    "options, at, grids, pooled, alone",
    [
        ({}, {(2,), (4,), (5,), (2, 5), (4, 5)}, {1, 2, 4}, {True, False}, True),
        ({"at": 3}, {(3,)}, {1, 2, 4}, {True, False}, False),
        ({"at": (1, 3)}, {(1, 3)}, {1, 2}, {True, False}, False),
        ({"grid": 3}, {(2,), (4,), (5,), (2, 5), (4, 5)}, {3}, {True, False}, False),
        ({"pooled": True}, {(2,), (4,), (5,), (2, 5), (4, 5)}, {1, 2, 4}, {True}, False),
        ({"ends": BOTH}, {(2, 5), (4, 5)}, {1, 2}, {True, False}, False),
        ({"ends": BOTH, "at": (0, 1), "grid": 4}, {(0, 1)}, {4}, {True, False}, False),
    ],
)
def test_candidates_keep_what_is_given(options, at, grids, pooled, alone):
    model = create(backbone(depth=6), num_classes=2, **options)
    found = choosing.readings_of(model)
    assert (Reading((), model.grid) in found) == alone
    maps = [reading for reading in found if reading.at]
    assert {r.at for r in maps} == at and {r.pooled for r in maps} == pooled
    assert {r.grid for r in maps if len(r.at) == 1} | {r.grid for r in maps if len(r.at) == 2} == grids
    assert all(r.grid < 4 for r in maps if len(r.at) == 2 and "grid" not in options)
    assert all(reading.at for reading in choosing.readings_of(model, needs_map=True))


def test_places_and_what_is_expected():
    assert choosing.places_of(backbone(depth=12)) == (4, 8, 11)
    assert choosing.places_of(backbone("swin")) == (1, 2, 3)
    assert choosing.places_of(backbone("resnet")) == (2, 3, 4)
    for options, expected in (
        ({}, Reading((4,), 2)), ({"grid": 4}, Reading((4,), 4)), ({"at": 5}, Reading((5,), 2)),
        ({"pooled": False}, Reading((4,), 2, False)), ({"ends": BOTH}, Reading((4, 5), 2)),
    ):  # fmt: skip
        model = create(backbone(depth=6), num_classes=2, **options)
        assert choosing.expected(model, choosing.readings_of(model)) == expected
    probe = create(backbone(depth=6), "probe", num_classes=2, reading="auto")
    assert choosing.expected(probe, choosing.readings_of(probe)) == Reading((4,), 1)


# -- judging


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_hold_every_class_alike(folds):
    labels = torch.tensor([0] * 17 + [1] * 9 + [2] + [4] * 4)[torch.randperm(31)]
    found = choosing.stratified_folds(labels, folds, 1)
    assert torch.equal(found, choosing.stratified_folds(labels, folds, 1))
    assert not torch.equal(found, choosing.stratified_folds(labels, folds, 2))
    for some in (found, *(found[labels == k] for k in (0, 1, 2, 4))):
        counts = torch.bincount(some, minlength=folds)
        assert len(counts) == folds and counts.max() - counts.min() <= 1


def test_the_few_of_many_images_have_every_class_in_its_share():
    labels = torch.tensor([0] * 900 + [1] * 300 + [2] * 10)
    found = choosing.few(Tensors(torch.empty(1210), labels), 0)
    assert found == sorted(set(found)) and len(found) <= 500
    for k, count in enumerate((900, 300, 10)):
        assert abs((labels[found] == k).sum().item() - count / 3) < 1
    unknown = choosing.few(range(1210), 0)
    assert len(unknown) <= 500 and max(unknown) > 1200


def distances(cells):
    rows = cells.flatten(0, -2).double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def test_main_directions_keep_distances():
    draw = torch.Generator().manual_seed(0)
    narrow = torch.randn(9, 4, choosing.PRINCIPAL, generator=draw)
    assert choosing.principal(narrow)[0] is narrow and choosing.principal(narrow)[1] == 1.0
    low = torch.randn(60, 4, 100, generator=draw) @ torch.randn(100, 200, generator=draw)
    found, stretch = choosing.principal(low)
    assert found.shape == (60, 4, 128) and stretch == math.sqrt(200 / 128)
    torch.testing.assert_close(distances(found), distances(low), rtol=1e-4, atol=1e-4)
    # of what has more directions than are kept, the largest
    steep = torch.randn(80, 4, 200, generator=draw) * torch.arange(200, 0, -1)
    rows = (steep.flatten(0, 1) - steep.flatten(0, 1).mean(0)).double()
    largest = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -128:]
    kept = choosing.principal(steep)[0]
    torch.testing.assert_close(distances(kept), distances(rows @ largest), rtol=1e-4, atol=1e-2)
    assert kept.flatten(0, 1).std(0).max() < 2 * kept.flatten(0, 1).std(0).min()  # mixed, so much alike


@pytest.mark.parametrize("width", [None, 4])
def test_a_held_out_image_teaches_its_own_judge_nothing(width):
    draw = torch.Generator().manual_seed(0)
    labels, folds = torch.arange(24) % 3, torch.arange(24) // 3 % 3
    rows, cells = torch.randn(24, 6, generator=draw), torch.randn(24, 4, 5, generator=draw)
    before = choosing.held_out(rows, cells, labels, 3, folds, width)
    others = torch.where(folds == 1, (labels + 1) % 3, labels)
    after = choosing.held_out(rows, cells, others, 3, folds, width)
    assert torch.equal(after[folds == 1], before[folds == 1])
    assert not torch.isclose(after[folds != 1], before[folds != 1]).all(1).any()
    assert torch.equal(choosing.held_out(rows, cells, labels, 3, folds, width), before)


def test_losses_are_at_the_best_temperature():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = F.one_hot(labels, 3) + torch.randn(60, 3, generator=draw)
    found = choosing.losses(logits, labels)
    assert found.shape == (60,) and found.mean() <= F.cross_entropy(logits, labels)
    step = (choosing.TEMPERATURES[1] / choosing.TEMPERATURES[0]).item()
    torch.testing.assert_close(choosing.losses(logits * step**3, labels), found, rtol=1e-4, atol=1e-4)
    finest = min(F.cross_entropy(logits * t, labels).item() for t in torch.linspace(0.05, 9, 2000))
    assert found.mean().item() == pytest.approx(finest, rel=0.01)


def test_the_rule_by_hand():
    """What is expected, unless the best is better by more than one standard error of the difference."""
    noise = torch.tensor([1.0, -1.0] * 8)  # deviation 16 / 15, root 1.0328; its standard error a quarter
    error = noise.std().item() / 4
    base = torch.zeros(16)
    for gain, taken in ((0.99, "expected"), (1.01, "best")):
        found = {"worse": base + 5, "expected": base + noise, "best": base - gain * error}
        assert choosing.best_of(found, "expected") == taken
    assert choosing.best_of({"expected": base, "same": base.clone()}, "expected") == "expected"


# -- runs


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run on quadrants without validation images, one with, and what they left."""
    runs = []
    for val in (None, quadrants(40, 5, Tensors)):
        train, test = quadrants(48, 1), quadrants(8, 2, Poisoned)
        model = create(tiny_backbone(), num_classes=4, seed=0)
        out = tmp_path_factory.mktemp("run")
        result = fit(model, SimpleNamespace(train=train, val=val, test=test), CONFIG, out, progress=False)
        runs.append(SimpleNamespace(model=model, result=result, out=out, train=train))
    return runs


def test_a_place_that_decides_is_read_in_cells(chosen):
    first, second = chosen
    told = first.result.chosen
    assert told["at"] and told["grid"] >= 2 and told["loss"] < told["features_alone"] / 2
    assert second.result.history[-1]["val_accuracy"] > 0.9
    assert first.model.options["at"] in (told["at"], *told["at"]) and first.model.grid == told["grid"]
    assert first.model.state_dim == told["state_dim"] and not first.model.open
    assert first.result.cached_features and first.result.seconds > told["seconds"]
    assert list(told["candidates"].values()) == sorted(told["candidates"].values())
    assert told["images"] == 48 and told["folds"] == 3 and told["words"] in told["candidates"]


def test_the_same_seed_chooses_and_learns_the_same_whatever_judges_the_epochs(chosen):
    first, second = chosen
    assert steady(first.result.chosen) == steady(second.result.chosen)
    assert same_bits(first.model.adapter_state_dict(), second.model.adapter_state_dict())
    for run in chosen:  # for all candidates and for training
        assert run.train.reads == [1] * 48


def test_a_saved_choice_is_read_again(chosen, tmp_path):
    model, frozen = chosen[0].model, tiny_backbone()
    model.save_adapter(tmp_path)
    again = lion_fast.load_adapter(tmp_path, frozen)
    assert again.chosen == model.chosen == chosen[0].result.chosen and not again.open
    x = chosen[0].train.images[:5]
    assert torch.equal(again(x), model.eval()(x)) and again.options == model.options


@pytest.mark.parametrize("new", [True, False])
def test_gone_on_with_it_is_not_chosen_again(chosen, tmp_path, new):
    """From a checkpoint, by a model made anew and by the one that was trained: the same bits."""
    run = chosen[0]
    shutil.copytree(run.out, tmp_path, dirs_exist_ok=True)
    before = {k: v.clone() for k, v in run.model.adapter_state_dict().items()}
    model = create(tiny_backbone(), num_classes=4, seed=0) if new else run.model
    splits = SimpleNamespace(train=quadrants(48, 1), val=None)
    result = fit(model, splits, CONFIG, tmp_path, resume="previous", progress=False)
    assert model.chosen == run.result.chosen  # seconds too: it was read from there
    assert same_bits(model.adapter_state_dict(), before)
    assert result.steps == run.result.steps


def test_a_probe_takes_what_it_likes_where_colour_decides(tmp_path):
    splits = SimpleNamespace(train=colours(30, 1), val=colours(30, 2))
    given = {"reading": "auto", "grid": 2}
    model = create(tiny_backbone(), "probe", num_classes=3, seed=0, **given)
    found = fit(model, splits, CONFIG, tmp_path, progress=False)
    assert found.history[-1]["val_accuracy"] > 0.9 and found.chosen["features_alone"] is None
    assert found.chosen["grid"] == 2


def alone(n, labels=None, **more):
    """Splits of `n` images for training, whose labels nothing tells beforehand."""
    train = colours(n, 1)
    labels = train.labels if labels is None else torch.tensor(labels)
    items = [(image, int(label)) for image, label in zip(train.images, labels, strict=True)]
    return SimpleNamespace(train=items, val=None)


@pytest.mark.parametrize("labels", [None, [0] * 6 + [1] * 5 + [2]])
def test_data_without_known_labels_and_a_class_of_one_image(tmp_path, labels):
    model = create(tiny_backbone(), "probe", num_classes=3, reading="auto", grid=1, pooled=True)
    assert fit(model, alone(12, labels), CONFIG, tmp_path, progress=False).chosen["images"] == 12


def test_with_too_few_images_or_too_much_to_keep_it_is_as_with_fixed(tmp_path, monkeypatch):
    cases = [(3, 2**30), (12, 12 * 4 * 32)]
    for turn, (n, limit) in enumerate(cases):
        monkeypatch.setattr(features, "MEMORY_LIMIT", limit)
        found = []
        for reading in ("auto", "fixed"):
            model = create(tiny_backbone(), num_classes=3, seed=0, reading=reading)
            told = fit(model, alone(n), CONFIG, tmp_path / f"{turn}{reading}", progress=False)
            assert not told.chosen and not model.open
            found.append(model.reading)
        assert found[0] == found[1]


def test_what_cannot_be_learnt_from_is_told_as_ever(tmp_path):
    def run(splits, name):
        model = create(tiny_backbone(), num_classes=3)
        fit(model, splits, CONFIG, tmp_path / name, progress=False)

    with pytest.raises(DataError, match="out of range"):
        run(alone(12, [0, 1, 3] * 4), "labels")
    broken = alone(12)
    broken.train[3][0].fill_(math.nan)
    with pytest.raises(TrainingError, match="nan"):
        run(broken, "nan")


# -- from before there was a choice


@pytest.mark.parametrize(
    "method, options, later",
    [
        ("probe", {}, ("reading", "at", "pooled")),
        ("lion", {"reading": "fixed", "state_dim": 4, "grid": 2}, ("reading", "pooled", "front")),
    ],
)
def test_checkpoints_and_adapters_of_before(tmp_path, method, options, later):
    def model():
        return create(tiny_backbone(), method, num_classes=3, seed=0, **options)

    first, splits = model(), SimpleNamespace(train=colours(12, 1), val=None)
    fit(first, splits, CONFIG, tmp_path, progress=False)
    folder = tmp_path / "checkpoints"
    found = checkpoints.read_checkpoint(checkpoints.list_checkpoints(folder)[-2])
    shutil.rmtree(folder)
    state = {k: v for k, v in found.state.items() if k != "chosen"}
    known = {k: v for k, v in first.options.items() if k not in later}
    known |= {"grid": None} if method == "probe" else {}
    state["fingerprint"] = state["fingerprint"] | {"options": known}
    written = checkpoints.write_checkpoint(folder, state["progress"]["step"], found.tensors, state)
    again = model()
    fit(again, splits, CONFIG, tmp_path, resume=written.name, progress=False)
    assert same_bits(again.adapter_state_dict(), first.adapter_state_dict())


def test_a_store_takes_what_was_made_for_the_choice():
    store, model, items = (
        FeatureStore(),
        create(tiny_backbone(), "probe", num_classes=4, reading="auto"),
        quadrants(12, 1),
    )
    told = choosing.choose(model, items, store, CONFIG)
    assert items.reads == [1] * 12
    model.settle({k: told[k] for k in ("at", "grid", "pooled")}, 0)
    kept, _ = store.features(model, items, items, CONFIG.batch_size)
    assert items.reads == [1] * 12
    assert torch.equal(kept.tensors[0], features.encode(model, items, CONFIG.batch_size).tensors[0])
    assert torch.equal(kept.tensors[1], items.labels)


@pytest.mark.parametrize("wrong", [3, {}, {"words": "block 1"}, {"at": [1], "loss": "low"}])
def test_a_choice_that_no_run_wrote_is_refused(wrong, tmp_path):
    create(tiny_backbone(), num_classes=3).save_adapter(tmp_path)
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chosen": wrong}))
    with pytest.raises(AdapterError, match="chosen"):
        lion_fast.load_adapter(tmp_path, tiny_backbone())
