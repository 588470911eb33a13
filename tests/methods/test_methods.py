"""The methods behind one interface: what they compute, what they train, what they leave alone."""

import copy
import gc
import inspect
import math
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from method_helpers import VIT, VITS, assert_slopes, backbone, images

import lion_fast
from lion_fast import reference
from lion_fast.backbones import load_backbone
from lion_fast.errors import AdapterError, BackboneError, ConvergenceError, OptionError
from lion_fast.methods import VPT, LionModel, TunedModel, available, create, method_options

# the interface


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
    cls = available()[method]
    model = create(backbone("vit"), method, num_classes=2)
    assert set(model.options) == set(method_options(cls))
    again = create(model.backbone, method, num_classes=2, **model.options)
    assert again.options == model.options
    assert inspect.Parameter.empty not in method_options(cls).values()
    for make in (lambda **o: create(model.backbone, method, 2, **o), lambda **o: cls(model.backbone, 2, **o)):
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
    with pytest.raises(OptionError, match="probe does not merge"):
        create(backbone("vit"), "probe", num_classes=2).merge()


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


# lion


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


@pytest.mark.parametrize("key", ["vit", "swin", "resnet"])
def test_lion_with_zero_read_out_is_the_backbone(key):
    model = create(backbone(key), num_classes=4, form="residual")
    for end in (model.input_end, model.output_end):
        end.V.data.zero_()
    x = images(model)
    torch.testing.assert_close(model.features(x), model.backbone(x))


@pytest.mark.parametrize("ends", ["input", "output", ("input",), ["output"], ("output", "input")])
@pytest.mark.parametrize("form", ["states", "residual"])
def test_lion_ends(ends, form):
    model = create(backbone("vit"), num_classes=2, ends=ends, form=form)
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
@pytest.mark.parametrize("key", ["vit", "swin", "resnet"])
def test_copies_of_a_model_survive(key, form):
    """On a CNN the input end is the pixel end with its bounded convolution."""
    model = create(backbone(key), "lion", num_classes=3, seed=0, state_dim=4, form=form).eval()
    x = torch.randn(2, 3, *(model.backbone.img_size,) * 2)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        other(x).square().sum().backward()
        assert all(p.grad is not None for p in other.trainable_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.allclose(copy.deepcopy(model).to(torch.float64)(x.double()).float(), expected, atol=1e-3)


@pytest.mark.parametrize("form", ["states", "residual"])
@pytest.mark.parametrize("key", ["vit", "resnet"])
def test_diagnostics_hold_no_graph(key, form):
    model = create(backbone(key), num_classes=2, form=form, ends=("input", "output"))
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


# vpt


def insert_by_hand(model, x):
    """VPT as published: prompts behind the class token, replaced block by block (deep) or left (shallow)."""
    vit, P, p = model.backbone.model, model.prompts, model.length
    x = vit._pos_embed(vit.patch_embed(x))
    prompts = P[0].expand(len(x), -1, -1)
    x = torch.cat([x[:, :1], prompts, x[:, 1:]], 1)
    for i, block in enumerate(vit.blocks):
        if model.depth == "deep":
            x = torch.cat([x[:, :1], P[i].expand(len(x), -1, -1), x[:, 1 + p :]], 1)
        x = block(x)
    return model.head(vit.norm(x)[:, 0])


@pytest.mark.parametrize("depth, form", [("deep", "exact"), ("deep", "naive"), ("shallow", None)])
def test_vpt_by_hand(depth, form):
    model = VPT(backbone("vit"), 4, depth=depth, length=5, form=form).double()
    x = images(model, dtype=torch.float64)
    torch.testing.assert_close(model(x), insert_by_hand(model, x), rtol=0, atol=1e-12)
    assert model.form == (form or "naive")


def test_vpt_prompts_stay_out_of_pooling():
    """Average pooling over patches only: by hand with the prompts' rows cut out."""
    frozen = backbone("avg")
    model = VPT(frozen, 4, depth="shallow", length=5)
    x = images(model)
    rows = torch.cat([model.prompts.expand(3, -1, -1), frozen.enter(x)], 1)
    rows = frozen.blocks(rows)[:, 5:]
    expected = model.head(frozen.model.fc_norm(rows.mean(1)))
    torch.testing.assert_close(model(x), expected)


def test_vpt_init():
    for patch, width in ((16, 48), (14, 48)):
        key = "vit" if patch == 16 else "registers"
        model = VPT(backbone(key), 2, length=200)
        bound = math.sqrt(6 / (3 * patch * patch + width))
        assert 0.99 * bound < model.prompts.abs().max() <= bound
        assert abs(model.prompts.mean()) < 0.05 * bound
        assert model.prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_vpt_cache_follows_autocast():
    model = VPT(backbone("vit"), 2, length=4).eval()
    x = images(model)
    with torch.no_grad():
        first = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
            assert model.prefix()[0][0].dtype == torch.bfloat16
        assert model.prefix()[0][0].dtype == torch.float32
        assert torch.equal(model(x), first)
    assert not torch.equal(half, first)


def test_vpt_refuses():
    vit = backbone("vit")
    for option, match in (
        ({"depth": "middle"}, "depth"),
        *(({name: wrong}, name) for name, wrong in (("form", "fast"), ("length", 2.5), ("dropout", 1.0))),
        ({"depth": "shallow", "form": "exact"}, 'exists for depth="deep" only'),
    ):
        with pytest.raises(OptionError, match=match):
            create(vit, "vpt", num_classes=2, **option)
    parallel = load_backbone("vit_small_patch16_18x2_224", pretrained=False, **VIT)
    with pytest.raises(OptionError, match="ParallelThingsBlock"):
        create(parallel, "vpt", num_classes=2, form="exact")
    model = create(parallel, "vpt", num_classes=2)
    assert model.form == "naive" and model(images(model)).shape == (3, 2)


def test_vpt_saves_nothing_per_image_for_the_prefix():
    """The exact form computes keys and values of P rows, however many images."""
    model = VPT(backbone("vit"), 2, length=7)
    assert [tuple(t.shape) for t in model.prefix()[0]] == [(3, 7, 16), (3, 7, 16)]
