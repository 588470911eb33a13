"""Speed of the hot pieces of each method and of the frozen block, one by one: `make bench`.

Each piece is compared with the plain way of computing the same before it is timed. For whole steps of every
method see `lion-fast bench`.
"""

import copy

import pytest
import torch

from lion_fast import create, load_backbone
from lion_fast.backbones import cheaper, fp8, prefix_block, prefix_kv
from lion_fast.methods import available
from lion_fast.studies.cost.models import forms_of, move_off_start
from lion_fast.studies.measuring import distance

B, NAME, SIZE, DEPTH = 4, "vit_small_patch16_224", 224, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return load_backbone(NAME, pretrained=False, depth=DEPTH).to(DEVICE)


@pytest.fixture(scope="module")
def rows(plain):
    torch.manual_seed(1)
    return plain.enter(torch.randn(B, 3, SIZE, SIZE, device=DEVICE)).detach()


def changed(backbone, **options):
    backbone = copy.deepcopy(backbone)
    cheaper.apply(backbone, **options)
    return backbone


def run(benchmark, work, group):
    def timed():
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info |= {"device": DEVICE, "torch": torch.__version__, "shape": [B, SIZE, NAME, DEPTH]}
    benchmark.pedantic(timed, warmup_rounds=2, rounds=10)


def both_ways(function, x, upstream):
    x = x.detach().requires_grad_()
    function(x).backward(upstream)
    return x.grad


@pytest.mark.parametrize("how", ["plain", "save", "fold"])
def test_frozen_block(benchmark, plain, rows, how):
    """Forward and backward to the input."""
    options = {"plain": {}, "save": {"memory": "save"}, "fold": {"fold": True}}[how]
    block = changed(plain, **options).blocks[0]
    upstream = torch.randn_like(rows)
    expected = both_ways(plain.blocks[0], rows, upstream)
    assert distance(both_ways(block, rows, upstream), expected) <= 1e-5
    run(benchmark, lambda: both_ways(block, rows, upstream), "frozen block, forward and backward")


@pytest.mark.parametrize("how", ["fp32", "bf16", "fp8"])
def test_frozen_block_forward(benchmark, plain, rows, how):
    backbone = copy.deepcopy(plain)
    if how == "fp8" and fp8.why_not(DEVICE):
        pytest.skip(fp8.why_not(DEVICE))
    cheaper.apply(backbone, precision=how)
    x = rows.to(next(backbone.parameters()).dtype)
    with torch.no_grad():
        assert (
            distance(backbone.blocks[0](x), plain.blocks[0](rows))
            <= {"fp32": 0, "bf16": 2e-2, "fp8": 1e-1}[how]
        )
        run(benchmark, lambda: backbone.blocks[0](x), "frozen block, forward")


@pytest.mark.parametrize("length", [10, 50, 200])
@pytest.mark.parametrize("form", ["exact", "naive"])
def test_block_with_prompts(benchmark, plain, rows, form, length):
    """One block of VPT-deep: prompts as keys and values, or as rows that are thrown away."""
    block, n = plain.blocks[0], rows.shape[1]
    torch.manual_seed(2)
    prompts = torch.randn(length, rows.shape[-1], device=DEVICE)

    def naive():
        return block(torch.cat([prompts.expand(B, -1, -1), rows], 1))[:, -n:]

    with torch.no_grad():
        keys, values = prefix_kv(block, prompts)

        def exact():
            return prefix_block(block, rows, keys, values)

        assert distance(exact(), naive()) <= 1e-5
        run(benchmark, exact if form == "exact" else naive, f"block with {length} prompts, forward")


@pytest.mark.parametrize("method, form", [(m, f) for m in available() for f in forms_of(m) if f != "merged"])
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_one_block_of_every_method(benchmark, plain, method, form, mode):
    """The whole model on a backbone of one block: what a method adds stands out, in each of its forms."""
    options = {"form": form} if form else {}
    model = create(plain, method, num_classes=10, seed=0, **options).to(DEVICE)
    move_off_start(model)
    torch.manual_seed(3)
    images = torch.randn(B, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.arange(B, device=DEVICE)

    def forward():
        with torch.no_grad():
            model.eval()(images)

    def step():
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        (loss + sum(model.loss_terms(images, labels).values())).backward()

    model.train()
    step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    run(benchmark, forward if mode == "forward" else step, f"one block, {mode}")


@pytest.mark.parametrize("method", [m for m in ("lora", "ssf") if m in available()])
@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_merged_and_unmerged(benchmark, plain, method, form):
    model = create(plain, method, num_classes=10, seed=0).to(DEVICE).eval()
    move_off_start(model)
    torch.manual_seed(3)
    images = torch.randn(B, 3, SIZE, SIZE, device=DEVICE)
    with torch.no_grad():
        merged = model.merge()
        assert distance(merged(images), model(images)) <= 1e-4
        chosen = merged if form == "merged" else model
        run(benchmark, lambda: chosen(images), f"{method}, one block, forward")
