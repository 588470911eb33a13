"""Frozen stays frozen, and what an adapter says of its backbone is true of the backbone that is there."""

import copy

import pytest
import torch
from method_helpers import backbone, described, images, shaken
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

from lion_fast.adapters import load_adapter
from lion_fast.backbones import backbone_sha256, cheaper, fp8
from lion_fast.errors import AdapterError, BackboneError, OptionError
from lion_fast.methods import available, create

OWNERS = ("bitfit", "full", "lntune", "partial", "ssf")


def bits(model):
    return {k: v.clone() for k, v in model.backbone.model.state_dict().items()}


def same(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.backbone.model.state_dict().items())


@pytest.mark.parametrize("method", ["probe", "lion", "vpt", "bitfit", "ssf"])
@pytest.mark.parametrize("key", ["resnet", "convnext", "efficientnet"])
def test_batch_statistics_stay_whatever_is_called(key, method):
    model = create(backbone(key), method, num_classes=3)
    before, x = bits(model), images(model, 4)
    expected = model.eval()(x)
    update_bn([(x, None)], model)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    update_bn([x], averaged)
    model.train()
    model.backbone.model.train()  # past `Backbone.train`
    model(x)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    assert same(model, before) and same(averaged.module, before)
    assert torch.equal(model.eval()(x), expected) and torch.equal(averaged.module.eval()(x), expected)


@pytest.mark.parametrize("key", ["vit", "swin", "efficientnet"])
def test_dropout_of_the_backbone_is_off_in_every_mode(key):
    model = create(backbone(key, drop_rate=0.3, drop_path_rate=0.5), "probe", num_classes=3)
    x, expected = images(model), None
    for change in (model.eval, model.train, model.backbone.train, model.backbone.model.train):
        change()
        parameters = {k: v.detach() for k, v in model.named_parameters()}
        for out in (model(x), torch.func.functional_call(model, parameters, (x,))):
            expected = out if expected is None else expected
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", available())
def test_thawing_a_model_thaws_what_its_method_trains(method):
    model = create(backbone("vit"), method, num_classes=3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
    model.requires_grad_(True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("tuned", OWNERS)
def test_a_method_on_a_tuned_backbone_is_refused(tuned, tmp_path):
    frozen = backbone("vit")
    first = shaken(create(frozen, tuned, num_classes=3)).eval()
    first.save_adapter(tmp_path / "first")
    for given in (first.backbone, copy.deepcopy(first.backbone), copy.deepcopy(first).backbone):
        for method in ("vpt", "probe", tuned):
            with pytest.raises(BackboneError, match=rf"belongs to a {tuned} model.*merge\(\)"):
                create(given, method, num_classes=3)
    # merged, it is a backbone as any other, with a hash of its own
    merged = first.merge().backbone
    second = shaken(create(merged, "vpt", num_classes=3)).eval()
    second.save_adapter(tmp_path / "second")
    x = images(second)
    with torch.no_grad():
        assert torch.equal(load_adapter(tmp_path / "second", merged)(x), second(x))
        with pytest.raises(AdapterError, match="trained on"):
            load_adapter(tmp_path / "second", frozen)
        # the one given is as it was, and takes its own adapter back
        assert torch.equal(load_adapter(tmp_path / "first", frozen)(x), first(x))


def test_a_thawed_backbone_is_refused():
    thawed = backbone("vit")
    thawed.model.norm.weight.requires_grad_(True)
    with pytest.raises(BackboneError, match="is not frozen"):
        create(thawed, "probe", num_classes=3)
    assert create(thawed.requires_grad_(True), "probe", num_classes=3).num_trainable() == 0


def changes(frozen):
    """Ways to other weights, by name; each on a model's frozen backbone."""
    weight, other = frozen.model.blocks[1].attn.qkv.weight, torch.randn(3 * 48, 48) * 0.2

    def step():
        weight.requires_grad_(True).grad = other
        torch.optim.SGD([weight], lr=1.0).step()
        weight.requires_grad_(False)

    def replace():
        frozen.model.blocks[1].attn.qkv.weight = torch.nn.Parameter(other, requires_grad=False)

    def module():
        frozen.model.blocks[1].norm1 = torch.nn.LayerNorm(48, eps=0.5)
        frozen.requires_grad_(False)

    return {
        "load_state_dict": lambda: frozen.model.load_state_dict(backbone("vit").model.state_dict()),
        "copy_": lambda: weight.requires_grad_(False).copy_(other),
        "step": step,
        "data": lambda: setattr(weight, "data", other),
        "replace": replace,
        "module": module,
        "half and back": lambda: frozen.bfloat16().float(),
        "another model": lambda: create(frozen, "probe", num_classes=2).half().float(),
        "foreach": lambda: torch._foreach_mul_([weight], 2.0),
    }


CHANGES = list(changes(backbone("vit")))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method, options", [
    ("vpt", {}), ("vpt", {"state_dim": 4}), ("vfpt", {}), ("e2vpt", {}), ("cvpt", {}),
    ("cvpt", {"form": "naive"}),
])  # fmt: skip
def test_what_is_kept_follows_the_frozen_weights(method, options, change):
    """Keys and values kept between evaluations, and CVPT's copies, against a model that keeps nothing."""
    frozen = backbone("vit")
    model = shaken(create(frozen, method, num_classes=3, **options)).eval()
    x = images(model)
    with torch.no_grad():
        before = model(x)
    changes(frozen)[change]()
    with torch.no_grad():
        fresh = create(frozen, method, num_classes=3, **options).eval()
        fresh.load_adapter_state_dict(model.adapter_state_dict())
        assert torch.equal(model(x), fresh(x))
        if change != "another model" and "half" not in change:
            assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["swin", "swinv2"])
def test_what_is_kept_follows_a_swin(key):
    frozen = backbone(key)
    model = shaken(create(frozen, "vpt", num_classes=3)).eval()
    x = images(model)
    with torch.no_grad():
        model(x)
        for name, parameter in frozen.named_parameters():
            if "attn" in name or "norm1" in name:
                parameter.mul_(1.3)
                kept = model(x)
                model.clear_cache()
                assert torch.equal(kept, model(x)), name


def test_kept_values_are_no_part_of_a_copy():
    model = create(backbone("vit"), "vpt", num_classes=3).eval()
    with torch.no_grad():
        model(images(model))
    assert model._cache is not None and copy.deepcopy(model)._cache is None


def test_a_model_made_in_inference_mode_keeps_nothing():
    with torch.inference_mode():
        model = create(backbone("vit"), "vpt", num_classes=3).eval()
        x = images(model)
        first = model(x)
        model.prompts.add_(1)
        assert not torch.equal(model(x), first)


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("half and back", "another model")])
def test_the_hash_is_of_the_weights_that_are_there(change):
    frozen = backbone("vit")
    before = frozen.weights_sha256
    with torch.no_grad():
        changes(frozen)[change]()
    assert frozen.weights_sha256 == backbone_sha256(frozen.model) != before


def test_the_hash_sees_a_write_past_torchs_counters(tmp_path):
    frozen = backbone("vit")
    model = create(frozen, "probe", num_classes=3)
    model.save_adapter(tmp_path / "before")
    frozen.model.norm.weight.data.mul_(2)
    model.save_adapter(tmp_path / "after")
    first, second = (described(tmp_path / name)["backbone"]["sha256"] for name in ("before", "after"))
    assert first != second == backbone_sha256(frozen.model)
    with pytest.raises(AdapterError, match="trained on"):
        load_adapter(tmp_path / "before", frozen)


def test_the_hash_stays_that_of_the_weights_before_a_cast():
    frozen = backbone("vit")
    sha256 = frozen.weights_sha256
    for cast in (
        lambda b: b.half(),
        lambda b: b.double().float(),
        lambda b: b.to(torch.bfloat16).to(torch.device("cpu")),
        lambda b: copy.deepcopy(b.half()),
        lambda b: b.half().to("meta"),
        lambda b: cheaper.apply(b, precision="bf16", fold=True, memory="save") or b,
    ):
        assert cast(copy.deepcopy(frozen)).weights_sha256 == sha256
    half = copy.deepcopy(frozen).half()
    half.model.norm.weight.data.mul_(2)  # changed behind the cast
    assert half.weights_sha256 == backbone_sha256(half.model) != sha256
    tuned = shaken(create(frozen, "bitfit", num_classes=3)).half()
    assert tuned.backbone.weights_sha256 == sha256  # of what its training began with


def test_a_backbone_in_8_bits_is_told_from_the_one_it_was():
    frozen = backbone("vit")
    sha256 = frozen.weights_sha256
    cheaper.hold(frozen, torch.bfloat16)
    fp8.convert(frozen, emulate=True)
    frozen.precision = "fp8"
    frozen.name_weights(sha256)  # as `cheaper.apply` does where a GPU can
    assert copy.deepcopy(frozen).weights_sha256 == sha256
    model = create(frozen, "vpt", num_classes=3).eval()
    x = images(model)
    with torch.no_grad():
        kept = model(x)
        assert model.prefix() is model.prefix()
        frozen.model.blocks[0].attn.qkv.bytes.copy_(frozen.model.blocks[1].attn.qkv.bytes)
        assert not torch.equal(model(x), kept)
    assert frozen.weights_sha256 != sha256


def test_what_a_parametrised_projection_computes_is_not_kept():
    frozen = backbone("vit")
    scaled = torch.nn.Linear(1, 1)
    scaled.forward = lambda weight: weight * scaled.weight
    model = shaken(create(frozen, "vpt", num_classes=3)).eval()
    parametrize.register_parametrization(frozen.blocks[0].attn.qkv, "weight", scaled)
    frozen.requires_grad_(False)
    x = images(model)
    with torch.no_grad():
        scaled.weight.fill_(1)
        before = model(x)
        scaled.weight.fill_(2)
        assert (model(x) - before).abs().max() > 1e-4


def test_a_projection_of_another_kind_is_no_plain_block():
    frozen = backbone("vit")

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    frozen.blocks[1].attn.qkv.__class__ = Adapted
    for method in ("vfpt", "cvpt", "e2vpt"):
        with pytest.raises(BackboneError, match="plain ViT blocks"):
            create(frozen, method, num_classes=3)
    with pytest.raises(OptionError, match="naive"):
        create(frozen, "vpt", num_classes=3, form="exact")
    assert create(frozen, "vpt", num_classes=3).form == "naive"
