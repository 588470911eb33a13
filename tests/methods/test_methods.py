"""The methods behind one interface: options, heads, pooling, adapters' states."""

import inspect
import math

import pytest
import timm
import torch
from method_helpers import backbone, images

import lion_fast
from lion_fast.errors import AdapterError, BackboneError, OptionError
from lion_fast.methods import LionModel, TunedModel, available, create, method_options


@pytest.mark.parametrize("key", ["vit", "swin", "resnet"])
def test_probe_is_the_backbone_and_a_linear(key):
    model = create(backbone(key), "probe", num_classes=4)
    x = images(model)
    expected = model.backbone(x) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)
    width = model.backbone.num_features
    assert (model.num_trainable(), model.num_trainable(head=True)) == (0, 4 * (width + 1))
    assert not model.features(x).requires_grad  # nothing to back-propagate through


def test_head():
    model = create(backbone("vit"), "probe", num_classes=500)
    assert abs(model.head.weight.std() - 0.02) < 1e-3 and model.head.weight.dtype == torch.float32
    assert (model.head.bias == 0).all()
    plain = create(backbone("vit"), "probe", num_classes=5, head_bias=False, pool="cls+mean")
    assert plain.num_trainable(head=True) == 5 * 96 and plain(images(plain)).shape == (3, 5)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("method", ["lion", "probe", "vpt"])
def test_pool_option(method):
    vit = backbone("registers")
    for pool, width in (("backbone", 48), ("cls", 48), ("mean", 48), ("cls+mean", 96)):
        model = create(vit, method, num_classes=2, pool=pool)
        width += 16 * 32 if method == "lion" else 0  # the states of 4 x 4 cells
        assert model.features(images(model)).shape == (3, width) == (3, model.head.in_features)
    with pytest.raises(OptionError, match="backbone, mean, cls, cls.mean; got 'max'"):
        create(vit, method, num_classes=2, pool="max")
    with pytest.raises(OptionError, match="got 'cls'"):
        create(backbone("no class token"), method, num_classes=2, pool="cls")


@pytest.mark.parametrize("method", sorted(available()))
def test_options_are_listed_recorded_and_checked(method):
    cls, frozen = available()[method], backbone("vit")
    model = create(frozen, method, num_classes=2)
    # what is recorded only where it is not the default, so that older versions read the others
    assert set(method_options(cls)) - set(model.options) == ({"prompt_pooling"} if method == "vpt" else set())
    assert set(model.options) <= set(method_options(cls))
    again = create(frozen, method, num_classes=2, **model.options)
    assert again.options == model.options
    assert inspect.Parameter.empty not in method_options(cls).values()
    for make in (lambda **o: create(frozen, method, 2, **o), lambda **o: cls(frozen, 2, **o)):
        with pytest.raises(OptionError, match=f"option of {method} 'lenght'.*pool"):
            make(lenght=3)


@pytest.mark.parametrize(
    "method, key",
    [
        (m, key)
        for m, cls in available().items()
        for key in ("vit", "resnet")
        if key == "vit" or "cnn" in cls.families
    ],
)
def test_values_of_another_kind_are_refused_by_name(method, key):
    frozen = backbone(key)
    for name, default in method_options(available()[method]).items():
        for wrong in ("zz", [3.0]):
            if name == "seed" or (key == "vit" and name == "pixel_channels") or isinstance(default, str):
                continue
            with pytest.raises(OptionError, match=name):
                create(frozen, method, num_classes=2, **{name: wrong})


def test_create_refuses_what_it_does_not_know():
    with pytest.raises(OptionError, match="no method named 'vtp'; the methods are .*lion.*probe.*vpt"):
        create("vit_tiny_patch16_224", method="vtp", num_classes=2)
    with pytest.raises(OptionError, match="needs num_classes"):
        create("vit_tiny_patch16_224")
    for bad in (0, -1, 2.0, True, "3"):
        with pytest.raises(OptionError, match="num_classes"):
            create(backbone("vit"), num_classes=bad)
    with pytest.raises(OptionError, match="belong to load_backbone"):
        create(backbone("vit"), num_classes=2, img_size=64)
    with pytest.raises(BackboneError, match="must be a Backbone"):
        LionModel(timm.create_model("resnet10t"), 2)
    # before anything is fetched
    with pytest.raises(OptionError, match="option of lion 'foo'"):
        create("vit_huge_patch14_224", num_classes=2, foo=1)


def test_create_by_name_and_seed():
    make = {"method": "lion", "num_classes": 2, "pretrained": False, "img_size": 32}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (create("vit_tiny_patch16_224", seed=3, **make) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    three = create("vit_tiny_patch16_224", seed=4, **make)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.head.weight, three.head.weight)
    assert isinstance(lion_fast.create(one.backbone, "probe", 2), TunedModel)
    assert lion_fast.LionModel is LionModel


def test_adapter_state_is_strict():
    model = create(backbone("vit"), "lion", num_classes=3, form="residual")
    other = create(model.backbone, "lion", num_classes=3, form="residual")
    other.load_adapter_state_dict(model.adapter_state_dict())
    x = images(model)
    assert torch.equal(model(x), other(x))
    state = model.adapter_state_dict()
    with pytest.raises(AdapterError, match="lacks input_end.A"):
        other.load_adapter_state_dict({k: v for k, v in state.items() if k != "input_end.A"})
    for change, match in (
        ({"prompts": torch.zeros(1)}, "unknown prompts"),
        ({"head.weight": torch.zeros(5, 48)}, "5 classes from 48 features; this model has num_classes=3"),
        ({"input_end.A": torch.zeros(2, 48)}, r"input_end.A .*\(2, 48\); .* needs \(32, 48\)"),
        ({"output_end.b": torch.full((32,), math.nan)}, "output_end.b .* NaN or Inf"),
    ):
        with pytest.raises(AdapterError, match=match):
            other.load_adapter_state_dict(state | change)
    assert torch.equal(model(x), other(x))  # a refused one changes nothing


def test_trained_backbone_parameters_belong_to_the_adapter():
    model = create(backbone("vit"), "probe", num_classes=2)
    model.backbone.norm.weight.requires_grad_(True)
    assert "backbone.model.norm.weight" in model.adapter_state_dict()
    assert model.num_trainable() == 48
