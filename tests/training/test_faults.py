"""What goes wrong around a run: a disk, a log, a folder, an edited checkpoint, data of another form."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from training_helpers import QUICK, Tensors, random_splits, read_csv, same_bits, tiny_model

from lion_fast.data import load_data
from lion_fast.errors import CheckpointError, DataError, LionError, OptionError
from lion_fast.training import TrainConfig, TrainingError, checkpoints, evaluate, fit, predict

CONFIG = TrainConfig(**QUICK, log_every=1, checkpoint_every=2)  # six steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing happens to ends with."""
    model, out = tiny_model("probe"), tmp_path_factory.mktemp("whole")
    fit(model, random_splits(), CONFIG, out)
    return model.adapter_state_dict(), out


@pytest.fixture
def at_step():
    """Does something after an optimiser step."""
    handles = []

    def register(step, do):
        done = iter(range(1, 1000))
        handles.append(register_optimizer_step_post_hook(lambda *_: do() if next(done) == step else None))
        return handles[-1]

    yield register
    for handle in handles:
        handle.remove()


# -- files


def fill(path):
    """From now on the disk of this file is full."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("what", ["steps.csv full", "metrics.csv in the way", "folder gone"])
def test_a_log_that_cannot_be_written_stops_with_a_checkpoint_to_go_on_from(tmp_path, what, whole, at_step):
    out = tmp_path / "out"
    if what == "steps.csv full" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    harm = {
        "steps.csv full": lambda: fill(out / "steps.csv"),
        "metrics.csv in the way": lambda: (out / "metrics.csv").mkdir(),
        "folder gone": lambda: shutil.rmtree(out),
    }[what]
    handle = at_step(1, harm)
    with pytest.raises(CheckpointError, match="resume from"):
        fit(tiny_model("probe"), random_splits(), CONFIG, out)
    handle.remove()
    if what == "metrics.csv in the way":
        (out / "metrics.csv").rmdir()
    elif what == "steps.csv full":
        (out / "steps.csv").unlink()
    model = tiny_model("probe", seed=5)
    assert fit(model, random_splits(), CONFIG, out, resume=True).steps == 6
    assert same_bits(model.adapter_state_dict(), whole[0])


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, whole, at_step):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))

    handle = at_step(4, limit)
    try:
        with pytest.raises(CheckpointError, match="step-0000000"):
            fit(tiny_model("probe"), random_splits(), CONFIG, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    handle.remove()
    model = tiny_model("probe", seed=5)
    assert fit(model, random_splits(), CONFIG, tmp_path, resume=True).steps == 6
    assert same_bits(model.adapter_state_dict(), whole[0])
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")][-2:] == ["5", "6"]


@pytest.mark.parametrize("harm", [b"\xff\xfe\x00", b"a,b\n1,2\n", b"step,loss\n1,2\nx,y\n3,4\n", None])
def test_a_damaged_log_is_kept_aside_and_the_run_goes_on(whole, tmp_path, harm):
    out = shutil.copytree(whole[1], tmp_path / "run")
    log = out / "steps.csv"
    log.unlink()
    log.mkdir() if harm is None else log.write_bytes(harm)
    for turn in range(2):
        model = tiny_model("probe", seed=5)
        fit(model, random_splits(), CONFIG, out, resume="previous")
        assert same_bits(model.adapter_state_dict(), whole[0])
        assert [row["step"] for row in read_csv(log)] == ["5", "6"], turn
    aside = out / "steps.csv.damaged"
    assert aside.is_dir() if harm is None else aside.read_bytes() == harm
    assert not list(out.glob("steps.csv.damaged?*"))


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to nothing in nothing"])
def test_an_output_that_is_no_folder_is_told(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "out"
    out.symlink_to(tmp_path / ("file" if kind == "link to a file" else "no" if kind != "file" else "file"))
    if kind == "file":
        out = tmp_path / "file"
    with pytest.raises(LionError, match="cannot"):
        fit(tiny_model("probe"), random_splits(), CONFIG, out)
    assert (tmp_path / "file").read_text() == "x"


# -- checkpoints edited by hand, with checksums that are right


def seal(path):
    files = {}
    for name in ("tensors.safetensors", "state.json"):
        data = (path / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def progress(**values):
    return lambda state: {**state, "progress": {**state["progress"], **values}}


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: [], lambda state: {}, lambda state: {**state, "fingerprint": 3},
        lambda state: {k: v for k, v in state.items() if k != "progress"},
        lambda state: {k: v for k, v in state.items() if k != "scaler"},
        lambda state: {**state, "sums": {"loss": "x", "correct": 0, "images": 0}},
        lambda state: {**state, "scaler": {"scale": 2}},
        progress(step="4"), progress(step=4.5), progress(step=-1), progress(step=10**30), progress(more=1),
        progress(history=[]), progress(history=[1]), progress(history=[{}]), progress(history={}),
        progress(seconds="1"), progress(diagnostics=[1]), progress(diagnostics={"a": []}),
    ],
)  # fmt: skip
def test_a_state_edited_by_hand_is_refused(whole, tmp_path, edit):
    out = shutil.copytree(whole[1], tmp_path / "run")
    path = checkpoints.list_checkpoints(out / "checkpoints")[-1]
    file = path / "state.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    seal(path)
    with pytest.raises(CheckpointError, match="cannot be used"):
        fit(tiny_model("probe"), random_splits(), CONFIG, out, resume=True)
    assert fit(tiny_model("probe"), random_splits(), CONFIG, out, resume="previous").steps == 6


MOMENT = "optimizer/head.weight/exp_avg"


@pytest.mark.parametrize(
    "edit",
    [
        {"loose": torch.zeros(1)}, {"model/head.weight": torch.zeros(2, 2)}, {"model/head.weight": None},
        {"best/head.weight": torch.zeros(2, 2)}, {MOMENT: torch.zeros(5)}, {MOMENT: None},
        {MOMENT: torch.full((3, 32), torch.nan)}, {MOMENT: torch.zeros(3, 32, dtype=torch.int64)},
        {"optimizer/head.weight/more": torch.zeros(3, 32)},
    ],
)  # fmt: skip
def test_tensors_edited_by_hand_are_refused(whole, tmp_path, edit):
    out = shutil.copytree(whole[1], tmp_path / "run")
    path = checkpoints.list_checkpoints(out / "checkpoints")[-1]
    tensors = load_file(path / "tensors.safetensors") | edit
    assert edit.keys() - {"loose"} <= load_file(path / "tensors.safetensors").keys() | {
        "optimizer/head.weight/more"
    }
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "tensors.safetensors")
    seal(path)
    with pytest.raises(CheckpointError, match="cannot be used"):
        fit(tiny_model("probe"), random_splits(), CONFIG, out, resume=True)


# -- data


class Wavering(Dataset):
    """As an image set with a random transform: another tensor each time it is read."""

    def __init__(self, items):
        self.items, self.reads = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        image, label = self.items[i]
        return image + torch.randn(()), label


STATES = {"form": "states", "state_dim": 4, "grid": 2, "reading": "fixed"}


@pytest.mark.parametrize(
    "wrap",
    [lambda d: d, lambda d: Subset(d, range(len(d))), lambda d: ConcatDataset([Subset(d, range(len(d)))])],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_what_may_be_random_behind_any_wrapper_is_read_in_every_epoch(tmp_path, wrap, part):
    splits, config = random_splits(), TrainConfig(**QUICK | {"epochs": 3})
    source = Wavering(getattr(splits, part))
    setattr(splits, part, wrap(source))
    told = fit(tiny_model(**STATES), splits, config, tmp_path)
    assert not told.cached_features and source.reads == 3 * len(source)


def test_what_is_known_to_be_constant_is_read_once_behind_wrappers_too(tmp_path, images):
    splits = random_splits()
    splits.train = Subset(ConcatDataset([TensorDataset(splits.train.images, splits.train.labels)]), range(20))
    assert fit(tiny_model(**STATES), splits, TrainConfig(**QUICK), tmp_path / "a").cached_features
    splits, found = load_data(images), []
    for number, wrap in enumerate((lambda d: d, lambda d: Subset(d, range(len(d))))):
        model = tiny_model(**STATES)
        given = replace(splits, train=wrap(splits.train))
        assert fit(model, given, TrainConfig(**QUICK), tmp_path / str(number)).cached_features
        found.append(model.adapter_state_dict())
    assert same_bits(*found)


def test_an_augmentation_that_would_not_be_applied_is_refused(tmp_path, images):
    config = TrainConfig(**QUICK, augment="flip")
    with pytest.raises(OptionError, match="augment"):
        fit(tiny_model("probe"), random_splits(), config, tmp_path)
    splits = load_data(images)
    own = Subset(splits.train.with_transform(lambda image: image), range(9))
    with pytest.raises(OptionError, match="augment"):
        fit(tiny_model("probe"), replace(splits, train=own), config, tmp_path)


class Items(Dataset):
    """Items of any form."""

    def __init__(self, item, n=8):
        self.item, self.n = item, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item(i)


IMAGE = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    "item",
    [
        lambda i: {"image": IMAGE, "label": 0}, lambda i: (IMAGE, 0, i), lambda i: IMAGE,
        lambda i: (IMAGE.numpy(), 0), lambda i: (IMAGE, 0.5), lambda i: (IMAGE, "cat"), lambda i: (IMAGE, ()),
        lambda i: (IMAGE, torch.tensor([0])), lambda i: (torch.zeros(3, 32 + i, 32), 0), lambda i: (IMAGE, 7),
        lambda i: (IMAGE, -1), lambda i: (IMAGE, 0) if i < 5 else [][0],
    ],
)  # fmt: skip
def test_items_of_another_form_are_told(tmp_path, item):
    splits = random_splits()
    splits.train = Items(item)
    with pytest.raises(DataError):
        fit(tiny_model("probe"), splits, TrainConfig(**QUICK), tmp_path)
    with pytest.raises(DataError):
        evaluate(tiny_model("probe"), splits.train)


def test_an_error_of_a_reading_process_is_one_line():
    with pytest.raises(DataError) as told:
        evaluate(tiny_model("probe"), Items(lambda i: (IMAGE, 0.5)), num_workers=1)
    assert "\n" not in str(told.value)


class Stream(IterableDataset):
    def __iter__(self):
        yield IMAGE, 0


@pytest.mark.parametrize(
    "train", [Stream(), DataLoader(random_splits().train), "photos", [], 7, Tensors(IMAGE[None], ["cat"])]
)
def test_what_is_no_data_set_is_told(tmp_path, train):
    splits = random_splits()
    splits.train = train
    with pytest.raises(DataError):
        fit(tiny_model("probe"), splits, TrainConfig(**QUICK), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_whole_type_train_alike(tmp_path, whole, dtype):
    splits = random_splits()
    for items in (splits.train, splits.val):
        items.labels = items.labels.to(dtype)
    model = tiny_model("probe")
    fit(model, splits, CONFIG, tmp_path)
    assert same_bits(model.adapter_state_dict(), whole[0])
    splits.train = TensorDataset(splits.train.images, splits.train.labels)
    model = tiny_model("vpt")
    assert fit(model, splits, TrainConfig(**QUICK), tmp_path / "images").steps == 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_no_result(tmp_path, value):
    splits = random_splits()
    splits.val.images[3, 0, 0, 0] = value
    for judge in (evaluate, predict):
        with pytest.raises(DataError, match="finite"):
            judge(tiny_model("probe"), splits.val)
    with pytest.raises(TrainingError, match="finite.*step-00000002"):
        fit(tiny_model("probe"), splits, CONFIG, tmp_path)
    assert checkpoints.list_checkpoints(tmp_path / "checkpoints")
    for name in ("train", "val"):
        with pytest.raises(DataError, match="by number"):
            (evaluate if name == "train" else predict)(tiny_model("probe"), DataLoader(splits.train))


def test_a_model_with_nothing_to_train_and_no_model_are_told(tmp_path):
    for model in (
        tiny_model("lora").merge(),
        tiny_model("probe").requires_grad_(False),
        torch.nn.Linear(2, 3),
    ):
        with pytest.raises(OptionError):
            fit(model, random_splits(), TrainConfig(**QUICK), tmp_path)
    with pytest.raises(OptionError, match="TrainConfig"):
        fit(tiny_model("probe"), random_splits(), {"epochs": 1}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pruned_is_told_before_an_image_is_read(tmp_path):
    splits = random_splits()
    splits.train = Wavering(splits.train)
    for model, more in (
        (tiny_model("probe"), {}),
        (tiny_model(**STATES), {"prune_granularity": "block", "prune_block": 16}),
    ):
        with pytest.raises(OptionError):
            fit(model, splits, TrainConfig(**QUICK, prune=0.5, **more), tmp_path)
    assert splits.train.reads == 0
