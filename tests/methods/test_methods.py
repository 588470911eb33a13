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

import lion_fast
from lion_fast import reference
from lion_fast.backbones import Backbone, load_backbone
from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound
from lion_fast.errors import AdapterError, BackboneError, ConvergenceError, OptionError
from lion_fast.methods import VPT, LionModel, TunedModel, available, create, method_options

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
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", {"img_size": 64}),
}
VITS = ["vit", "qk-norm", "registers", "no class token", "norm_pre", "post-norm", "avg", "deit"]


def backbone(key, **more):
    """Random, with LayerScales, norms and statistics that are not the identity."""
    name, kwargs = BACKBONES[key]
    kwargs = dict(kwargs) | more
    built = load_backbone(name, pretrained=False, **kwargs)
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in built.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return built


def images(model, batch=3, dtype=torch.float32):
    size = model.img_size if isinstance(model, Backbone) else model.backbone.img_size
    return torch.randn(batch, 3, size, size, dtype=dtype)


def gradients(model, x, g):
    """Gradients of what is trained, from a random upstream gradient."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    out = model(x)
    found = torch.autograd.grad(out, [model.get_parameter(n) for n in names], g)
    return out, dict(zip(names, found, strict=True))


# the interface


@pytest.mark.parametrize("key", ["vit", "swin", "swinv2", "resnet", "convnext", "mobilenetv3"])
@pytest.mark.parametrize("method", ["lion", "probe", "vpt"])
def test_training_moves_the_adapter_and_nothing_else(key, method):
    if method == "vpt" and key != "vit":
        pytest.skip("vpt works on ViTs")
    name, kwargs = BACKBONES[key]
    drops = {"drop_rate": 0.3, "drop_path_rate": 0.5}
    frozen = load_backbone(name, pretrained=False, **kwargs, **drops)
    model = create(frozen, method, num_classes=4)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    x, labels = images(model, 4), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapter = model.adapter_state_dict()
    for k, v in model.state_dict().items():
        if k.startswith("backbone."):
            assert k not in adapter and torch.equal(v, before[k]), k
        else:
            assert k in adapter and not torch.equal(v, before[k]), k
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not any(m.training for m in frozen.modules()) and model.training


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
    assert all(
        p.default is not p.empty for p in inspect.signature(cls.__init__).parameters.values() if p.kind == 3
    )
    for make in (
        lambda **o: create(model.backbone, method, num_classes=2, **o),
        lambda **o: cls(model.backbone, 2, **o),
    ):
        with pytest.raises(OptionError, match=f"option of {method} 'lenght'.*pool"):
            make(lenght=3)


@pytest.mark.parametrize("key", ["vit", "resnet"])
@pytest.mark.parametrize("method", sorted(available()))
def test_values_of_another_kind_are_refused_by_name(method, key):
    frozen = backbone(key)
    if frozen.family not in available()[method].families:
        pytest.skip(f"{method} does not work on this backbone")
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
    with pytest.raises(AdapterError, match="holds unknown prompts"):
        other.load_adapter_state_dict(state | {"prompts": torch.zeros(1)})
    with pytest.raises(AdapterError, match="5 classes from 48 features; this model has num_classes=3"):
        other.load_adapter_state_dict(state | {"head.weight": torch.zeros(5, 48)})
    with pytest.raises(
        AdapterError, match=r"input_end.A of the adapter is \(2, 48\); this model needs \(32, 48\)"
    ):
        other.load_adapter_state_dict(state | {"input_end.A": torch.zeros(2, 48)})
    with pytest.raises(AdapterError, match="output_end.b of the adapter holds NaN or Inf"):
        other.load_adapter_state_dict(state | {"output_end.b": torch.full((32,), math.nan)})
    assert torch.equal(model(x), other(x))  # a refused one changes nothing


def test_trained_backbone_parameters_belong_to_the_adapter():
    model = create(backbone("vit"), "probe", num_classes=2)
    model.backbone.norm.weight.requires_grad_(True)
    assert "backbone.model.norm.weight" in model.adapter_state_dict()
    assert model.num_trainable() == 48


@pytest.mark.parametrize("method", ["lion", "probe", "vpt"])
@pytest.mark.parametrize("key", ["vit", "swin", "resnet"])
def test_autocast_and_double(method, key):
    if method == "vpt" and key != "vit":
        pytest.skip("vpt works on ViTs")
    model = create(backbone(key), method, num_classes=2, seed=0)
    x = images(model)
    expected = model(x)
    g = torch.randn_like(expected)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(model, x, g)
        with torch.no_grad():
            model.eval()
            assert torch.isfinite(model(x)).all()
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in grads.values())
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    double = model.double()
    out, grads = gradients(double, x.double(), g.double())
    assert out.dtype == torch.float64 and all(v.dtype == torch.float64 for v in grads.values())
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-4)


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
    model = create(
        backbone(key),
        num_classes=4,
        form="residual",
        state_dim=6,
        recurrence=recurrence,
        tol=1e-12,
        max_iter=200,
        backward="exact",
    ).double()
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


@pytest.mark.parametrize("ends", [(), "both", ("input", "input"), ("input", "middle")])
def test_lion_refuses_other_ends(ends):
    with pytest.raises(OptionError, match='ends must be "input", "output" or both'):
        create(backbone("vit"), num_classes=2, ends=[["input"]])
    with pytest.raises(OptionError, match='ends must be "input", "output" or both'):
        create(backbone("vit"), num_classes=2, ends=ends)


@pytest.mark.parametrize(
    "option", [{"gamma": 1.5}, {"activation": "elu"}, {"state_dim": 0}, {"backward": "bptt"}]
)
@pytest.mark.parametrize("key", ["vit", "resnet"])
def test_lion_refuses_bad_options(option, key):
    with pytest.raises(OptionError, match=next(iter(option))):
        create(backbone(key), num_classes=2, **option)


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
    with pytest.raises(ConvergenceError, match="did not reach their equilibrium"):
        model = create(backbone("vit"), num_classes=2, max_iter=2, on_failure="raise")
        model(images(model))
    with pytest.raises(ConvergenceError, match="did not reach their equilibrium"):
        model = create(backbone("resnet"), num_classes=2, max_iter=2, on_failure="raise", ends="input")
        model(images(model))


def test_lion_input_end_carries_gradients_through_the_backbone():
    """Input-end gradients against finite differences of the whole frozen model, in float64."""
    model = create(
        backbone("vit"),
        num_classes=2,
        form="residual",
        state_dim=4,
        tol=1e-13,
        max_iter=300,
        backward="exact",
    ).double()
    x, g = images(model, 2, torch.float64), torch.randn(2, 2, dtype=torch.float64)
    _, grads = gradients(model, x, g)
    for name in ("input_end.A", "input_end.W", "input_end.V", "output_end.A", "output_end.c"):
        p = model.get_parameter(name)
        direction, step = torch.randn_like(p), 1e-5
        with torch.no_grad():
            p.add_(step * direction)
            up = (model(x) * g).sum()
            p.sub_(2 * step * direction)
            down = (model(x) * g).sum()
            p.add_(step * direction)
        slope = ((up - down) / (2 * step)).item()
        assert (grads[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name


# the pixel end


def dense(weight, height, width):
    """The matrix of the zero-padded convolution."""
    channels = weight.shape[1]
    basis = torch.eye(channels * height * width, dtype=weight.dtype).reshape(-1, channels, height, width)
    return F.conv2d(basis, weight, padding=weight.shape[-1] // 2).flatten(1).T


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (2, 3), (5, 5), (8, 11), (12, 12)])
@pytest.mark.parametrize("c_out, c_in, k", [(1, 1, 3), (4, 4, 3), (2, 5, 3), (3, 3, 5)])
def test_conv_norm_bound_against_a_dense_svd(height, width, c_out, c_in, k):
    for kind in range(4):
        weight = torch.randn(c_out, c_in, k, k, dtype=torch.float64)
        if kind == 1:
            weight = weight.abs()  # its norm is that of frequency zero
        if kind == 2:
            weight = torch.ones_like(weight)
        if kind == 3:
            weight = weight * 1e-9
        true = torch.linalg.matrix_norm(dense(weight, height, width), 2)
        bound = conv_norm_bound(weight, height, width)
        assert bound >= true
        # the circular convolution on the larger torus is what is bounded: within 2 % of that
        taps = torch.arange(k, dtype=torch.float64) - k // 2
        phases = [
            torch.exp(2j * math.pi * torch.arange(n + k - 1)[:, None] / (n + k - 1) * taps)
            for n in (height, width)
        ]
        matrices = torch.einsum("oihw,ah,bw->aboi", weight.to(torch.complex128), *phases)
        assert bound <= 1.02 * torch.linalg.svdvals(matrices).max()


def test_conv_norm_bound_on_large_maps():
    """Sampling with a margin, against every frequency of the true size."""
    for size in (33, 64, 224):
        weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
        padded = torch.zeros(4, 4, size + 2, size + 2, dtype=torch.float64)
        padded[..., :3, :3] = weight
        exact = torch.linalg.svdvals(torch.fft.fft2(padded).permute(2, 3, 0, 1)).max()
        assert exact <= conv_norm_bound(weight, size, size) <= 1.025 * exact
        assert exact * (1 - 1e-5) <= conv_norm_bound(weight.float(), size, size) <= 1.025 * exact


def test_conv_norm_bound_of_smooth_worst_cases():
    """Kernels whose peak lies exactly between two samples: where sampling without a margin is too small."""
    for shift in (0.5 / 32, 0.25 / 32, 7.5 / 32):
        phase = torch.exp(2j * math.pi * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * shift)
        outer = torch.outer(phase, phase)
        weight = torch.stack([torch.stack([outer.real, -outer.imag]), torch.stack([outer.imag, outer.real])])
        # the complex kernel's response is 3 x 3 at its peak, and this is its real form
        assert 9 <= conv_norm_bound(weight, 10_000, 10_000) <= 9 * 1.025


def test_conv_norm_bound_gradient_and_zero():
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: conv_norm_bound(w, 6, 6), weight)
    zero = torch.zeros(3, 3, 3, 3, requires_grad=True)
    bound = conv_norm_bound(zero, 6, 6)
    assert bound == 0
    assert torch.isfinite(torch.autograd.grad(bound, zero)[0]).all()


@pytest.mark.parametrize(
    "activation, lipschitz", [("relu", 1.0), ("tanh", 1.0), ("gelu", 1.1289), ("silu", 1.0998)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pixel_end_is_a_contraction(activation, lipschitz, dtype):
    for scale in (0.01, 1.0, 100.0, 1e6):
        end = PixelEnd(3, 4, activation=activation, gamma=0.9)
        end.W.data.mul_(scale)
        if scale == 100.0:
            end.W.data.fill_(1.0)
        end = end.to(dtype)
        norm = torch.linalg.matrix_norm(dense(end.recurrence_kernel(9, 7).double(), 9, 7), 2)
        assert lipschitz * norm <= 0.9
        if scale == 0.01:
            assert torch.equal(end.recurrence_kernel(9, 7), end.W)


def test_pixel_end_bound_survives_rounding():
    """One tap, one channel: the norm is the tap itself, and rounding it up would exceed gamma."""
    for gamma in torch.linspace(0.5, 0.99, 50).tolist():
        end = PixelEnd(3, 1, gamma=gamma).bfloat16()
        end.W.data.zero_()[0, 0, 1, 1] = 100
        assert end.recurrence_kernel(9, 9).double().abs().sum() <= gamma


def test_pixel_end_gradients():
    """Against autograd through 400 unrolled steps, in float64, with a random upstream gradient."""
    end = PixelEnd(3, 4, backward="exact", tol=1e-13, max_iter=400).double()
    end.V.data.normal_()
    end.W.data.mul_(3)  # so that the bound is active and its gradient counts
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    q = F.conv2d(x, end.U, end.b, padding=1)
    z, kernel = torch.zeros_like(q), end.recurrence_kernel(8, 8)
    for _ in range(400):
        z = F.relu(F.conv2d(z, kernel, padding=1) + q)
    expected = torch.autograd.grad(x + F.conv2d(z, end.V, end.c), [x, *end.parameters()], g)
    out, info = end(x, return_info=True)
    assert info.converged.all() and info.residual.shape == (2,)
    found = torch.autograd.grad(out, [x, *end.parameters()], g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pixel_end_does_not_mix_images():
    end = PixelEnd(3, 4)
    end.V.data.normal_()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(end(x)[:1], end(x[:1]), rtol=0, atol=1e-6)


# vpt


@pytest.mark.parametrize("key", VITS)
@pytest.mark.parametrize("pool", ["backbone", "mean"])
def test_vpt_exact_is_naive(key, pool):
    frozen = backbone(key)
    naive = VPT(frozen, 4, length=5, form="naive", pool=pool)
    exact = VPT(frozen, 4, length=5, pool=pool)
    assert exact.form == "exact"
    exact.load_adapter_state_dict(naive.adapter_state_dict())
    x, g = images(naive), torch.randn(3, 4)
    for model in (naive, exact):
        model.train()
    (a, grads_a), (b, grads_b) = gradients(naive, x, g), gradients(exact, x, g)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    for name, value in grads_a.items():
        torch.testing.assert_close(grads_b[name], value, rtol=1e-5, atol=1e-5)
    naive, exact = naive.double(), exact.double()
    (a, grads_a), (b, grads_b) = (gradients(m, x.double(), g.double()) for m in (naive, exact))
    torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    assert grads_a["prompts"].abs().amax((1, 2)).min() > 0  # every layer's prompts matter
    for name, value in grads_a.items():
        torch.testing.assert_close(grads_b[name], value, rtol=0, atol=1e-10)
    assert (a - naive.head(frozen.pool(frozen.body(frozen.enter(x.double())), pool))).abs().max() > 1e-4


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


@pytest.mark.parametrize(
    "name, length, shallow, deep",
    [
        ("vit_base_patch16_224", 10, 7_680, 92_160),
        ("vit_base_patch16_224", 50, 38_400, 460_800),
        ("vit_base_patch16_224", 100, 76_800, 921_600),
        ("vit_base_patch16_224", 200, 153_600, 1_843_200),
        ("vit_small_patch16_224", 10, 3_840, 46_080),
        ("vit_tiny_patch16_224", 1, 192, 2_304),
        ("vit_tiny_patch16_224", 200, 38_400, 460_800),
    ],
)
def test_vpt_counts(name, length, shallow, deep):
    # the count needs twelve blocks and the width, not twelve MLPs of full width
    vit = load_backbone(name, pretrained=False, img_size=32, mlp_ratio=0.01)
    assert create(vit, "vpt", num_classes=2, depth="shallow", length=length).num_trainable() == shallow
    model = create(vit, "vpt", num_classes=100, length=length)
    width = vit.width_in
    assert (model.num_trainable(), model.num_trainable(head=True)) == (deep, deep + 100 * (width + 1))


class Count:
    """Counts calls of the prefix computation."""

    def __init__(self, model):
        self.calls, self.inner = 0, model._prefix
        model._prefix = self

    def __call__(self):
        self.calls += 1
        return self.inner()


def test_vpt_prefix_is_kept_while_evaluating_and_never_stale():
    model = VPT(backbone("vit"), 2, length=4).eval()
    naive = VPT(model.backbone, 2, length=4, form="naive").eval()
    x = images(model)
    count = Count(model)

    def check():
        naive.load_adapter_state_dict(model.adapter_state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(x), naive(x.to(model.prompts.dtype)), rtol=1e-5, atol=1e-5)

    check(), check()
    with torch.inference_mode():
        model(x)
    assert count.calls == 1
    with torch.no_grad():  # an in-place write
        model.prompts.mul_(-2)
    check()
    assert count.calls == 2
    model.load_state_dict(model.state_dict() | {"prompts": torch.randn_like(model.prompts)})
    check()
    assert count.calls == 3
    model.prompts = torch.nn.Parameter(torch.randn_like(model.prompts))
    check()
    assert count.calls == 4
    model.train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=10.0)
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    check()
    model.prompts.data.normal_()  # an update without a trace, as some averaging code does, then eval()
    model.eval()
    check()
    calls = count.calls
    assert model(x).requires_grad  # gradients wanted in evaluation: computed anew, in the graph
    assert count.calls == calls + 1
    model.double(), naive.double()
    with torch.no_grad():
        torch.testing.assert_close(model(x.double()), naive(x.double()), rtol=1e-9, atol=1e-9)


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


def test_vpt_dropout():
    frozen = backbone("vit")
    x = images(frozen, 1).expand(4, -1, -1, -1)
    for form, shared in (("naive", False), ("exact", True)):
        model = VPT(frozen, 3, length=6, dropout=0.5, form=form).train()
        out = model(x)  # one image four times: only the mask can differ
        same = torch.allclose(out[0], out[1], atol=1e-5)
        assert same is shared
        assert not torch.allclose(model(x), out, atol=1e-5)
        model.eval()
        assert torch.equal(model(x), model(x))
        plain = VPT(frozen, 3, length=6, form=form).eval()
        plain.load_adapter_state_dict(model.adapter_state_dict())
        assert torch.equal(model(x), plain(x))


def test_vpt_refuses():
    vit = backbone("vit")
    for option, match in (
        ({"depth": "middle"}, "depth must be one of deep, shallow"),
        ({"form": "fast"}, "form must be one of exact, naive"),
        ({"length": 0}, "length"),
        ({"length": 2.5}, "length"),
        ({"dropout": 1.0}, "dropout"),
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


def test_lion_layers_are_the_public_layer():
    model = create(backbone("swin"), num_classes=2, form="residual")
    assert type(model.input_end) is LionLayer is lion_fast.LionLayer
