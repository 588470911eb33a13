"""What a head reads of a frozen backbone: one map or two, its features or not, and the options for it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from equilibrium_helpers import assert_close_each, gradients, rough
from method_helpers import FAMILIES, backbone, images

from lion_fast.errors import OptionError
from lion_fast.methods import LionModel, Probe, available, create
from lion_fast.methods.reading import Reading, fixed_reading

R = 5
BOTH = ["input", "output"]
EXACT = {"state_dim": R, "tol": 1e-13, "max_iter": 400, "backward": "exact", "reading": "fixed"}


def normed(rows):
    return F.layer_norm(rows, rows.shape[-1:])


def cells(net, x, at, grid):
    """Cells (B, grid^2, C) of the map behind a place, normed, each averaged by itself."""
    maps = net.body_and_map(net.enter(x), at)[1]
    B, H, W, _ = maps.shape
    if H % grid or W % grid:  # a small map repeats
        maps = maps.repeat_interleave(grid, 1).repeat_interleave(grid, 2)
        H, W = H * grid, W * grid
    h, w = H // grid, W // grid
    found = [
        maps[:, i * h : (i + 1) * h, j * w : (j + 1) * w].mean((1, 2))
        for i, j in itertools.product(range(grid), range(grid))
    ]
    return normed(torch.stack(found, 1))


@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.parametrize("pooled", [True, False])
def test_two_maps_by_hand(key, pooled):
    """One equilibrium with an injection of each map, z = tanh(W z + A1 x1 + A2 x2 + b), and its gradients."""
    net, at = backbone(key), (2, 0)
    model = create(net, num_classes=4, at=at, grid=2, pooled=pooled, **EXACT).double()
    layer = rough(model.output_end.layer)
    model.head.weight.data.normal_()
    x, g = images(model, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    first, second = (cells(net, x, place, 2) for place in at)
    A1, A2 = layer.A.split((first.shape[2], second.shape[2]), 1)
    q = first @ A1.T + second @ A2.T + layer.b
    z = torch.zeros_like(q)
    for _ in range(150):  # 0.8^150 < 1e-14
        z = torch.tanh(z @ layer.recurrence_matrix().T + q)
    features = [normed(net.pool(net.body(net.enter(x)), "backbone"))] if pooled else []
    expected = model.head(torch.cat([*features, z.flatten(1)], 1))
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.behind()(model.encode(x)), expected, rtol=0, atol=1e-9)
    assert_close_each(gradients(model, out, g), gradients(model, expected, g), 1e-8)
    own = R * (net.map_widths[2] + net.map_widths[0]) + R * R + R
    width = pooled * net.width_out + 4 * R
    assert (model.num_trainable(), model.num_trainable(head=True)) == (own, own + 4 * (width + 1))


@pytest.mark.parametrize("key", FAMILIES)
def test_a_probe_of_two_maps_alone(key):
    net = backbone(key)
    model = create(net, "probe", num_classes=4, at=[1, 2], grid=2, pooled=False).double()
    model.head.weight.data.normal_()
    x = images(model, dtype=torch.float64)
    rows = torch.cat([cells(net, x, place, 2) for place in (1, 2)], 2).flatten(1)
    torch.testing.assert_close(model(x), model.head(rows), rtol=0, atol=1e-10)
    assert model.head.in_features == 4 * (net.map_widths[1] + net.map_widths[2]) == rows.shape[1]


@pytest.mark.parametrize("key", FAMILIES)
def test_no_map_is_a_linear_head_on_normed_features(key):
    net = backbone(key)
    model = create(net, num_classes=4, at=[]).double()
    model.head.weight.data.normal_()
    x = images(model, dtype=torch.float64)
    expected = model.head(normed(net.pool(net.body(net.enter(x)), "backbone")))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.behind()(model.encode(x)), expected, rtol=0, atol=1e-10)
    assert (model.num_trainable(), model.num_trainable(head=True)) == (0, 4 * (net.width_out + 1))
    assert model.open == () and model.at == () and model.diagnostics() == {}
    assert model.encoding() == create(net, "probe", num_classes=4).encoding()


@pytest.mark.parametrize("key", FAMILIES)
def test_maps_of_any_places_in_any_order(key):
    net = backbone(key)
    x = images(net, 2)
    y, one = net.body(net.enter(x)), [net.body_and_map(net.enter(x), at)[1] for at in range(3)]
    for count in (1, 2, 3):
        for at in itertools.permutations(range(3), count):
            out, maps = net.body_and_maps(net.enter(x), at)
            assert torch.equal(out, y) and len(maps) == count
            assert all(torch.equal(found, one[place]) for found, place in zip(maps, at, strict=True))


@pytest.mark.parametrize(
    "given, left",
    [
        ({}, {"at", "grid", "pooled", "state_dim"}),
        ({"at": 1}, {"grid", "pooled", "state_dim"}),
        ({"at": (0, 2), "grid": 2, "pooled": False, "state_dim": 8}, set()),
        ({"state_dim": 8, "grid": 1}, {"at", "pooled"}),
        ({"ends": ("input", "output")}, {"at", "grid", "pooled", "state_dim"}),
        ({"at": []}, set()),  # with no map there is nothing to choose
        ({"reading": "fixed"}, set()),
        ({"ends": "input"}, set()),
        ({"ends": ("input", "output"), "front": "residual"}, set()),
        ({"form": "residual"}, set()),
    ],
)
def test_what_is_not_given_is_open(given, left):
    model = create(backbone(), num_classes=2, **given)
    assert set(model.open) == left
    assert all(model.options[name] is None for name in left)
    again = create(backbone(), num_classes=2, **model.options)  # as an adapter does
    assert again.options == model.options and again.open == model.open


@pytest.mark.parametrize("ends", [("output",), ("input", "output")])
def test_until_it_is_chosen_a_reading_is_as_with_fixed(ends):
    net = backbone()
    auto, fixed = (create(net, num_classes=2, seed=0, ends=ends, reading=r) for r in ("auto", "fixed"))
    assert auto.reading == fixed.reading == Reading((1, 2) if len(ends) == 2 else (1,), 4, True)
    assert auto.state_dim == fixed.state_dim == fixed.options["state_dim"] == 32
    assert fixed.options["at"] == ([1, 2] if len(ends) == 2 else 1)
    x = images(auto)
    assert torch.equal(auto(x), fixed(x))
    assert not create(net, "probe", num_classes=2).open
    assert create(net, "probe", num_classes=2, reading="auto").open == ("at", "grid", "pooled")


def test_settled_from_a_seed_and_nothing_else_moves():
    net, chosen = backbone(), {"at": [0, 2], "grid": 2, "pooled": False, "state_dim": 8}
    first, second = (create(net, num_classes=2, seed=s).train() for s in (0, 1))
    before = torch.random.get_rng_state()
    first.settle(chosen, 3), second.settle(chosen, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = images(first)
    assert torch.equal(first(x), second(x)) and first.training and first.output_end.training
    assert first.open == () and first.reading == Reading((0, 2), 2, False) and first.state_dim == 8
    assert {k: first.options[k] for k in chosen} == chosen and first.options["reading"] == "auto"
    second.settle(chosen, 4)
    assert not torch.equal(first(x), second(x))
    assert create(net, num_classes=2, **first.options).reading == first.reading
    partly = create(net, num_classes=2, grid=3)
    partly.settle({}, 0)  # what nothing was chosen for has its default
    assert partly.reading == Reading((1,), 3, True) and partly.state_dim == 32 and not partly.open
    with pytest.raises(OptionError):
        create(net, "vpt", num_classes=2).settle({}, 0)


def test_readings_that_are_refused():
    net = backbone()
    for method, cls in (("lion", LionModel), ("probe", Probe)):
        for given in (
            {"at": [0, 0]}, {"at": [0, 3]}, {"at": ["0"]}, {"at": [True]}, {"at": "01"}, {"at": {0, 1}},
            {"at": [], "pooled": False}, {"pooled": 1}, {"grid": [2]}, {"reading": "best"}, {"reading": None},
        ):  # fmt: skip
            with pytest.raises(OptionError, match="|".join(given)):
                cls(net, 2, **given)
        assert available()[method] is cls
    for given in ({"form": "residual"}, {"ends": "input"}):
        with pytest.raises(OptionError, match="front"):
            create(net, num_classes=2, front="map", **given)
    assert fixed_reading(net, None, None, None, (2,)) == Reading((2,), 4, True)
    assert (
        fixed_reading(net, 1, 2, False, (2,))
        == fixed_reading(net, [1], 2, False, ())
        == Reading((1,), 2, False)
    )


@pytest.mark.parametrize(
    "method, options, known",
    [
        # without later options where these change nothing, so that rows and checkpoints of before are found
        ("lion", {"reading": "fixed", "at": 4}, {"at": 4}),
        ("lion", {"reading": "fixed", "pooled": None, "front": None}, {}),
        ("lion", {"form": "residual", "reading": "fixed", "front": "residual"}, {"form": "residual"}),
        ("lion", {"ends": BOTH, "front": "residual"}, {"ends": BOTH}),
        ("probe", {"reading": "fixed", "at": [], "grid": 4, "pooled": True}, {"grid": None}),
        ("probe", {"grid": 4}, {"grid": 4}),
        ("vpt", {"length": 4}, {"length": 4}),
        # and where they do, they count
        ("lion", {}, {"reading": "auto"}),
        ("lion", {"reading": "auto", "at": 4}, {"reading": "auto", "at": 4}),
        ("lion", {"reading": "fixed", "pooled": False}, {"pooled": False}),
        ("lion", {"reading": "fixed", "ends": BOTH}, {"ends": BOTH, "front": "map"}),
        ("probe", {"reading": "auto", "at": None}, {"reading": "auto", "at": None}),
    ],
)  # fmt: skip
def test_options_of_a_key(method, options, known):
    assert available()[method].known_before(options) == known
