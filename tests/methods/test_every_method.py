"""What every method promises on every family: any batch, layout, dtype, copy and mode; what it refuses."""

import copy
import io
import math

import pytest
import timm
import torch
from method_helpers import backbone, images, shaken

from lion_fast.backbones import Backbone
from lion_fast.errors import AdapterError, BackboneError, DataError, LionError, OptionError
from lion_fast.methods import available, create, method_options

KIND = {"vit": "vit", "swin": "swin", "resnet": "cnn", "convnext": "cnn"}
EVERY = [(key, m, {}) for key, kind in KIND.items() for m, cls in available().items() if kind in cls.families]
EVERY += [
    *(("vit", m, {"form": "naive"}) for m in ("vpt", "vfpt", "e2vpt", "cvpt", "dyt")),
    ("vit", "lion", {"form": "residual"}),
    ("vit", "vpt", {"depth": "shallow"}),
    ("vit", "vpt", {"state_dim": 4}),
    ("swin", "vpt", {"form": "naive"}),
    ("swin", "vpt", {"depth": "shallow"}),
    ("resnet", "lion", {"form": "residual"}),
    ("vit", "lora", {"target": "qv"}),
    ("vit", "e2vpt", {"masks": "learned"}),
    ("vit", "probe", {"grid": 2}),
]
each = pytest.mark.parametrize("key, method, options", EVERY)


def build(key, method, options):
    return shaken(create(backbone(key), method, num_classes=3, **options)).eval()


@each
def test_any_batch_and_layout(key, method, options):
    model = build(key, method, options)
    x = images(model, 5)
    whole = model(x)
    for count in (1, 2):
        torch.testing.assert_close(model(x[:count]), whole[:count], rtol=1e-4, atol=1e-5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert model(x[:0]).shape == (0, 3)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.flip(-1).flip(-1)[:, [0, 1, 2]]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(last), whole, rtol=1e-4, atol=1e-5)


@each
def test_a_model_of_an_empty_batch_learns_nothing(key, method, options):
    model = build(key, method, options).train()
    model(images(model)[:0]).sum().backward()
    for parameter in model.trainable_parameters():
        assert parameter.grad is None or not parameter.grad.any()


@each
def test_dtypes(key, method, options):
    model = build(key, method, options)
    x = images(model)
    with torch.no_grad():
        single = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        assert half.dtype == torch.float32 and torch.isfinite(half).all()
        scale = single.abs().max().clamp(min=1)
        if method != "dyt":  # its dispatchers decide on a threshold
            assert (half - single).abs().max() < 0.1 * scale
        double = model.double()(x.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, single.double(), rtol=0, atol=1e-3 * scale.item())


@each
def test_copies_and_states(key, method, options):
    """A deep copy, a pickled model and a model that takes a state compute the same, and go their own ways."""
    model = build(key, method, options)
    x = images(model)
    with torch.no_grad():
        expected = model(x)  # whatever it keeps, it keeps now
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = create(backbone(key), method, num_classes=3, **options).eval()
        other(x)
        other.load_state_dict(model.state_dict())
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), other):
            assert torch.equal(twin(x), expected)
            shaken(twin, 0.3)
            assert not torch.equal(twin.eval()(x), expected) and torch.equal(model(x), expected)


@each
def test_modes_and_inference_before_training(key, method, options):
    model = build(key, method, options)
    x, labels = images(model), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        first = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), first)
    optimizer = torch.optim.SGD(model.trainable_parameters(), 0.05)
    for mode in (True, False, True):
        model.train(mode)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        (loss + sum(model.loss_terms(x, labels).values() if mode else ())).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        moved = model(x)
        assert not torch.equal(moved, first)
    with torch.no_grad():
        assert torch.equal(model(x), moved)
    torch.testing.assert_close(model(x), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "key, method", [("vit", m) for m in available()] + [("resnet", "vpt"), ("swin", "vpt")]
)
def test_images_that_are_none(key, method):
    model = create(backbone(key), method, num_classes=3)
    x = images(model)
    for wrong in (
        *((x * 50).to(dtype) for dtype in (torch.uint8, torch.int8, torch.int64, torch.bool)),
        *(x.to(dtype) for dtype in (torch.complex64, torch.float16, torch.float64)),
        *(x[:, :1], x[:, [0, 1, 2, 0]], x[0], x[None], x[..., :0], x.movedim(1, -1), x.numpy(), None, [1]),
        *(x[..., :-4], torch.zeros(2, 3, 48, 32)),
    ):
        with pytest.raises(DataError, match="images"):
            model(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.bfloat16()).shape == (3, 3)


WRONG = (
    "5", "zz", "", -1, 0, 2.5, True, False, math.nan, math.inf, -math.inf, 1e300, 10**9, 10**30, [3], ["5"],
    (), {}, {"a": 1}, b"x", set(), object(), torch.tensor([1.0, 2.0]),
)  # fmt: skip


@pytest.mark.parametrize(
    "key, method, name",
    [(key, m, name) for key, m, o in EVERY if not o for name in method_options(available()[m])],
)
def test_a_value_is_refused_by_name_or_taken(key, method, name):
    """By kind, over all options of all methods: whatever is given, it is an `OptionError` or a model."""
    frozen, cls = backbone(key), available()[method]
    default, refused = method_options(cls)[name], 0
    for value in WRONG:
        for make in (lambda **o: create(frozen, method, 2, **o), lambda **o: cls(frozen, 2, **o)):
            try:
                model = make(**{name: value})
            except LionError as error:
                assert isinstance(error, OptionError) and name in str(error), (value, error)
                refused += 1
            else:
                number = isinstance(value, (int, float)) and math.isfinite(value)
                places = name == "at" and value in ((), [3])  # a list of one is recorded as the one
                # a number where one is asked for, a bool where a bool is
                is_bool = isinstance(default, bool) or name == "pooled"
                assert places or (number and isinstance(value, bool) <= is_bool), value
                taken = model.options.get(name, default)
                assert taken == value or (places and taken in ([], 3))
    assert refused >= 2 * (len(WRONG) - 8)


@pytest.mark.parametrize("value", WRONG)
def test_what_create_is_given(value):
    frozen = backbone("vit")
    for given in (
        {"num_classes": value},
        {"num_classes": 2, "method": value},
        {"num_classes": 2, "seed": value},
    ):
        try:
            create(frozen, **{"method": "probe"} | given)
        except LionError as error:
            assert isinstance(error, OptionError)
        else:
            assert "seed" in given and type(value) is int


def test_images_of_a_size_that_a_patch_does_not_divide():
    model = create(backbone("vit", dynamic_img_size=True), "probe", num_classes=3)
    assert model(torch.zeros(2, 3, 48, 64)).shape == (2, 3)
    with pytest.raises(DataError, match="multiple of 16 x 16"):
        model(torch.zeros(2, 3, 40, 64))
    padded = create(backbone("vit", dynamic_img_size=True, dynamic_img_pad=True), "probe", num_classes=3)
    assert padded(torch.zeros(2, 3, 40, 64)).shape == (2, 3)


@pytest.mark.parametrize("key", ["vit", "swin", "resnet"])
def test_places_of_a_map(key):
    frozen = backbone(key)
    depth, x = len(frozen.map_widths), frozen.enter(images(frozen))
    for form in ("states", "residual"):
        for at in (-1, depth, 1.0, True):
            with pytest.raises(OptionError, match="at"):
                create(frozen, "lion", num_classes=3, form=form, at=at)
    for at in (-1, depth):
        with pytest.raises(OptionError, match="at"):
            frozen.body_and_map(x, at)


@pytest.mark.parametrize(
    "given", [{"std": (0.0, 1, 1)}, {"std": (math.nan,) * 3}, {"mean": (0.5,)}, {"crop_pct": "x"}]
)
def test_what_a_backbone_says_of_images(given):
    with pytest.raises(OptionError, match="mean|std|crop_pct"):
        Backbone(timm.create_model("resnet10t"), **given)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32])
def test_an_adapter_of_another_kind_of_numbers(dtype):
    model = create(backbone("vit"), "lora", num_classes=3)
    with pytest.raises(AdapterError, match=str(dtype)):
        model.load_adapter_state_dict({k: v.to(dtype) for k, v in model.adapter_state_dict().items()})


def test_one_channel():
    """A timm model of another number of channels, which `load_backbone` does not make."""
    frozen = Backbone(timm.create_model("resnet10t", in_chans=1))
    for method in ("probe", "ssf"):
        model = create(frozen, method, num_classes=3)
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 3)
        with pytest.raises(DataError, match="1, H, W"):
            model(torch.zeros(2, 3, 64, 64))
    with pytest.raises(BackboneError, match="1 channels"):
        create(frozen, "vpt", num_classes=3)
