"""What a step keeps, counted against counts by hand."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lion_fast import create, load_backbone
from lion_fast.backbones import at_work, cheaper
from lion_fast.backbones.at_work import AtWork
from lion_fast.studies import memory

TINY = "vit_tiny_patch16_224"


def vit(depth=1, size=32, **options):
    return load_backbone(TINY, pretrained=False, img_size=size, depth=depth, **options)


def kept_by(module, x):
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


def test_a_graph_that_was_counted_is_let_go():
    x = torch.randn(3, 4, requires_grad=True)
    with memory.SavedTensors(nn.Identity()):
        out = x.exp()  # kept by the node that it came from
    gone = weakref.ref(out)
    del out
    assert gone() is None


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

    linear = nn.Linear(4, 4)
    x = torch.randn(7, 4, requires_grad=True)
    with memory.SavedTensors(linear) as kept:
        out = cheaper.again(linear, lambda t: linear(t).exp().sin(), x * 2)
    assert kept.total == 4 * 7 * 4
    out.sum().backward()
    assert cheaper.KEEPS == []


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
