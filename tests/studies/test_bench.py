"""The bench suite: what it counts against counts by hand, what it times against known delays, its files."""

import csv
import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lion_fast import create, load_backbone
from lion_fast.backbones import at_work
from lion_fast.backbones.at_work import AtWork
from lion_fast.commands import bench as command
from lion_fast.commands.main import main
from lion_fast.errors import DataError, OptionError
from lion_fast.methods import available
from lion_fast.studies import environment
from lion_fast.studies.cost import flops, measure, memory, plan, plots, report, rows
from lion_fast.studies.cost.measure import FLOOR, Wrong, distance, quantiles
from lion_fast.studies.cost.rows import Contender, Setting, Store

TINY = "vit_tiny_patch16_224"
SETTING = Setting(TINY, "train", 2, img_size=32)
# The setting of commands that a test can wait for.
SMALL = ["--backbones", TINY, "--img-size", "32", "--batch-sizes", "1"]


def vit(depth=1, size=32, **options):
    return load_backbone(TINY, pretrained=False, img_size=size, depth=depth, **options)


@pytest.fixture(scope="module")
def measured():
    """One small training and one inference run, shared by the tests that look at rows."""
    torch.manual_seed(0)
    some = [
        Contender("lion", form="residual"),
        *(Contender("vpt", (("length", 3),), form) for form in ("exact", "naive")),
    ]
    train = measure.measure(SETTING, [*some, Contender("probe")], rounds=3)
    return train + measure.measure(Setting(TINY, "infer", 2, img_size=32), some, rounds=3)


def row_of(found, label, mode="train"):
    return next(row for row in found if row["label"] == label and row["mode"] == mode)


# -- memory, counted


def kept_by(module, x, head=None):
    with memory.SavedTensors(module, [x]) as kept:
        module(x).sum().backward()
    return kept


def test_kept_tensors_by_hand():
    """A frozen linear keeps nothing, a trained one its input, GELU its input, a norm input and statistics."""
    x = torch.randn(6, 8, requires_grad=True)
    frozen = nn.Linear(8, 4).requires_grad_(False)
    assert kept_by(frozen, x).total == 0
    trained = nn.Linear(8, 4)
    with memory.SavedTensors(trained) as kept:  # the input counts when it is not said to be there anyway
        trained(x * 1.0).sum()
    assert kept.total == 4 * 6 * 8
    stack = nn.Sequential(frozen, nn.GELU())
    assert kept_by(stack, x).total == 4 * 6 * 4
    norm = nn.Sequential(frozen, nn.LayerNorm(4).requires_grad_(False))
    assert kept_by(norm, x).total == 4 * (6 * 4 + 2 * 6)


def test_a_storage_kept_twice_counts_once_and_a_view_counts_whole():
    x = torch.randn(5, 10, requires_grad=True)
    with memory.SavedTensors(nn.Identity()) as kept:
        y = x + 1
        out = y.sin() + y.cos() + y[:, :2].exp().sum()
    # y (whole, kept by sin and cos), exp's output (5 x 2)
    assert kept.total == 4 * (50 + 10)
    out.sum().backward()
    with memory.SavedTensors(nn.Identity()) as kept:
        out = (x + 1)[:, :2].sin()
    assert kept.total == 4 * 50
    out.sum().backward()


def test_what_is_not_kept_any_more_does_not_count_again():
    x = torch.randn(3, 4, requires_grad=True)
    with memory.SavedTensors(nn.Identity()) as kept:
        for _ in range(4):
            with torch.no_grad():
                x.exp()
    assert kept.total == 0 and kept.tensors == []


@pytest.mark.parametrize("terms", [1, 8])
def test_owners_of_a_lion_step_by_hand(terms):
    """Backbone: 10 rows of D per block and token, the last norm's; method: what the equilibria keep in R."""
    B, N, D, R, h = 3, 5, 192, 8, 3
    model = create(vit(), "lion", num_classes=4, form="residual", state_dim=R, neumann_terms=terms)
    x = torch.randn(B, 3, 32, 32)
    with memory.SavedTensors(model, [x]) as kept:
        logits = model(x)
    found = kept.bytes
    # a block's 10 D, its norms' mean and deviation, logsumexp; the last norm's input and statistics.
    # The block's input is what the input end gave, the last norm's output what the output end keeps.
    assert found["backbone"] == 4 * B * N * (10 * D + 4 + h + D + 2)
    # both ends: pre-activation (R) and input rows (D); W's bounding keeps R x R things beside, many times
    rows_kept = 4 * B * N * 2 * (D + R)
    assert rows_kept < found["method"] <= rows_kept + 2 * 4 * 40 * R * R
    # the head keeps a view, its class tokens, of all rows
    assert found["head"] == 4 * B * N * D
    assert found["loss"] == 0 and kept.total == sum(found.values())
    logits.sum().backward()


def test_recomputed_stretches_count_what_they_keep():
    """torch's checkpoint keeps its inputs out of autograd's sight."""
    from lion_fast.backbones import cheaper as frozen

    linear = nn.Linear(4, 4)
    x = torch.randn(7, 4, requires_grad=True)
    with memory.SavedTensors(linear) as kept:
        out = frozen.again(linear, lambda t: linear(t).exp().sin(), x * 2)
    assert kept.total == 4 * 7 * 4
    out.sum().backward()
    assert frozen.KEEPS == []


class Outer(nn.Module):
    """Calls a module inside; notes who is at work before, in and behind it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.work, self.seen = inner, None, []

    def forward(self, x):
        self.seen.append(self.work.name)
        try:
            return self.inner(x)
        finally:
            self.seen.append(self.work.name)


def test_who_is_at_work():
    inner, unknown = nn.Linear(2, 2), nn.Identity()
    outer, deaf = Outer(inner), Outer(unknown)
    names = {id(outer): "backbone", id(inner): "method"}
    with AtWork(names, outside="loss") as work:
        outer.work = deaf.work = work
        inner.register_forward_hook(lambda *_: outer.seen.append(work.name))
        outer(torch.ones(2))
        with work.at(inner):
            deaf(torch.ones(2))  # a module without a name works for who called it
            assert work.name == "method"
        assert deaf.seen == ["method", "method"] and work.name == "loss"
        with pytest.raises(RuntimeError):  # an error inside: nobody stays at work
            outer(torch.ones(3))
        assert work.name == "loss"
    # a module's own hooks run behind it, for who called it
    assert outer.seen == ["backbone", "backbone", "backbone", "backbone", "backbone"]
    assert at_work.WATCHERS == [] and not at_work.works_for_first(lambda module: at_work.WATCHERS)(inner)


def test_owners_are_told_by_module_and_not_by_file():
    """A method's module in a frozen block is the method's, a block run piece by piece the backbone's."""
    x = torch.randn(2, 3, 32, 32)

    class Inside(nn.Module):  # defined here, in no file that a rule could name
        def forward(self, rows):
            return (rows * 1.5).exp()  # keeps its output

    model = create(vit(), "probe", num_classes=4)
    model.inside = Inside()
    blocks = model.backbone.blocks
    blocks[0].ls1 = nn.Sequential(nn.Identity(), model.inside)
    rows = torch.randn(2, 5, 192, requires_grad=True)
    with memory.SavedTensors(model, [rows]) as kept:
        out = blocks(rows)
    assert kept.bytes["method"] == 4 * 2 * 5 * 192 and kept.bytes["backbone"] > 0
    del out
    for backbone, method in (
        (vit(), "vpt"),
        (vit(memory="save"), "vpt"),
        (load_backbone("swin_tiny_patch4_window7_224", pretrained=False, img_size=64), "vpt"),
        (vit(depth=2), "cvpt"),
    ):
        model = create(backbone, method, num_classes=4, length=2)
        x = torch.randn(1, 3, *[backbone.img_size] * 2)
        with memory.SavedTensors(model, [x]) as kept, torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x), torch.tensor([1]))
        # prompts are rows that the frozen attention reads: these methods keep nothing of their own
        assert kept.bytes["method"] == 0 < kept.bytes["backbone"]
        # log-softmax, the labels, the number of them
        assert kept.bytes["loss"] == 4 * 4 + 8 + 4


def test_blocks_of_the_allocator_belong_to_who_keeps_them():
    def snapshot(*blocks):
        inside = [{"state": state, "size": size, "requested_size": size - 12} for state, size in blocks]
        return {"segments": [{"address": 1024, "blocks": inside}, {"address": 9216, "blocks": inside[:1]}]}

    used, free = "active_allocated", "inactive"
    before = snapshot((used, 512), (free, 1024), (used, 512))
    after = snapshot((used, 512), (used, 1024), (used, 512), (free, 512), (used, 2048))
    # blocks at 1024, 1536, 2560, 3072 (free), 3584 and 9216; of these 1536 and 3584 are new
    found = memory.allocated_since(before, after, {1536: "backbone"})
    assert found == {"backbone": 1012, "method": 0, "head": 0, "loss": 0, "unkept": 2036}
    # what is kept at an address that was in use before has taken the place of something else
    assert memory.allocated_since(before, after, {2560: "head"})["head"] == 500


def test_the_allocator_is_asked_before_and_behind_the_forward(monkeypatch):
    """The way through `cuda_activations` with a snapshot of its own; a GPU test compares the numbers."""
    kept, snapshots = [], []

    def snapshot():
        blocks = [
            {"address": t.data_ptr(), "blocks": [{"state": "active_allocated", "size": t.nbytes}]}
            for t in kept
        ]
        snapshots.append(len(blocks))
        return {"segments": blocks}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    model = create(vit(), "probe", num_classes=4)

    def forward():
        features = model.backbone(torch.randn(2, 3, 32, 32)).clone()
        kept.extend([features, model.head(features)])
        return kept[-1]

    found = memory.cuda_activations(model, forward)
    assert snapshots == [0, 2]
    assert found == {"backbone": 0, "method": 0, "head": 4 * 2 * 192, "loss": 0, "unkept": 4 * 2 * 4}


def test_resident_bytes_by_hand():
    model = create(vit(), "probe", num_classes=10)
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    head = 4 * (192 * 10 + 10)
    assert memory.resident_bytes(model, optimizer)["optimiser"] == 0
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    told = memory.resident_bytes(model, optimizer)
    assert told["method_weights"] == told["gradients"] == head
    assert told["optimiser"] == 2 * head + 2 * 4  # two moments, a step count for each of two tensors
    assert told["backbone_weights"] == 4 * sum(p.numel() for p in model.backbone.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["plain", "save"])
@pytest.mark.parametrize("method", ["lion", "vpt", "full"])
def test_the_count_agrees_with_the_cuda_allocator(method, save):
    backbone = load_backbone("vit_small_patch16_224", pretrained=False, depth=4, memory=save)
    model = create(backbone, method, num_classes=10).cuda().train()
    x = torch.randn(16, 3, 224, 224, device="cuda")
    model(x).sum().backward()  # workspaces and caches are there from now on
    before = torch.cuda.memory_allocated()
    with memory.SavedTensors(model, [x]) as kept:
        out = model(x)
    by_allocator = torch.cuda.memory_allocated() - before
    assert abs(kept.total - by_allocator) <= 0.05 * by_allocator
    del out
    found = memory.cuda_activations(model, lambda: model(x), [x])
    assert abs(sum(found.values()) - by_allocator) <= 0.05 * by_allocator
    # owner by owner, but for the allocator's rounding
    for owner, size in kept.bytes.items():
        assert size <= found[owner] <= size + 0.05 * by_allocator


# -- products, counted

# peers' table of GMACs per image, ViT-B/16 and ViT-Ti/16 at 224
TABLE = {
    (768, "naive"): {0: 17.56, 10: 18.49, 50: 22.22, 100: 26.97, 200: 36.74},
    (768, "exact"): {10: 17.60, 50: 17.75, 100: 17.93, 200: 18.29},
    (768, "cvpt"): {1: 20.35, 10: 20.39, 50: 20.53, 100: 20.72, 200: 21.08},
    (192, "naive"): {0: 1.253, 10: 1.325, 50: 1.621, 100: 2.012, 200: 2.863},
    (192, "exact"): {10: 1.263, 50: 1.299, 100: 1.344, 200: 1.435},
    (192, "cvpt"): {1: 1.429, 10: 1.437, 50: 1.473, 100: 1.519, 200: 1.609},
}


@pytest.mark.parametrize("width, form", TABLE)
def test_the_formula_gives_the_table(width, form):
    for prompts, expected in TABLE[width, form].items():
        found = flops.vit_macs(12, width, prompts=prompts, form=form) / 1e9
        # half a unit of the last digit; two entries of the table are 0.54 off
        assert abs(found - expected) <= 0.55 * (1e-2 if width == 768 else 1e-3), prompts


@pytest.mark.parametrize(
    "method, form, kind", [("vpt", "naive", "naive"), ("vpt", "exact", "exact"), ("cvpt", "exact", "cvpt")]
)
def test_counted_products_are_the_formula(method, form, kind):
    """What runs, counted op by op, at full size and in every prompt length; the head counts beside."""
    if method not in available():
        pytest.skip(f"{method} is not there")
    depth, x = 2, torch.randn(1, 3, 224, 224)
    backbone = vit(depth, 224)
    for prompts in (10, 50):
        model = create(backbone, method, num_classes=10, length=prompts, form=form).eval()
        with torch.no_grad():
            model(x)  # fills the cache
            found = flops.counted_macs(lambda: model(x))  # noqa: B023
        assert found == flops.vit_macs(depth, 192, prompts=prompts, form=kind) + 192 * 10


@pytest.mark.parametrize("size", ["s", "b"])
def test_counted_products_of_the_table_backbones(size):
    name, width = {"s": ("vit_small_patch16_224", 384), "b": ("vit_base_patch16_224", 768)}[size]
    backbone = load_backbone(name, pretrained=False, depth=1)
    with torch.no_grad():
        found = flops.counted_macs(lambda: backbone(torch.randn(1, 3, 224, 224)))
    assert found == flops.vit_macs(1, width)


def test_counted_products_of_an_equilibrium_and_of_a_backward():
    D, R, T = 12, 4, 6
    from lion_fast import LionLayer

    layer = LionLayer(D, R, tol=0.0, max_iter=5, neumann_terms=3)
    x = torch.randn(T, D, requires_grad=True)
    bound = flops.counted_macs(layer.recurrence_matrix)
    with torch.no_grad():
        found = flops.counted_macs(lambda: layer(x)) - bound
    # five applications from zero: four products with W
    assert found == T * (2 * D * R + 4 * R * R)
    weight = torch.randn(7, D)
    forward = flops.counted_macs(lambda: F.linear(x, weight))
    assert forward == T * D * 7
    assert flops.counted_macs(lambda: F.linear(x, weight).sum().backward()) == 2 * T * D * 7
    weight.requires_grad_()
    assert flops.counted_macs(lambda: F.linear(x, weight).sum().backward()) == 3 * T * D * 7


# -- times


def test_turns_are_interleaved_and_ratios_are_of_one_round(monkeypatch):
    """A machine that slows down by and by must not show in ratios: twice the floor, all drifting."""
    order, clock = [], [0.0]

    class Fake:
        def __init__(self, name, cost):
            self.name, self.cost = name, cost

        def run(self):
            order.append(self.name)
            clock[0] += self.cost * (1 + 0.1 * len(order))

        def _wait(self):
            pass

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    a, b = Contender("a"), Contender("b")
    steps = {FLOOR: Fake("floor", 1.0), a: Fake("a", 2.0), b: Fake("b", 3.0)}
    times, floors = measure._take_turns(steps, 6, torch.device("cpu"), lambda i: None, pytest.fail)
    timed = order[6:]  # after two runs each to warm up
    assert timed[:8] == ["floor", "a", "b", "floor", "floor", "b", "a", "floor"] and len(timed) == 24
    for contender, ratio in ((a, 2.0), (b, 3.0)):
        told = measure._summary(times[contender], floors[contender], 4)
        for name in ("ratio", "ratio_q20", "ratio_q80"):
            assert told[name] == pytest.approx(ratio, rel=1e-12)
    told = measure._summary(times[a], floors[a], 4)
    assert told["seconds_q80"] > 1.4 * told["seconds_q20"]  # the drift shows in the times
    assert told["images_per_second"] == 4 / told["seconds"] and told["rounds"] == 6
    assert len(times[FLOOR]) == 6 and floors[FLOOR] == times[FLOOR]


def test_quantiles():
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    values = [float(v) for v in range(11)]
    assert quantiles(values[::-1]) == (5.0, 2.0, 8.0)


def test_a_longer_step_is_timed_longer(monkeypatch):
    """The whole way from a model to a row: a known delay in one contender shows in its time and ratio.

    By a clock of the test's own, a millisecond a look: a busy machine is as good as a quiet one.
    """
    build, now = measure.build, [0.0]

    def look():
        now[0] += 0.001
        return now[0]

    def delay():
        now[0] += 0.25

    clock = SimpleNamespace(perf_counter=look, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(measure, "time", clock)

    def slow(backbone, contender):
        model = build(backbone, contender)
        if contender.form == "naive":
            features = model.features
            model.features = lambda x: (delay(), features(x))[1]
        return model

    monkeypatch.setattr(measure, "build", slow)
    found = measure.measure(
        Setting(TINY, "infer", 1, img_size=32),
        [Contender("vpt", (("length", 2),), form) for form in ("exact", "naive")],
        rounds=3,
    )
    exact, naive = found[1:]
    assert naive["status"] == exact["status"] == "ok"
    assert exact["seconds"] == pytest.approx(0.001) and naive["seconds"] == pytest.approx(0.251)
    assert naive["images_per_second"] == pytest.approx(1 / 0.251)
    # each ratio is of its own round's floor
    assert exact["ratio"] == pytest.approx(1) and naive["ratio"] == pytest.approx(251)


# -- rows


def test_a_row_says_everything(measured):
    row = row_of(measured, "lion:residual")
    assert row["status"] == "ok" and row["held_in"] == "fp32" and row["seed"] == 0
    assert row["weights_source"] == "random" and len(row["weights_sha256"]) == 64
    assert {"torch", "timm", "lion_fast", "python"} <= row["versions"].keys() and row["device_name"]
    assert "git" in row and "git_changed" in row and row["threads"] == torch.get_num_threads()
    assert row["img_size"] == 32 and row["interpolation"] and len(row["mean"]) == 3
    for name in ("seconds", "seconds_q20", "seconds_q80", "ratio", "images_per_second", "floor_seconds"):
        assert row[name] > 0
    assert row["seconds_q20"] <= row["seconds"] <= row["seconds_q80"] and row["rounds"] == 3
    assert row["build_seconds"] > 0 and row["first_step_seconds"] > 0 and row["peak_bytes"] >= 0
    assert row["diagnostics"]["input_iterations"] >= 1
    D, R, K = 192, 32, measure.NUM_CLASSES
    assert row["parameters"] == 2 * (2 * D * R + R * R + R + D)
    assert row["parameters_with_head"] == row["parameters"] + K * (D + 1)
    assert row["adapter_bytes"] > 4 * row["parameters_with_head"]
    json.dumps(row)


def test_the_two_forms_of_lion():
    """States keep nothing in the backbone and run no backward through it: by hand, against the floor."""
    assert measure.forms_of("lion") == ["states", "residual"]
    assert [c.label() for c in plan.contenders(TINY, "train", methods=("lion",))] == [
        "lion:states",
        "lion:residual",
    ]
    found = measure.measure(SETTING, plan.contenders(TINY, "train", methods=("lion",)), rounds=1)
    states, residual = row_of(found, "lion:states"), row_of(found, "lion:residual")
    assert [row["status"] for row in found] == ["ok"] * 3
    D, R, K = 192, 32, measure.NUM_CLASSES
    assert states["parameters"] == R * D + R * R + R
    assert states["parameters_with_head"] == states["parameters"] + K * (D + 16 * R + 1)
    assert states["activation_bytes"]["backbone"] == 0 < residual["activation_bytes"]["backbone"]
    assert {name.split("_")[0] for name in states["diagnostics"]} == {"output"}
    assert states["macs_per_image"] < residual["macs_per_image"]
    # rows from before there was a choice are residual, and nothing new has their key
    assert plots._name({"method": "lion", "form": ""}) == "lion, residual" == plots._name(residual)
    assert plots._name(states) == "lion, states" and plots._name(found[0]) == "floor"
    old = {**residual, "key": residual["key"].removesuffix(":residual"), "label": "lion", "form": ""}
    worse, remarks = report.compare([old], [states, residual])
    assert worse == [] and remarks[-1].endswith("/lion: not in the new rows") and len(remarks) == 3


def test_floors_and_training(measured):
    floor = row_of(measured, "floor")
    assert measured[0] is floor and floor["ratio"] == floor["ratio_q80"] == 1.0
    assert "parameters" not in floor and floor["resident_bytes"]["optimiser"] == 0
    # rows in, a backward to them: as much kept as by LION inside the backbone, but for its first norm's input
    lion = row_of(measured, "lion:residual")
    block_input = 4 * 2 * 5 * 192
    assert lion["activation_bytes"]["backbone"] - floor["activation_bytes"]["backbone"] == block_input
    assert row_of(measured, "probe")["activation_bytes"]["backbone"] == 0
    # training: forward, and the gradient to the input beside; the probe has no such backward
    infer = row_of(measured, "floor", "infer")["macs_per_image"]
    assert row_of(measured, "probe")["macs_per_image"] == infer + 2 * 192 * measure.NUM_CLASSES
    patches = 4 * 3 * 16**2 * 192
    assert 2 * (infer - patches) <= floor["macs_per_image"] <= 2.2 * (infer - patches)


def test_forms_were_checked(measured):
    for form in ("exact", "naive"):
        assert row_of(measured, f"vpt(length=3):{form}")["checked"].startswith("exact = naive to ")


def test_forms_that_differ_are_not_timed(monkeypatch):
    build = measure.build

    def wrong(backbone, contender):
        model = build(backbone, contender)
        if contender.form == "naive":
            model.prompts.data[0, 0, 0] += 1.0  # one entry of one prompt
        return model

    monkeypatch.setattr(measure, "build", wrong)
    pair = [Contender("vpt", (("length", 2),), form) for form in ("exact", "naive")]
    found = measure.measure(Setting(TINY, "infer", 1, img_size=32), pair, rounds=1)
    assert [row["status"] for row in found] == ["ok", "failed", "failed"]
    for row in found[1:]:
        assert row["reason"].startswith("Wrong:") and "exact and the naive form differ" in row["reason"]
        assert "seconds" not in row and "ratio" not in row
    assert not issubclass(Wrong, OptionError)


def test_what_a_backbone_cannot_is_skipped_with_the_reason():
    found = measure.measure(
        Setting("resnet10t", "infer", 1, img_size=32), [Contender("vpt", (("depth", "deep"),))], rounds=1
    )
    assert found[1]["status"] == "skipped" and found[1]["reason"]


@pytest.mark.parametrize("dtype, save", [("bf16", "plain"), ("bf16", "save"), ("fp32", "save")])
def test_other_precisions_and_memory(dtype, save):
    setting = Setting(TINY, "train", 2, dtype, memory=save, img_size=32)
    methods = [Contender("lion", form="residual"), *(Contender(m) for m in ("full",) if m in available())]
    found = measure.measure(setting, methods, rounds=1)
    assert [row["status"] for row in found] == ["ok"] * len(found), [row["reason"] for row in found]
    assert {row["memory"] for row in found} == {save}
    assert found[1]["held_in"] == dtype
    if len(found) > 2:
        assert found[2]["held_in"] == "fp32"  # a method that trains the weights holds them whole


def test_rounded_outputs_are_compared_with_float32():
    setting = Setting(TINY, "infer", 8, "bf16", img_size=32)
    floor, lion = measure.measure(setting, [Contender("lion", form="residual")], rounds=1)
    for row in (floor, lion):
        told = row["against_fp32"]
        # bfloat16 rounds to 2^-9; a dozen blocks of it, never nothing
        assert 1e-4 < told["relative"] < 3e-2 and told["sqnr_db"] > 30 and told["cosine"] > 0.999
        assert 0.5 <= told["same_class"] <= 1
    text = report.markdown([floor, lion])
    assert f"`lion:residual` {lion['against_fp32']['relative']:.2e}" in text


def test_compiled_models_are_checked_against_eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, mode=None: net)
    setting = Setting(TINY, "infer", 1, engine="compile", img_size=32)
    found = measure.measure(setting, [Contender("probe")], rounds=1)
    assert [row["checked"] for row in found] == ["compiled = eager to 0.0e+00"] * 2
    monkeypatch.setattr(torch, "compile", lambda net, mode=None: lambda x: net(x) * 1.01)
    found = measure.measure(setting, [Contender("probe")], rounds=1)
    assert (
        found[0]["status"] == "failed"
        and "compiled and eager outputs differ by 1.0e-02" in found[0]["reason"]
    )
    assert len(found) == 1  # no floor, no ratios


# -- files, resuming, comparing


def test_rows_come_back_from_their_files(tmp_path, measured):
    store = Store(tmp_path)
    store.add(measured)
    assert Store(tmp_path).rows == json.loads(json.dumps(measured)) == rows.read(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    rows.write_csv(store.rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(measured)
    lion = next(line for line in table if line["label"] == "lion:residual" and line["mode"] == "train")
    assert (
        int(lion["activation_bytes.backbone"])
        == row_of(measured, "lion:residual")["activation_bytes"]["backbone"]
    )
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(DataError, match="holds no measurement rows"):
        Store(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        rows.read(tmp_path / "nothing.json")


def test_a_run_skips_what_is_there_and_measures_what_is_not(tmp_path, monkeypatch):
    asked = []

    def fake(setting, contenders, *, device, rounds, where, say):
        asked.append((setting.mode, [c.label() for c in contenders]))
        bare = {"status": "ok", "reason": None}
        return [{"key": key, **bare, **where} for key in plan.keys(setting, contenders)]

    monkeypatch.setattr(plan, "measure", fake)
    a, b = Contender("lion", form="residual"), Contender("probe")
    one, two = Setting(TINY, "train", 2), Setting(TINY, "infer", 2)
    counts = {"settings": 1, "measured": 2, "held": 0, "left": 0, "lost": None}
    assert plan.run([(one, [a])], Store(tmp_path)) == counts
    told = plan.run([(one, [a, b]), (two, [a])], Store(tmp_path))
    assert told == counts | {"settings": 2, "measured": 4, "held": 1}
    assert asked == [("train", ["lion:residual"]), ("train", ["probe"]), ("infer", ["lion:residual"])]
    assert plan.run([(one, [a, b])], Store(tmp_path))["measured"] == 0
    assert plan.run([(one, [a, b])], Store(tmp_path), again=True)["measured"] == 3
    assert plan.run([(one, [a]), (two, [a, b])], Store(tmp_path), minutes=0)["left"] == 1
    # another revision, or a failure: measured anew
    store = Store(tmp_path)
    for row in store.rows:
        row["git_code"] = "another"
    store.write()
    assert plan.run([(two, [a])], Store(tmp_path))["measured"] == 2
    store = Store(tmp_path)
    store.add([{**store.rows[-1], "status": "failed"}])
    assert plan.run([(two, [a])], Store(tmp_path))["measured"] == 2
    assert len(Store(tmp_path).rows) == 5


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real, calls = plan.measure, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(plan, "measure", stop_at_second)
    options = [*SMALL, "--methods", "probe", "--rounds", "1"]
    argv = ["bench", *options, "--out", str(tmp_path), "--no-progress"]
    assert main(argv) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert [row["mode"] for row in rows.read(tmp_path)] == ["infer"] * 2
    assert (tmp_path / "report.md").exists()
    assert main(argv) == 0
    assert len(calls) == 3 and len(rows.read(tmp_path)) == 4


def test_the_command(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    options = [*SMALL, "--methods", "probe", "lion"]
    options += ["--rounds", "1", "--modes", "train"]
    assert main(["bench", *options, "--out", str(old), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"] == 4 and told["failed"] == [] and told["regressions"] == []
    assert "x floor" in (old / "report.md").read_text()
    # the same rows, but a million times as fast, on whatever machine: everything regressed
    body = json.loads((old / "rows.json").read_text())
    for row in body["rows"]:
        for name in ("seconds", "seconds_q20", "seconds_q80"):
            row[name] /= 1e6
    (old / "rows.json").write_text(json.dumps(body))
    again = ["bench", *options, "--out", str(new), "--compare", str(old / "rows.json")]
    assert main(again) == 1
    assert capsys.readouterr().out.count("regression: ") == 4
    assert main([*again, "--threshold", "1e9"]) == 0
    assert "no regressions" in capsys.readouterr().out


def test_wrong_options_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "never")]
    for argv, words in (
        (["--modes", "sleep"], "mode must be one of infer, train; got 'sleep'"),
        (["--methods", "magic"], "method must be one of"),
        (["--batch-sizes", "0"], "every batch size must be at least 1"),
        (["--dtypes", "int4"], "dtype must be one of fp32, bf16, fp8"),
        (["--engines", "magic"], "engine must be one of eager, compile, graphs"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--full", "--methods", "lion"], "--plan full is a plan of its own; leave out --methods"),
        (["--plan", "first", "--lengths", "5"], "--plan first is a plan of its own; leave out --lengths"),
        (["--plan", "first", "--device", "cpu"], "needs a CUDA device"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--dtypes", "fp8", "--device", "cpu"], "needs a CUDA device"),
    ):
        assert main(["bench", *argv, *out]) == 2, argv
        assert words in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "missing.json"), *out]) == 1
    assert main(["bench", "--report-only", *out]) == 1
    assert main(["bench", "--backbones", "vit_of_nobody", *out]) == 1
    assert "no backbone named 'vit_of_nobody'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def small_command(out, *more):
    """The command of a plan that a test can wait for: three contenders beside the floor of a ViT-Ti."""
    options = [*SMALL, "--rounds", "2", "--lengths", "2"]
    options += ["--methods", "probe", "vpt", *more]
    return ["bench", *options, "--rows-only", "--device", "cpu", "--no-progress", "--out", str(out)]


def test_rows_only_and_a_report_of_them_later(tmp_path, monkeypatch, capsys):
    """All of one setting is on the disk before the next begins, and nothing but rows."""
    real, seen = plan.measure, []

    def look(setting, *args, **kwargs):
        seen.append([p.name for p in tmp_path.iterdir()])
        return real(setting, *args, **kwargs)

    monkeypatch.setattr(plan, "measure", look)
    assert main(small_command(tmp_path)) == 0
    assert seen == [[], ["rows.json"]]
    before = (tmp_path / "rows.json").read_bytes()
    (tmp_path / "rows.json.new").write_bytes(before[: len(before) // 2])  # killed while it wrote the next
    assert main(["bench", "--report-only", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.md")
    assert (tmp_path / "rows.json").read_bytes() == before and len(seen) == 2
    text, table = (tmp_path / "report.md").read_text(), (tmp_path / "rows.csv").read_text()
    assert all(f"`{row['label']}`" in text and row["key"] in table for row in rows.read(tmp_path))
    assert list(tmp_path.glob("throughput-*.png"))


def test_a_contender_that_breaks_while_it_is_timed_costs_nobody_else(tmp_path, monkeypatch, capsys):
    times = []
    timed = measure._timed

    def fail(step, repeats, device):
        times.append(step.contender.label())
        if times[-1] == "vpt(length=2):naive" and times.count(times[-1]) == 3:  # two to warm up
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return timed(step, repeats, device)

    monkeypatch.setattr(measure, "_timed", fail)
    assert main(small_command(tmp_path, "--modes", "infer")) == 1
    assert "CUDA out of memory" in capsys.readouterr().out
    found = {row["label"]: row for row in rows.read(tmp_path)}
    bad = found.pop("vpt(length=2):naive")
    assert bad["status"] == "failed" and "seconds" not in bad
    assert len(found) == 4 and all(r["status"] == "ok" and r["rounds"] == 2 for r in found.values())
    times.clear()
    assert main(small_command(tmp_path, "--modes", "infer")) == 1  # tried again, beside the floor alone
    assert set(times) == {"floor", "vpt(length=2):naive"}


def test_a_floor_that_breaks_while_it_is_timed_leaves_no_ratios(monkeypatch):
    calls, timed = [], measure._timed

    def fail(step, repeats, device):
        calls.append(step.contender)
        if calls.count(FLOOR) == 4:
            raise RuntimeError("out of paper")
        return timed(step, repeats, device)

    monkeypatch.setattr(measure, "_timed", fail)
    floor, probe = measure.measure(Setting(TINY, "infer", 1, img_size=32), [Contender("probe")], rounds=2)
    assert floor["status"] == probe["status"] == "failed" and "ratio" not in probe
    assert floor["reason"] == "RuntimeError: out of paper" and floor["reason"] in probe["reason"]


STICKY = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("where", ["build", "_timed"])
def test_a_lost_device_ends_the_setting(monkeypatch, where):
    """A stand-in for a sticky CUDA error. What was ready, but not timed, is no row."""
    real = getattr(measure, where)

    def fail(first, second, *rest):
        contender = first.contender if where == "_timed" else second
        if contender.form == "naive":
            raise STICKY
        return real(first, second, *rest)

    monkeypatch.setattr(measure, where, fail)
    monkeypatch.setattr(measure, "check", lambda contender, backbones: "not here")
    some = [Contender("probe"), Contender("vpt", (("depth", "magic"),))]
    some += [Contender("vpt", (("length", 2),), form) for form in ("naive", "exact")]
    with pytest.raises(measure.DeviceLost) as lost:
        measure.measure(Setting(TINY, "infer", 1, img_size=32), some, rounds=1)
    assert lost.value.key.endswith("/vpt(length=2):naive")
    told = {row["label"]: row["status"] for row in lost.value.rows}
    assert told == {"vpt(depth=magic)": "skipped", "vpt(length=2):naive": "failed"}


def test_a_new_process_goes_on_behind_what_lost_the_device(tmp_path, monkeypatch, capsys):
    asked = []

    def fake(setting, contenders, *, where, **_):
        asked.append((setting.mode, [c.form or c.method for c in contenders]))
        found = [{"key": k, "status": "ok", "reason": None, **where} for k in plan.keys(setting, contenders)]
        bad = [i for i, c in enumerate(contenders, 1) if c.form == "naive"]
        if bad:
            row = {**found[bad[0]], "status": "failed", "reason": str(STICKY)}
            raise measure.DeviceLost(row["key"], [row]) from STICKY
        return found

    monkeypatch.setattr(plan, "measure", fake)

    def run(*more):
        asked.clear()
        return main([*small_command(tmp_path, "--modes", "infer", "train"), *more]), list(asked)

    others, everything = ["probe", "exact", "vpt"], ["probe", "exact", "naive", "vpt"]
    assert run() == (command.EXIT_LOST, [("infer", everything)])
    assert (
        f"the device failed in {TINY}@32/infer/b1/fp32/eager/vpt(length=2):naive" in capsys.readouterr().err
    )
    assert run() == (4, [("infer", others), ("train", everything)])
    # what lost it comes last, by itself, and is left alone when it did so twice
    assert run() == (4, [("train", others), ("infer", ["naive"])])
    assert run() == (4, [("train", ["naive"])])
    assert run() == (1, [])
    found = rows.read(tmp_path)
    assert [row["losses"] for row in found if row["status"] == "failed"] == [2, 2]
    assert sum(row["status"] == "ok" for row in found) == 2 * 4
    assert run("--again")[1] == [("infer", everything)]


def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    import subprocess

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    nothing = {"git": None, "git_code": None, "git_changed": None}
    monkeypatch.delenv("LION_FAST_REVISION", raising=False)
    (tmp_path / "lion_fast").mkdir()
    source = tmp_path / "lion_fast" / "__init__.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(environment, "SOURCES", tmp_path)
    assert environment.git_revision() == nothing
    git("init", "-q")
    (tmp_path / "notes.txt").write_text("somebody else's\n")
    git("add", "notes.txt")
    git("commit", "-qm", "one")
    assert environment.git_revision() == nothing  # a checkout that does not know the sources
    git("add", "lion_fast")
    git("commit", "-qm", "two")
    code = git("rev-parse", "HEAD")
    assert environment.git_revision() == {"git": code, "git_code": code, "git_changed": False}
    (tmp_path / "notes.txt").write_text("other words\n")
    git("commit", "-qam", "three")
    source.write_text("x = 2\n")
    assert environment.git_revision() == {
        "git": git("rev-parse", "HEAD"),
        "git_code": code,
        "git_changed": True,
    }
    # a name that is given wins: the copy on another machine may be a checkout of its own
    monkeypatch.setenv("LION_FAST_REVISION", "abc+changes")
    assert environment.git_revision() == {
        "git": "abc+changes",
        "git_code": "abc+changes",
        "git_changed": None,
    }


def timed(key, seconds, ratio=1.0, spread=0.02, **more):
    row = {"key": key, "status": "ok", "method": "lion", "device_name": "a", "threads": 1}
    for name, value in (("seconds", seconds), ("ratio", ratio)):
        row |= {name: value, f"{name}_q20": value * (1 - spread), f"{name}_q80": value * (1 + spread)}
    return row | more


def test_comparing_rows():
    old = [timed("k", 1.0, activation_bytes={"method": 1000}, macs_per_image=100)]

    def worse(*new, threshold=0.1):
        return report.compare(old, list(new), threshold)[0]

    assert worse(timed("k", 1.05)) == []  # within the threshold
    assert worse(timed("k", 1.2)) == ["k: seconds 1 -> 1.2 (+20.0%)"]
    assert worse(timed("k", 1.2), threshold=0.3) == []
    assert worse(timed("k", 1.2, spread=0.3)) == []  # within the spread
    assert worse(timed("k", 0.5)) == []
    assert report.compare(old, [timed("k", 0.5)])[1] == ["k: seconds 1 -> 0.5 (-50.0%), better"]
    # elsewhere times say nothing, ratios do
    assert worse(timed("k", 9.0, device_name="b")) == []
    assert worse(timed("k", 0.1, ratio=1.5, device_name="b")) == ["k: ratio 1 -> 1.5 (+50.0%)"]
    assert worse(timed("k", 1.0, activation_bytes={"method": 1009}), threshold=9) == []
    assert worse(timed("k", 1.0, activation_bytes={"method": 1011})) == [
        "k: activations of method 1,000 -> 1,011 (+1.1%)"
    ]
    assert worse(timed("k", 1.0, macs_per_image=102)) == ["k: macs_per_image 100 -> 102 (+2.0%)"]
    assert worse({"key": "k", "status": "failed", "reason": "it broke"}) == [
        "k: was measured, now failed: it broke"
    ]
    assert report.compare(old, [timed("n", 1.0)])[1] == ["n: new", "k: not in the new rows"]


# -- report and plots


def test_the_report(measured):
    text = report.markdown(measured, ["throughput-x.png"])
    assert (
        "| `lion:residual` |" in text
        and "vpt(length=3):naive" in text
        and "![throughput x](throughput-x.png)" in text
    )
    assert "weights random, sha256 " + row_of(measured, "lion:residual")["weights_sha256"][:12] in text
    assert (
        "`vpt(length=3):exact` exact = naive to" in text
        and "Mean iterations per token: `lion:residual` input" in text
    )
    cells = next(line for line in text.splitlines() if line.startswith("| `lion:residual` |")).split(" | ")
    assert cells[1] == f"{row_of(measured, 'lion:residual')['ratio']:.3f}" and len(cells) == 11
    bad = {**row_of(measured, "probe"), "status": "failed", "reason": "out of paper"}
    assert "- failed: `probe`: out of paper" in report.markdown([*measured, bad])


def test_the_report_says_what_an_option_of_the_backbone_changes(measured):
    plain = row_of(measured, "lion:residual")
    save = {**plain, "setting": plain["setting"] + "/save", "seconds": 1.5 * plain["seconds"]}
    save["activation_bytes"] = {k: v / 2 for k, v in plain["activation_bytes"].items()}
    text = report.markdown([plain, save])
    assert f'| memory="save" | {save["setting"]} | `lion:residual` | 1.500 | 0.500 | 1.000 |' in text


def test_plots_are_drawn(tmp_path, measured):
    longer = [
        {**row, "options": {"length": 9}, "label": row["label"].replace("3", "9"), "key": row["key"] + "9"}
        for row in measured
        if row["method"] == "vpt"
    ]
    drawn = plots.draw_all([*measured, *longer], tmp_path)
    slug = SETTING.key().replace("/", "-").replace("@", "-")
    assert {f"{kind}-{slug}.png" for kind in ("throughput", "lengths", "breakdown")} <= set(drawn)
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert plots.draw_all(measured[:1], tmp_path) == []


# -- plans


def test_the_plans_name_what_exists():
    small, full = plan.small(), plan.full()
    for some in (small, plan.first(), full):
        for setting, wanted in some:
            kind = plan.family(setting.backbone)
            assert wanted and all(kind in available()[c.method].families for c in wanted), setting.key()
            assert len({c.label() for c in wanted}) == len(wanted)
    measured_on = {setting.backbone for setting, _ in full}
    assert {f"vit_{s}_patch16_224" for s in ("tiny", "small", "base", "large")} <= measured_on
    assert {"swin_base_patch4_window7_224", "resnet50"} <= measured_on
    everything = {c for setting, wanted in full for c in wanted}
    assert {c.method for c in everything} == set(available())
    assert {dict(c.options).get("length") for c in everything if c.method == "vpt"} >= set(plan.LENGTHS)
    assert {s.engine for s, _ in full} == set(plan.ENGINES) and {s.dtype for s, _ in full} == set(plan.DTYPES)
    assert {s.mode for s, _ in full} == set(plan.MODES) and {s.memory for s, _ in full} == {"plain", "save"}
    assert {c.method for _, wanted in small for c in wanted} == set(available())


def test_the_first_plan_is_vit_b_end_to_end_in_small_settings():
    found = plan.first()
    assert {(s.backbone, s.batch_size) for s, _ in found} == {(plan.VIT_B, 64)}
    assert all(len(wanted) <= 6 for _, wanted in found)
    order = [(s.mode, s.dtype, s.engine, s.memory) for s, _ in found]
    eager = ("bf16", "eager", "plain")
    assert order[:5] == [
        *[(mode, *eager) for mode in ("train", "infer")] * 2,
        ("train", "bf16", "eager", "save"),
    ]
    labels = {"lion:states", "lion:residual", "probe"}
    labels |= {f"vpt(length={n}):{form}" for n in (10, 50, 200) for form in ("exact", "naive")}
    for mode in plan.MODES:
        plain = [
            c.label()
            for s, some in found
            if (s.mode, s.dtype, s.engine, s.memory) == (mode, *eager)
            for c in some
        ]
        assert len(plain) == len(labels) and set(plain) == labels
    # fp8 and its neighbour in bf16 differ by the dtype alone
    (other, a), (fp8, b) = found[5:]
    assert fp8.dtype == "fp8" and dataclasses.replace(fp8, dtype="bf16") == other
    assert [c.label() for c in a] == [c.label() for c in b] == ["lion:states"]


def test_every_form_is_a_contender():
    found = {c.label() for c in plan.contenders(TINY, "infer", lengths=(10, 50))}
    assert {
        "lion:residual",
        "lion:states",
        "probe",
        "vpt(length=10):exact",
        "vpt(length=50):naive",
        "vpt(depth=shallow,length=10)",
    } <= found
    if "lora" in available():
        assert {"lora", "lora:merged"} <= found
        assert "lora:merged" not in {c.label() for c in plan.contenders(TINY, "train")}


def test_a_model_is_moved_off_its_zeros():
    model = measure.build(vit(), Contender("lion", form="residual"))
    assert all(p.any() for p in model.trainable_parameters())
    again = measure.build(vit(), Contender("lion", form="residual"))
    for p, q in zip(model.trainable_parameters(), again.trainable_parameters(), strict=True):
        assert torch.equal(p, q)


def test_distance_of_what_is_not_finite():
    assert distance(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert not distance(torch.tensor([float("nan")]), torch.ones(1)) <= measure.FORMS_AGREE


def test_the_help_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for words in (plan.MODES, plan.DTYPES, plan.ENGINES):
        assert ", ".join(words) in text
    assert command.DEFAULT_OUT in text and f"[{report.THRESHOLD}]" in text
