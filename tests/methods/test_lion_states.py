"""LION's variant "states": the map it reads, the model, its training and its pruning."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from equilibrium_helpers import assert_close_each, gradients, rough, unrolled
from method_helpers import BACKBONES, FAMILIES, VITS, assert_slopes, backbone, images
from training_helpers import random_splits, tiny_model

import lion_fast
from lion_fast import load_backbone
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import BackboneError, OptionError
from lion_fast.inspection import ends, measure_ends, parameter_counts
from lion_fast.methods import LionModel, create
from lion_fast.methods.reading import ReadOut, features_and_cells, map_place
from lion_fast.pruning import compact, compact_model, describe_storage, prune_once
from lion_fast.training import TrainConfig, fit

R = 5


@pytest.mark.parametrize("key", FAMILIES)
def test_a_compiled_model(key):
    torch._dynamo.reset()
    model = create(backbone(key), num_classes=3, state_dim=4)
    x, g = images(model), torch.randn(3, 3)
    expected = model(x)
    out = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_close_each(gradients(model, out, g), gradients(model, expected, g), 1e-4)


# the map


@pytest.mark.parametrize("key", VITS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_map_of_a_vit_is_timms(key, wide):
    side = BACKBONES[key][1]["img_size"]
    vit = backbone(key, **({"img_size": (side, 2 * side)} if wide else {})).double()
    x = images(vit, 2, torch.float64)
    for at in range(3):
        y, found = vit.body_and_map(vit.enter(x), at)
        (expected,) = vit.model.forward_intermediates(x, indices=[at], intermediates_only=True)
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(y, vit.body(vit.enter(x)), rtol=0, atol=1e-12)
        assert found.shape[2] == (2 if wide else 1) * found.shape[1]
        assert found.shape[-1] == vit.map_widths[at] == 48
    assert len(vit.map_widths) == 3


def stage_output(net, at, run):
    """Channels last, what stage `at` of a Swin or CNN gives in the last forward that `run()` makes."""
    kept = []
    module = net.model.get_submodule(net.model.feature_info[at]["module"])
    hook = module.register_forward_hook(lambda _, args, out: kept.append(out))
    run()
    hook.remove()
    return kept[-1] if net.family == "swin" else kept[-1].permute(0, 2, 3, 1)


@pytest.mark.parametrize("key", ["swin", "swinv2", "resnet", "efficientnet", "convnext", "mobilenetv3"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_map_of_the_others_is_what_their_stage_gives(key, wide):
    net = backbone(key, **({"img_size": (64, 128)} if wide else {})).double()
    x = images(net, 2, torch.float64)
    assert len(net.map_widths) == len(net.model.feature_info) >= 4
    for at, width in enumerate(net.map_widths):
        y, found = net.body_and_map(net.enter(x), at)
        expected = stage_output(net, at, lambda: net.body(net.enter(x)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(y, net.body(net.enter(x)), rtol=0, atol=1e-12)
        assert found.shape[-1] == width
        assert found.shape[2] == (2 if wide else 1) * found.shape[1]


def test_images_of_another_size_than_the_backbones_are_refused():
    vit = backbone("vit", dynamic_img_size=True)
    with pytest.raises(BackboneError, match="gave 8 patch tokens; images of 32 pixels make 2 x 2"):
        create(vit, num_classes=2, state_dim=4)(torch.randn(1, 3, 32, 64))


def test_a_hybrid_has_its_patches_behind_a_cnn():
    vit = load_backbone("vit_tiny_r_s16_p8_224", pretrained=False, img_size=64, depth=2)
    y, found = vit.body_and_map(vit.enter(torch.randn(2, 3, 64, 64)), 0)
    assert found.shape == (2, 2, 2, 192) and y.shape == (2, 5, 192)


@pytest.mark.parametrize(
    "key, place", [("vit", 1), ("swin", 2), ("resnet", 3), ("convnext", 2), ("efficientnet", 3)]
)
def test_where_the_map_is_taken(key, place):
    assert map_place(backbone(key)) == place
    assert create(backbone(key), num_classes=2).at == place


# the read-out


def test_the_read_outs_layout_by_hand():
    """Cell (i, j) stands at i g + j, states of a cell together, behind the normed features."""
    B, H, W, C, g, N = 2, 6, 9, 7, 3, 10
    features, maps = torch.randn(B, N, dtype=torch.float64), torch.randn(B, H, W, C, dtype=torch.float64)
    end = ReadOut(N, g * g, C, R, tol=1e-13, max_iter=300).double()
    rough(end.layer)
    out = end(features_and_cells(features, maps, g))
    assert out.shape == (B, N + g * g * R) and out.dtype == torch.float64 and end.out_features == out.shape[1]
    for b in range(B):
        normed = (features[b] - features[b].mean()) / (features[b].var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(out[b, :N], normed, rtol=0, atol=1e-12)
        for i, j in itertools.product(range(g), range(g)):
            cell = maps[b, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((0, 1))
            cell = (cell - cell.mean()) / (cell.var(correction=0) + 1e-5).sqrt()
            at = N + (i * g + j) * R
            state = unrolled(end.layer, cell[None])[0]
            torch.testing.assert_close(out[b, at : at + R], state, rtol=0, atol=1e-10)


def test_half_rows_become_float32_and_a_small_map_repeats():
    features, maps = torch.randn(2, 3).bfloat16(), torch.randn(2, 1, 2, 4).bfloat16()
    rows = features_and_cells(features, maps, 4)
    assert rows.dtype == torch.float32 and rows.shape == (2, 3 + 16 * 4)
    cells = rows[:, 3:].view(2, 4, 4, 4)
    for i, j in itertools.product(range(4), range(4)):
        assert torch.equal(cells[:, i, j], maps[:, 0, j // 2].float())


# the model


def by_hand(model, x):
    """Features and states from timm's own forward, in a loop over cells."""
    net, timm_model = model.backbone, model.backbone.model
    features = timm_model.forward_head(timm_model.forward_features(x), pre_logits=True)
    if net.family == "vit":
        (maps,) = timm_model.forward_intermediates(x, indices=[model.at], intermediates_only=True)
    else:
        maps = stage_output(net, model.at, lambda: timm_model.forward_features(x)).permute(0, 3, 1, 2)
    states = []
    for cell in F.adaptive_avg_pool2d(maps, model.grid).flatten(2).unbind(2):
        states.append(unrolled(model.output_end.layer, F.layer_norm(cell, cell.shape[1:])))
    return model.head(torch.cat([F.layer_norm(features, features.shape[1:]), *states], 1))


@pytest.mark.parametrize("key", ["vit", "registers", "norm_pre", "swin", "swinv2", "resnet", "convnext"])
def test_the_model_by_hand(key):
    options = {"state_dim": R, "grid": 3, "tol": 1e-13, "max_iter": 400, "backward": "exact"}
    model = create(backbone(key), num_classes=4, **options).double()
    rough(model.output_end.layer), model.head.weight.data.normal_()
    x, g = images(model, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    out, expected = model(x), by_hand(model, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    assert_close_each(gradients(model, out, g), gradients(model, expected, g), 1e-8)


@pytest.mark.parametrize(
    "name, options, width, features",
    [
        ("vit_base_patch16_224", {"depth": 1, "img_size": 32}, 768, 768),
        ("vit_base_patch16_siglip_224", {"depth": 1, "img_size": 32}, 768, 768),
        ("resnet18", {}, 256, 512),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 384, 768),
    ],
)
def test_counts_and_the_heads_width(name, options, width, features):
    net = load_backbone(name, pretrained=False, **options)
    for state, grid in ((32, 4), (16, 2)):
        model = create(net, num_classes=10, state_dim=state, grid=grid)
        own = state * width + state * state + state
        assert model.num_trainable() == own
        head = 10 * (features + grid * grid * state + 1)
        assert model.num_trainable(head=True) == own + head and model.head.in_features * 10 + 10 == head
        assert parameter_counts(model) == {"dense": own, "kept": own, "with_head": own + head}


# the same reading behind other methods


@pytest.mark.parametrize("key", FAMILIES)
def test_a_probe_of_the_map_reads_what_lion_reads(key):
    """Its logits are linear in LION's rows, normed: a LION whose states are the cells themselves."""
    net = backbone(key)
    lion = create(net, num_classes=4, grid=3, pool="mean")
    probe = create(net, "probe", num_classes=4, grid=3, pool="mean").double()
    probe.head.weight.data.normal_()
    x = images(probe, dtype=torch.float64)
    features, cells = lion.double().encode(x).split((net.width_out, 9 * net.map_widths[lion.at]), 1)
    cells = cells.view(len(x), 9, -1)
    rows = [F.layer_norm(r, r.shape[-1:]).flatten(1) for r in (features, cells)]
    expected = torch.cat(rows, 1) @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(probe.behind()(probe.encode(x)), expected, rtol=0, atol=1e-10)
    width = net.width_out + 9 * net.map_widths[lion.at]
    assert (probe.num_trainable(), probe.num_trainable(head=True)) == (0, 4 * (width + 1))
    assert probe.encoding() != create(net, "probe", num_classes=4, pool="mean").encoding()


@pytest.mark.parametrize("key", ["vit", "registers"])
def test_vpt_with_lions_output_end(key):
    """Deep prompts carried through by hand, and the map of a block read as LION reads it."""
    net = backbone(key)
    model = create(net, "vpt", num_classes=4, length=3, state_dim=R, pool="cls+mean").double().eval()
    assert ends(model)["output"] is model.output_end.layer
    rough(model.output_end.layer), model.head.weight.data.normal_()
    x, head = images(model, dtype=torch.float64), net.num_prefix_tokens
    rows, inside = net.enter(x), None
    for i, block in enumerate(net.blocks):
        prompts = model.prompts[i].expand(len(x), -1, -1)
        rows = block(torch.cat([rows[:, :head], prompts, rows[:, head:]], 1))
        rows = torch.cat([rows[:, :head], rows[:, head + 3 :]], 1)
        inside = rows if i == len(net.blocks) // 3 else inside
    rows = net.norm(rows)
    side = math.isqrt(inside.shape[1] - head)
    maps = inside[:, head:].unflatten(1, (side, side))
    features = torch.cat([rows[:, 0], rows[:, head:].mean(1)], 1)
    expected = model.head(model.output_end(features_and_cells(features, maps, 4)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    prompts = len(net.blocks) * 3 * net.width_in
    assert model.num_trainable() == prompts + R * net.width_out + R * R + R
    (model(x) * torch.randn(len(x), 4)).sum().backward()
    assert model.prompts.grad.abs().amax((1, 2)).min() > 0 and model.output_end.layer.A.grad.any()


def test_info_of_a_pixel_end_on_a_backbone_held_in_bfloat16():
    net = load_backbone("resnet10t", pretrained=False, precision="bf16")
    model = create(net, num_classes=2, form="residual", ends="input", pixel_channels=2).eval()
    found = measure_ends(model, torch.randn(1, 3, 32, 32))
    assert found["input"]["iterations"] == model.diagnostics()["input_iterations"]


def test_what_those_refuse():
    for key, options in (
        ("vit", {"depth": "shallow"}), ("vit", {"form": "naive"}), ("swin", {}), ("resnet", {}),
    ):  # fmt: skip
        with pytest.raises(OptionError, match="goes with deep prompts in their exact form on a ViT"):
            create(backbone(key), "vpt", num_classes=2, state_dim=4, **options)
    for method, option in (("vpt", "state_dim"), ("probe", "grid")):
        with pytest.raises(OptionError, match=option):
            create(backbone("vit"), method, num_classes=2, **{option: 0})


@pytest.mark.parametrize("key", FAMILIES)
def test_no_gradient_passes_in_front_of_the_output_end(key):
    model = create(backbone(key), num_classes=3, state_dim=4).train()
    assert model.input_end is None and model.options["ends"] == ["output"]
    rows = model.encode(images(model))
    assert not rows.requires_grad and rows.grad_fn is None
    behind = {id(p) for p in model.behind().parameters()}
    assert {id(p) for p in model.trainable_parameters()} == behind
    model(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.trainable_parameters())
    assert all(p.grad is None for p in model.backbone.parameters())
    x = images(model)
    torch.testing.assert_close(model.behind()(model.encode(x)), model(x))


@pytest.mark.parametrize("key", FAMILIES)
def test_both_ends(key):
    """A residual input end gets gradients by both ways: features and map. Against finite differences."""
    options = {
        "ends": ("input", "output"),
        "front": "residual",
        "state_dim": 4,
        "tol": 1e-13,
        "max_iter": 300,
    }
    model = create(backbone(key), num_classes=2, activation="tanh", backward="exact", **options).double()
    x, g = images(model, 2, torch.float64), torch.randn(2, 2, dtype=torch.float64)
    assert_slopes(
        model, x, g, ("input_end.V", "input_end.W", "output_end.layer.A", "output_end.layer.W"), 1e-4
    )
    assert model.diagnostics().keys() >= {"input_iterations", "output_iterations"}


def test_options_and_errors():
    vit = backbone()
    model = create(vit, num_classes=2, reading="fixed")
    assert model.form == "states" and model.pool == "backbone" == model.options["pool"]
    assert model.options["activation"] == "tanh" and (model.options["at"], model.options["grid"]) == (1, 4)
    assert create(vit, num_classes=2, form="residual").options["activation"] == "relu"
    assert create(vit, num_classes=2).head.in_features == 48 + 16 * 32
    assert create(vit, num_classes=2, pool="cls+mean").head.in_features == 96 + 16 * 32
    assert create(vit, num_classes=2, ends="input").head.in_features == 48  # pools as the backbone does
    for option, message in (
        ({"form": "state"}, "form"),
        *(({"at": at}, "at must be a whole number from 0 to 2") for at in (3, -1, True, 1.0)),
        *(({"grid": grid}, "grid") for grid in (0, 2.5)),
        ({"recurrence": "tied"}, 'needs form="residual"'),
        ({"recurrence": "loose"}, "recurrence"),
        ({"gamma": 1.0}, "gamma"),
        ({"pool": "max"}, "pool"),
        ({"state_dim": 0}, "state_dim"),
    ):
        with pytest.raises(OptionError, match=message):
            LionModel(vit, 2, **option)


@pytest.mark.parametrize("options", [{"memory": "save"}, {"fold": True}, {"memory": "save", "fold": True}])
def test_cheaper_backbones_compute_the_same(options):
    plain = backbone()
    cheap = copy.deepcopy(plain)
    lion_fast.backbones.cheaper.apply(cheap, **options)
    for ends_ in (("output",), ("input", "output")):
        first, second = (create(net, num_classes=3, seed=0, ends=ends_) for net in (plain, cheap))
        x, g = images(first), torch.randn(3, 3)
        out, other = first(x), second(x)
        torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-5)
        assert_close_each(gradients(second, other, g), gradients(first, out, g), 1e-4)


@pytest.mark.parametrize("key", FAMILIES)
def test_a_backbone_held_in_bfloat16(key):
    plain = backbone(key)
    half = copy.deepcopy(plain)
    lion_fast.backbones.cheaper.apply(half, precision="bf16")
    first, second = (create(net, num_classes=3, seed=0) for net in (plain, half))
    x = images(first)
    out = second(x)
    assert out.dtype == torch.float32 and second.encode(x).dtype == torch.float32
    assert (out - first(x)).norm() <= 0.1 * first(x).norm()


# training


QUICK = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "device": "cpu"}


def test_fit_on_features_prunes_as_on_images(tmp_path):
    found = []
    for cached in (True, False):
        model = tiny_model(form="states")
        config = TrainConfig(**QUICK, cache_features=cached, prune=0.5)
        result = fit(model, random_splits(), config, tmp_path / str(cached), progress=False)
        assert result.cached_features is cached
        found.append((result.history, model.adapter_state_dict()))
    (history, state), (others, other) = found
    for row, also in zip(history, others, strict=True):
        assert row["train_loss"] == pytest.approx(also["train_loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(also["val_loss"], rel=1e-4)
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


# pruning


def test_compaction_leaves_states_alone():
    layer = StateLayer(12, R)
    prune_once(layer, 0.6, granularity="unit")
    with pytest.raises(OptionError, match="a StateLayer cannot be compacted: every state is an output"):
        compact(layer)
    model = create(backbone(), num_classes=2, state_dim=8, ends=("input", "output"), front="residual")
    rough(model.input_end)
    prune_once(model, 0.5, granularity="unit", scope="layer")
    x = images(model)
    before, end = model(x), model.output_end.layer
    assert compact_model(model) == {"input_end": (8, 4)}
    assert model.output_end.layer is end and end.state_dim == 8 and end.masks().keys() == {"A", "W"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    states = create(backbone(), num_classes=2, state_dim=8)
    assert compact_model(states) == {}
    (form,) = describe_storage(states).values()
    assert form["name"] == "dense" and "none can go" in form["reason"]


# inspection and the command line


@pytest.mark.parametrize("key", FAMILIES)
def test_measured_ends(key):
    both = {"ends": ("input", "output"), "front": "residual"}
    model = create(backbone(key), num_classes=2, state_dim=8, gamma=0.8, **both)
    rough(model.output_end.layer)
    assert ends(model)["output"] is model.output_end.layer
    told = measure_ends(model, images(model))
    assert told.keys() == {"input", "output"}
    layer = model.output_end.layer
    exact = torch.linalg.matrix_norm(layer.recurrence_matrix().detach().double(), 2).item()
    assert exact <= told["output"]["certified"] <= 0.8 * (1 + 1e-4)
    assert 0 < told["output"]["rate"] <= told["output"]["certified"]
    assert 1 <= told["output"]["iterations"] <= told["output"]["max_iterations"] <= 50
    assert told["output"]["gamma"] == 0.8 and told["output"]["converged"] == 1.0
    prune_once(model, 0.5)
    layer_zeros = sum(int((~m).sum()) for end in ends(model).values() for m in end.masks().values())
    assert parameter_counts(model)["kept"] == parameter_counts(model)["dense"] - layer_zeros
