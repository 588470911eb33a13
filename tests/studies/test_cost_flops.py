"""Multiply-accumulates: counted as they run, by formula, and in the peers' table."""

import pytest
import torch
import torch.nn.functional as F

from lion_fast import LionLayer, create, load_backbone
from lion_fast.studies.cost import flops

TINY = "vit_tiny_patch16_224"


def vit(depth=1, size=32, **options):
    return load_backbone(TINY, pretrained=False, img_size=size, depth=depth, **options)


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
