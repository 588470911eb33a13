"""Small backbones of every family for the tests of methods, and what those tests do with a model."""

import hashlib
import json

import pytest
import safetensors.torch
import timm
import torch
from packaging.version import Version

from lion_fast.backbones import Backbone, load_backbone
from lion_fast.methods import create
from lion_fast.methods.files import DESCRIPTION, TENSORS

VIT = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "qk-norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True, "init_values": 0.3}),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT | {"img_size": 28}),
    "no class token": ("vit_base_patch16_siglip_224", VIT),
    "norm_pre": ("vit_base_patch32_clip_224", VIT | {"img_size": 64}),
    "post-norm": ("vit_base_patch16_rpn_224", VIT),
    "avg": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "img_size": 64}),
    "efficientnet": ("efficientnet_lite0", {"img_size": 64}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", {"img_size": 64}),
}
VITS = ["vit", "qk-norm", "registers", "no class token", "norm_pre", "post-norm", "avg", "deit"]
FAMILIES = ["vit", "swin", "resnet"]


def needs_timm(version):
    """A mark for what an older timm does not have."""
    return pytest.mark.skipif(Version(timm.__version__) < Version(version), reason=f"needs timm {version}")


def off_identity(model):
    """The model with LayerScales, norms and statistics that are not the identity."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def backbone(key="vit", **more):
    name, kwargs = BACKBONES[key]
    return off_identity(load_backbone(name, pretrained=False, **kwargs | more))


def images(model, batch=3, dtype=torch.float32):
    size = (model if isinstance(model, Backbone) else model.backbone).img_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, dtype=dtype)


def gradients(model, x, g):
    """Gradients of what is trained, from a random upstream gradient."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    out = model(x)
    found = torch.autograd.grad(out, [model.get_parameter(n) for n in names], g)
    return out, dict(zip(names, found, strict=True))


def shaken(model, std=0.1):
    """Every trained tensor away from its first value; zeros would hide what multiplies them."""
    for parameter in model.trainable_parameters():
        parameter.data.add_(torch.randn_like(parameter) * std)
    return model


def assert_slopes(model, x, g, names, rel=1e-5):
    """Gradients of (model(x) * g).sum() to parameters, against differences along random directions."""
    grads = torch.autograd.grad((model(x) * g).sum(), [model.get_parameter(name) for name in names])
    for name, grad in zip(names, grads, strict=True):
        p = model.get_parameter(name)
        direction, step, sums = torch.randn_like(p), 1e-6, []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                p.add_(move * direction)
                sums.append((model(x) * g).sum())
        slope = ((sums[0] - sums[1]) / (2 * step)).item()
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=rel, abs=1e-9), name


def two_forms(frozen, method, **options):
    """The naive and the exact form of a method with the same adapter."""
    naive, exact = (create(frozen, method, num_classes=4, form=f, **options) for f in ("naive", "exact"))
    shaken(naive)
    exact.load_adapter_state_dict(naive.adapter_state_dict())
    return naive, exact


def assert_same(a, b, x, g):
    """Outputs and every gradient of two models with the same adapter, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        (out_a, grads_a), (out_b, grads_b) = (
            gradients(model.to(dtype), x.to(dtype), g.to(dtype)) for model in (a, b)
        )
        torch.testing.assert_close(out_b, out_a, rtol=tolerance, atol=tolerance)
        assert grads_a.keys() == grads_b.keys()
        for name, value in grads_a.items():
            torch.testing.assert_close(grads_b[name], value, rtol=tolerance, atol=tolerance)


def described(directory):
    """What a saved adapter's description says."""
    return json.loads((directory / DESCRIPTION).read_text())


def rewrite(directory, **changes):
    (directory / DESCRIPTION).write_text(json.dumps(described(directory) | changes))


def replace_tensors(directory, state):
    """Other tensors with a description that vouches for them."""
    raw = safetensors.torch.save(state)
    (directory / TENSORS).write_bytes(raw)
    rewrite(directory, tensors_sha256=hashlib.sha256(raw).hexdigest())
