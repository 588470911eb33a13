"""Methods on a backbone of their own: what they train of it, and merged models that are bare backbones."""

import copy

import pytest
import torch
from method_helpers import VIT, VITS, backbone, images, shaken

from lion_fast.adapters import save_adapter
from lion_fast.backbones import load_backbone
from lion_fast.errors import AdapterError, OptionError
from lion_fast.methods import create
from lion_fast.methods.partial import block_names

ALL = [*VITS, "swin", "swinv2", "resnet", "convnext", "mobilenetv3"]
MERGES = [(key, m) for key in ALL for m in ("ssf", "bitfit", "lntune", "full", "partial")]
MERGES += [(key, m) for key in VITS for m in ("lora", "lora qv")]


@pytest.mark.parametrize("key, method", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_unmerged(key, method, dtype):
    options = {"target": "qv", "alpha": 3.0} if method == "lora qv" else {}
    model = create(backbone(key), method.split()[0], num_classes=4, **options).to(dtype).eval()
    frozen = copy.deepcopy(model.backbone.model.state_dict())
    shaken(model)
    x = images(model, dtype=dtype)
    expected = model(x)
    merged = model.merge()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        merged(x), expected, rtol=tolerance, atol=tolerance * max(1, expected.abs().max().item())
    )
    assert torch.equal(model(x), expected)  # the model that was merged is as it was
    if method.split()[0] in ("ssf", "lora"):
        assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.model.state_dict().items())
    # the bare backbone's modules, no hook among them, and nothing trained
    kinds = [type(m) for m in merged.backbone.model.modules()]
    assert kinds == [type(m) for m in model.backbone.model.modules()]
    assert not any(m._forward_hooks for m in merged.modules())
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())
    assert merged.backbone.weights_sha256 != model.backbone.weights_sha256
    # its whole state, kept by torch, is the whole model
    twin = model.merge()
    for p in twin.parameters():
        p.data.zero_()
    twin.load_state_dict(merged.state_dict())
    torch.testing.assert_close(twin(x), merged(x), rtol=0, atol=0)


def test_merged_says_what_it_is(tmp_path):
    model = shaken(create(backbone("vit"), "ssf", num_classes=4)).eval()
    model.classes = ["a", "b", "c", "d"]
    merged = model.merge()
    assert merged.method == "ssf (merged)" and merged.classes == model.classes
    assert merged.backbone.weights_source == "random, ssf merged"
    assert merged.num_trainable(head=True) == 0
    for save in (merged.save_adapter, lambda d: save_adapter(merged, d)):
        with pytest.raises(AdapterError, match="has no adapter any more"):
            save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(OptionError, match="does not merge"):
        merged.merge()
    for method in ("probe", "vpt", "dyt", "adaptformer", "cvpt", "apt", "lion"):
        with pytest.raises(OptionError, match=f"method {method} does not merge"):
            create(backbone("vit"), method, num_classes=2).merge()


def test_ssf_places():
    model = create(backbone("vit"), "ssf", num_classes=4)
    block = ["norm1", "attn-qkv", "attn-proj", "norm2", "mlp-fc1", "mlp-fc2"]
    assert set(model.changes) == {
        "patch_embed-proj",
        "norm",
        *(f"blocks-{i}-{name}" for i in range(3) for name in block),
    }
    swin = create(backbone("swin"), "ssf", num_classes=4).changes
    assert {"layers-1-downsample-reduction", "layers-1-downsample-norm", "patch_embed-norm"} <= set(swin)
    assert not any("cpb_mlp" in name for name in create(backbone("swinv2"), "ssf", num_classes=4).changes)
    resnet = create(backbone("resnet"), "ssf", num_classes=4).changes
    assert {"conv1", "bn1", "layer2-0-downsample-0"} <= set(resnet)


@pytest.mark.parametrize(
    "key, names",
    [
        ("vit", ["blocks.2.", "norm."]),
        ("avg", ["blocks.2.", "fc_norm."]),
        ("norm_pre", ["blocks.2.", "norm."]),
        ("swin", ["layers.3.blocks.0.", "norm."]),
        ("resnet", ["layer4.0."]),
        ("convnext", ["stages.3.blocks.0.", "head.norm."]),
    ],
)
def test_partial_places(key, names):
    model = create(backbone(key), "partial", num_classes=4)
    trained = {
        n.removeprefix("backbone.model.")
        for n, p in model.named_parameters()
        if p.requires_grad and "backbone" in n
    }
    expected = {n for n, _ in model.backbone.model.named_parameters() if n.startswith(tuple(names))}
    assert trained == expected and expected
    bare = create(backbone(key), "partial", num_classes=4, last_norm=False)
    assert bare.num_trainable() == sum(
        p.numel() for n, p in bare.backbone.model.named_parameters() if n.startswith(names[0])
    )
    every = create(backbone(key), "partial", num_classes=4, blocks=len(block_names(model.backbone)))
    assert every.num_trainable() > model.num_trainable()


@pytest.mark.parametrize(
    "key, unused", [("no class token", "attn_pool"), ("convnext", "head.norm"), ("mobilenetv3", "conv_head")]
)
def test_what_pooling_does_not_run_is_not_trained(key, unused):
    for pool in ("backbone", "mean"):
        model = create(backbone(key), "full", num_classes=4, pool=pool)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any(unused in n for n in trained) == (pool == "backbone")
        model(images(model)).sum().backward()
        assert all(p.grad is not None for p in model.trainable_parameters())


def test_bitfit_and_lntune_on_a_cnn():
    """Batch norms and the few biases; their statistics stay."""
    model = create(backbone("resnet"), "bitfit", num_classes=4)
    names = {n for n, p in model.backbone.model.named_parameters() if p.requires_grad}
    assert names and all(n.endswith("bias") for n in names)
    assert {n.rpartition(".")[0] for n in names} == {
        n for n, m in model.backbone.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    }
    norms = create(backbone("resnet"), "lntune", num_classes=4)
    assert norms.num_trainable() == 2 * model.num_trainable()
    before = norms.backbone.model.bn1.running_mean.clone()
    norms.train()(images(norms)).sum().backward()
    assert torch.equal(norms.backbone.model.bn1.running_mean, before)
    tables = create(backbone("swin"), "bitfit", num_classes=4)
    assert not any("table" in n for n, p in tables.named_parameters() if p.requires_grad)
    v2 = create(backbone("swinv2"), "bitfit", num_classes=4)
    assert any(n.endswith("q_bias") for n, p in v2.named_parameters() if p.requires_grad)


def test_the_copy_shares_what_it_does_not_train():
    frozen = load_backbone("vit_tiny_patch16_224", pretrained=False, **VIT)
    model = create(frozen, "partial", num_classes=4)
    for (name, a), b in zip(frozen.named_parameters(), model.backbone.parameters(), strict=True):
        assert (a.data_ptr() == b.data_ptr()) != b.requires_grad, name
    shaken(model)
    assert model.backbone.weights_sha256 == frozen.weights_sha256
    model.double()
    assert all(p.dtype == torch.float32 for p in frozen.parameters())
