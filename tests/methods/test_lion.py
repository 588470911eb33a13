"""LION's ends: the variant "residual" by hand, counts, diagnostics; "states" is in test_lion_states.py."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from method_helpers import VITS, assert_slopes, backbone, images

from lion_fast import reference
from lion_fast.backbones import load_backbone
from lion_fast.errors import ConvergenceError, OptionError
from lion_fast.methods import create


def by_hand(model, x):
    """LION from timm's stages and the reference layer, iterating as the formula reads."""
    timm_model = model.backbone.model

    def end(layer, rows):
        twin = reference.LionLayer(
            layer.dim, layer.state_dim, recurrence=layer.recurrence, max_iter=200, tol=1e-12
        )
        twin.to(rows.dtype).load_state_dict(layer.state_dict())
        return twin(rows)

    if model.backbone.family == "vit":
        x = timm_model.norm_pre(timm_model._pos_embed(timm_model.patch_embed(x)))
        x = timm_model.norm(timm_model.blocks(end(model.input_end, x)))
        x = end(model.output_end, x)
    else:
        x = end(model.input_end, timm_model.patch_embed(x))
        x = end(model.output_end, timm_model.norm(timm_model.layers(x)))
    return model.head(timm_model.forward_head(x, pre_logits=True))


@pytest.mark.parametrize("key", [*VITS, "swin", "swinv2"])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_lion_by_hand(key, recurrence):
    options = {"form": "residual", "state_dim": 6, "tol": 1e-12, "max_iter": 200, "backward": "exact"}
    model = create(backbone(key), num_classes=4, recurrence=recurrence, **options).double()
    for end in (model.input_end, model.output_end):
        end.V.data.normal_()
        end.c.data.normal_()
    x = images(model, dtype=torch.float64)
    out = model(x)
    torch.testing.assert_close(out, by_hand(model, x), rtol=0, atol=1e-9)
    assert (out - model.head(model.backbone(x))).abs().max() > 1e-3  # the ends do something here
    assert model.input_end.dim == model.backbone.width_in and model.output_end.dim == model.backbone.width_out


@pytest.mark.parametrize("key", ["resnet", "convnext", "mobilenetv3"])
def test_lion_on_a_cnn_by_hand(key):
    options = {"form": "residual", "state_dim": 6, "tol": 1e-12, "max_iter": 200, "pixel_channels": 4}
    model = create(backbone(key), num_classes=4, **options).double()
    pixel, layer = model.input_end, model.output_end
    for end in (pixel, layer):
        end.V.data.normal_(std=0.5)
    x = images(model, dtype=torch.float64)
    kernel = pixel.recurrence_kernel(64, 64)
    q = F.conv2d(x, pixel.U, pixel.b, padding=1)
    z = torch.zeros_like(q)
    for _ in range(200):
        z = F.relu(F.conv2d(z, kernel, padding=1) + q)
    y = x + F.conv2d(z, pixel.V) + pixel.c.view(1, -1, 1, 1)
    y = model.backbone.model.forward_features(y)
    rows = y.flatten(2).mT  # (B, H W, C)
    q = rows @ layer.A.T + layer.b
    z = torch.zeros_like(q)
    for _ in range(200):
        z = F.relu(z @ layer.recurrence_matrix().T + q)
    rows = rows + z @ layer.V.T + layer.c
    expected = model.head(model.backbone.model.forward_head(rows.mT.reshape(y.shape), pre_logits=True))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ends", ["input", "output", ("input",), ["output"], ("output", "input")])
@pytest.mark.parametrize("form", ["states", "residual"])
def test_lion_ends(ends, form):
    model = create(backbone("vit"), num_classes=2, ends=ends, form=form, front="residual")
    wanted = {ends} if isinstance(ends, str) else set(ends)
    assert {n for n in ("input", "output") if getattr(model, f"{n}_end") is not None} == wanted
    model(images(model))
    assert {k.split("_")[0] for k in model.diagnostics()} == wanted


@pytest.mark.parametrize("ends", [(), "both", ("input", "input"), ("input", "middle"), [["input"]]])
def test_lion_refuses_other_ends(ends):
    with pytest.raises(OptionError, match="ends"):
        create(backbone("vit"), num_classes=2, ends=ends)


@pytest.mark.parametrize("state_dim, two_ends", [(16, 51_232), (32, 101_952), (51, 163_512), (64, 206_464)])
def test_lion_counts(state_dim, two_ends):
    vit = load_backbone("vit_base_patch16_224", pretrained=False, depth=1, img_size=32)
    model = create(vit, num_classes=10, state_dim=state_dim, form="residual")
    R, D = state_dim, 768
    assert model.num_trainable() == two_ends == 2 * (2 * R * D + R * R + R + D)
    assert model.num_trainable(head=True) == two_ends + 7_690
    options = {"form": "residual", "recurrence": "tied", "ends": "input"}
    tied = create(vit, num_classes=10, state_dim=state_dim, **options)
    assert tied.num_trainable() == 2 * R * D + R + D


def test_lion_count_on_a_cnn():
    model = create(backbone("resnet"), num_classes=2, state_dim=16, pixel_channels=8, form="residual")
    assert sum(p.numel() for p in model.input_end.parameters()) == 9 * 64 + 31 * 8 + 3
    assert model.num_trainable() == 827 + 2 * 16 * 32 + 16 * 16 + 16 + 32


@pytest.mark.parametrize("form", ["states", "residual"])
@pytest.mark.parametrize("key", ["vit", "resnet"])
def test_diagnostics_hold_no_graph(key, form):
    model = create(backbone(key), num_classes=2, form=form, ends=("input", "output"), front="residual")
    assert model.diagnostics() == {}
    saved = []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its graph it would be a cycle of its own
            saved.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        out = model(images(model))
    told = model.diagnostics()
    assert all(isinstance(v, float) for v in told.values())
    for end in ("input", "output"):
        assert 1 <= told[f"{end}_iterations"] <= told[f"{end}_max_iterations"] <= 50
        assert 0 < told[f"{end}_residual"] <= 1e-4 and told[f"{end}_converged"] == 1.0
    for info in model._info.values():
        assert not info.residual.requires_grad and info.residual.grad_fn is None
    assert any(ref() is not None for ref in saved)
    del out
    gc.collect()
    assert all(ref() is None for ref in saved)
    model(images(model)).sum().backward()
    assert model.diagnostics()["output_backward_residual"] > 0


def test_lion_on_failure():
    for key, ends in (("vit", "output"), ("resnet", "input")):
        model = create(backbone(key), num_classes=2, max_iter=2, on_failure="raise", ends=ends)
        with pytest.raises(ConvergenceError):
            model(images(model))


def test_lion_input_end_carries_gradients_through_the_backbone():
    """Input-end gradients against finite differences of the whole frozen model, in float64."""
    options = {"form": "residual", "state_dim": 4, "tol": 1e-13, "max_iter": 300, "backward": "exact"}
    model = create(backbone("vit"), num_classes=2, **options).double()
    x, g = images(model, 2, torch.float64), torch.randn(2, 2, dtype=torch.float64)
    assert_slopes(model, x, g, ("input_end.A", "input_end.W", "input_end.V", "output_end.A", "output_end.c"))
