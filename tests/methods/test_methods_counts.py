"""Trained parameters of every method on the three usual ViTs, as the literature counts them."""

import pytest
import timm
import torch
from accelerate import init_empty_weights

from lion_fast.backbones import Backbone
from lion_fast.methods import available, create

WIDTHS = {"base": 768, "small": 384, "tiny": 192}


@pytest.fixture(scope="module", params=WIDTHS)
def vit(request):
    """A whole ViT without its memory: on the meta device."""
    with init_empty_weights():
        model = Backbone(timm.create_model(f"vit_{request.param}_patch16_224", num_classes=0))
    model._sha256 = "0" * 64  # there are no bytes to hash
    model.size = request.param
    return model


def count(vit, method, **options):
    with torch.device("meta"):
        model = create(vit, method, num_classes=10, **options)
    D = WIDTHS[vit.size]
    assert model.num_trainable(head=True) == model.num_trainable() + 10 * (D + 1)
    return model.num_trainable()


# method, options, and the count on ViT-B, -S and -Ti; without the head
COUNTS = [
    ("probe", {}, 0, 0, 0),
    ("full", {}, 85_798_656, 21_665_664, 5_524_416),
    ("vpt", {"depth": "shallow", "length": 10}, 7_680, 3_840, 1_920),
    ("vpt", {"depth": "shallow", "length": 50}, 38_400, 19_200, 9_600),
    ("vpt", {"depth": "shallow", "length": 100}, 76_800, 38_400, 19_200),
    ("vpt", {"depth": "shallow", "length": 200}, 153_600, 76_800, 38_400),
    *(
        (method, {"length": length}, *counts)
        for method in ("vpt", "vfpt", "cvpt")
        for length, counts in {
            1: (9_216, 4_608, 2_304),
            5: (46_080, 23_040, 11_520),
            10: (92_160, 46_080, 23_040),
            50: (460_800, 230_400, 115_200),
            100: (921_600, 460_800, 230_400),
            200: (1_843_200, 921_600, 460_800),
        }.items()
    ),
    ("e2vpt", {"length": 10, "kv_length": 5}, 138_240, 69_120, 34_560),
    ("e2vpt", {"length": 10, "kv_length": 5, "masks": "learned"}, 138_410, 69_290, 34_730),
    ("e2vpt", {"length": 10, "kv_length": 5, "pruned": (5, 8)}, 69_120, 34_560, 17_280),
    ("e2vpt", {"length": 10, "kv_length": 5, "pruned": (9, 12)}, 48_384, 24_192, 12_096),
    ("e2vpt", {"length": 10, "kv_length": 5, "share_kv": False}, 184_320, 92_160, 46_080),
    ("dyt", {"rank": 8}, 165_996, 83_052, 41_580),
    ("dyt", {"rank": 16}, 313_548, 156_876, 78_540),
    ("dyt", {"rank": 64}, 1_198_860, 599_820, 300_300),
    ("adaptformer", {"rank": 8}, 156_768, 78_432, 39_264),
    ("adaptformer", {"rank": 64}, 1_189_632, 595_200, 297_984),
    ("houlsby", {"rank": 8}, 313_536, 156_864, 78_528),
    ("houlsby", {"rank": 64}, 2_379_264, 1_190_400, 595_968),
    ("lora", {"rank": 8}, 294_912, 147_456, 73_728),
    ("lora", {"rank": 8, "target": "qv"}, 294_912, 147_456, 73_728),
    ("bitfit", {}, 102_912, 51_456, 25_728),
    ("ssf", {}, 205_824, 102_912, 51_456),
    ("lntune", {}, 38_400, 19_200, 9_600),
    ("partial", {"last_norm": False}, 7_087_872, 1_774_464, 444_864),
    ("partial", {}, 7_087_872 + 2 * 768, 1_774_464 + 2 * 384, 444_864 + 2 * 192),
    ("apt", {"length": 50}, 534_540, 267_276, 133_644),
    ("apt", {"length": 200}, 1_916_940, 958_476, 479_244),
]


@pytest.mark.parametrize("method, options, base, small, tiny", COUNTS)
def test_counts(vit, method, options, base, small, tiny):
    assert count(vit, method, **options) == {"base": base, "small": small, "tiny": tiny}[vit.size]


def test_every_method_but_lion_is_counted():
    assert {method for method, *_ in COUNTS} == set(available()) - {"lion"}


@pytest.mark.parametrize(
    "classes, base, small, tiny",
    [
        (10, 7_690, 3_850, 1_930),
        (100, 76_900, 38_500, 19_300),
        (200, 153_800, 77_000, 38_600),
        (397, 305_293, 152_845, 76_621),
        (555, 426_795, 213_675, 107_115),
    ],
)
def test_head_counts(vit, classes, base, small, tiny):
    with torch.device("meta"):
        model = create(vit, "probe", num_classes=classes)
    assert model.num_trainable(head=True) == {"base": base, "small": small, "tiny": tiny}[vit.size]


@pytest.mark.parametrize("vit", ["base"], indirect=True)
def test_published_totals(vit):
    """VPT's demo checkpoints on ViT-B: dmlab with 100 prompts, sun397 with 5, heads of 6 and 397 classes."""
    with torch.device("meta"):
        dmlab = create(vit, "vpt", num_classes=6, length=100)
        sun397 = create(vit, "vpt", num_classes=397, length=5)
    assert dmlab.num_trainable(head=True) == 926_214
    assert sum(p.numel() for p in dmlab.parameters()) == 86_724_870
    assert sun397.num_trainable(head=True) == 351_373


def test_cvpt_copies(vit):
    """What the published code stores twice."""
    with torch.device("meta"):
        naive = create(vit, "cvpt", num_classes=10, form="naive")
    stored = sum(p.numel() for p in naive.copies.parameters())
    assert stored == {"base": 28_348_416, "small": 7_096_320, "tiny": 1_778_688}[vit.size]
    assert naive.num_trainable() == count(vit, "cvpt")
