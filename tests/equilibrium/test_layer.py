"""LionLayer against independent references: unrolled autograd, dense linear algebra, the eager loop."""

import copy
import dataclasses
import gc
import inspect
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lion_fast.equilibrium import (
    LionLayer,
    PixelEnd,
    SolveOptions,
    StateLayer,
    equilibrium,
    reference,
    replace_layers,
)
from lion_fast.errors import ConvergenceError, OptionError
from lion_kernels import reference as kernels

D, R = 12, 5
BACKWARDS = ("neumann", "jfb", "exact", "phantom")
both = pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
every_recurrence = pytest.mark.parametrize("recurrence", ["free", "tied"])
every_backward = pytest.mark.parametrize("backward", BACKWARDS)
PHI = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "silu": F.silu,
}


def rough(layer):
    """The layer with weights large enough that every term of the gradient matters."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.4 * torch.randn_like(p))
    return layer


def double_layer(**options):
    options = {"tol": 1e-14, "max_iter": 400, "gamma": 0.9, "dtype": torch.float64, **options}
    return rough(LionLayer(D, R, **options))


def tokens(*shape, dtype=torch.float64, requires_grad=True):
    return torch.randn(*shape, D, dtype=dtype, requires_grad=requires_grad)


def unrolled(layer, x, steps=400):
    """The formula, `steps` times, differentiated by plain autograd."""
    Wh, phi = layer.recurrence_matrix(), PHI[layer.activation]
    q = x @ layer.A.T + layer.b
    z = torch.zeros_like(q)
    for _ in range(steps):
        z = phi(z @ Wh.T + q)
    return x + z @ layer.V.T + layer.c


def gradients(layer, out, x, upstream):
    return torch.autograd.grad(out, [x, *layer.parameters()], upstream)


def assert_close_each(actual, expected, tol):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= tol * e.norm().clamp_min(1e-30)


def assert_equal_each(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def linear_solve(layer, x, upstream, inverse):
    """All gradients by dense linear algebra: `inverse(J)` maps each token's J = Phi' Wh to the matrix
    that stands for (I - J)^-1. Derivatives of the activation by autograd, none from the library."""
    Wh, phi = layer.recurrence_matrix(), PHI[layer.activation]
    q = x @ layer.A.T + layer.b
    z = torch.zeros_like(q)
    with torch.no_grad():
        for _ in range(400):
            z = phi(z @ Wh.T + q)
        p = z @ Wh.T + q
    p = p.detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi(p).sum(), p)
    g = upstream @ layer.V
    T = torch.stack(
        [s * (inverse(s[:, None] * Wh).T @ row) for s, row in zip(slope, g, strict=True)]
    ).detach()
    dWh = T.T @ z.detach()
    through_wh = torch.autograd.grad(Wh, list(layer.parameters()), dWh, allow_unused=True)
    direct = {"A": T.T @ x, "b": T.sum(0), "V": upstream.T @ z, "c": upstream.sum(0)}
    grads = [upstream + T @ layer.A]
    for (name, p), via in zip(layer.named_parameters(), through_wh, strict=True):
        total = torch.zeros_like(p) if via is None else via
        grads.append(total + direct[name] if name in direct else total)
    return grads


@pytest.mark.parametrize("activation", PHI)
@every_recurrence
def test_exact_gradient_is_that_of_unrolled_autograd(recurrence, activation):
    layer = double_layer(recurrence=recurrence, activation=activation, backward="exact")
    x, upstream = tokens(9), torch.randn(9, D, dtype=torch.float64)
    expected = unrolled(layer, x)
    out = layer(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    assert_close_each(gradients(layer, out, x, upstream), gradients(layer, expected, x, upstream), 1e-9)


def truncated(terms):
    return lambda J: sum(torch.linalg.matrix_power(J, k) for k in range(terms + 1))


def phantom(steps, damping=0.5):
    def inverse(J):
        step = (1 - damping) * torch.eye(R, dtype=J.dtype) + damping * J
        return damping * sum(torch.linalg.matrix_power(step, k) for k in range(steps))

    return inverse


MODES = {
    "exact": ({"backward": "exact"}, lambda J: torch.linalg.inv(torch.eye(R, dtype=J.dtype) - J)),
    "jfb": ({"backward": "jfb"}, truncated(0)),
    **{f"neumann-{k}": ({"backward": "neumann", "neumann_terms": k}, truncated(k)) for k in (0, 1, 2, 5)},
    "phantom-5": ({"backward": "phantom", "neumann_terms": 5}, phantom(5)),
}


@pytest.mark.parametrize("mode", MODES)
@every_recurrence
def test_gradient_is_the_dense_linear_solve(recurrence, mode):
    options, inverse = MODES[mode]
    layer = double_layer(recurrence=recurrence, activation="silu", **options)
    x, upstream = tokens(6), torch.randn(6, D, dtype=torch.float64)
    actual = gradients(layer, layer(x), x, upstream)
    assert_close_each(actual, linear_solve(layer, x.detach(), upstream, inverse), 1e-10)


def test_neumann_error_falls_with_the_bound():
    """|error| <= gamma^(k+1) / (1 - gamma) |g| on the adjoint state, seen through db."""
    layer = double_layer(activation="relu", backward="exact", gamma=0.8)
    x, upstream = tokens(1), torch.randn(1, D, dtype=torch.float64)
    exact = gradients(layer, layer(x), x, upstream)[3]
    g = (upstream @ layer.V).norm()
    previous = torch.inf
    for k in range(0, 30, 5):
        layer.backward, layer.neumann_terms = "neumann", k
        error = (gradients(layer, layer(x), x, upstream)[3] - exact).norm()
        assert error <= 0.8 ** (k + 1) / 0.2 * g
        assert error < previous or error < 1e-12
        previous = error


@every_backward
@every_recurrence
def test_reference_layer_agrees(recurrence, backward):
    fast = double_layer(recurrence=recurrence, backward=backward, activation="gelu")
    plain = reference.LionLayer(D, R, tol=1e-14, max_iter=400, gamma=0.9, recurrence=recurrence,
                                backward=backward, activation="gelu", dtype=torch.float64)  # fmt: skip
    plain.load_state_dict(fast.state_dict())
    x, upstream = tokens(2, 3), torch.randn(2, 3, D, dtype=torch.float64)
    out = fast(x)
    assert torch.allclose(out, plain(x), rtol=0, atol=1e-11)
    actual = dict(zip(["x", *dict(fast.named_parameters())], gradients(fast, out, x, upstream), strict=True))
    expected = dict(zip(actual, gradients(plain, plain(x), x, upstream), strict=True))
    if recurrence == "tied" and backward in ("neumann", "phantom"):
        # Truncated in R dimensions, V's gradient has one term more than in token space: closer to exact.
        fast.backward = "exact"
        exact = gradients(fast, fast(x), x, upstream)[3]
        mine, theirs = actual.pop("V"), expected.pop("V")
        assert (mine - exact).norm() < (theirs - exact).norm()
    for name, value in actual.items():
        assert (value - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_replace_layers_keeps_weights_and_optimisers():
    model = torch.nn.Sequential(reference.LionLayer(D, R), torch.nn.Linear(D, 3), reference.LionLayer(3, 2))
    parameters, x = list(model.parameters()), torch.randn(4, D)
    before = model(x)
    assert replace_layers(model) is model
    assert [type(m) for m in model] == [LionLayer, torch.nn.Linear, LionLayer]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.allclose(model(x), before, atol=1e-4)


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_damping_changes_the_path_and_not_the_point(damping):
    layer = double_layer(damping=damping, backward="exact")
    x, upstream = tokens(5), torch.randn(5, D, dtype=torch.float64)
    expected = unrolled(layer, x)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-11)
    assert_close_each(gradients(layer, layer(x), x, upstream), gradients(layer, expected, x, upstream), 1e-8)


def test_parameter_count():
    for width, state in ((768, 51), (384, 32), (7, 3)):
        layer = LionLayer(width, state, device="meta", dtype=torch.bfloat16)
        assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())
        free = sum(p.numel() for p in layer.parameters())
        assert free == 2 * state * width + state**2 + state + width
        tied = sum(p.numel() for p in LionLayer(width, state, recurrence="tied").parameters())
        assert tied == free - state**2
    assert 2 * (2 * 51 * 768 + 51**2 + 51 + 768) == 163_512


# Shapes and dtypes


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (3, 0)])
def test_any_leading_shape(lead):
    layer = double_layer(backward="exact")
    x = tokens(*lead)
    out, info = layer(x, return_info=True)
    assert out.shape == x.shape and info.residual.shape == lead and info.iterations.shape == lead
    upstream = torch.randn_like(x)
    assert info.reason == "converged"
    assert_close_each(
        gradients(layer, out, x, upstream), gradients(layer, unrolled(layer, x), x, upstream), 1e-9
    )


def test_non_contiguous_input_and_gradient():
    layer = double_layer()
    x = torch.randn(D, 6, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    upstream = torch.randn(D, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous() and not upstream.is_contiguous()
    copied = x.detach().contiguous().requires_grad_()
    actual = gradients(layer, layer(x), x, upstream)
    expected = gradients(layer, layer(copied), copied, upstream.contiguous())
    assert_equal_each(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_parameters", [True, False])
def test_lower_precision(dtype, cast_parameters):
    """Error at most twice that of rounding the input, the weights and the output alone."""
    layer = double_layer(activation="tanh", backward="neumann")
    x, upstream = tokens(40), torch.randn(40, D, dtype=torch.float64)
    low = rough(LionLayer(D, R, activation="tanh", gamma=0.9, tol=1e-6, max_iter=100))
    low.load_state_dict(layer.state_dict())
    low = low.to(dtype) if cast_parameters else low
    xl = x.detach().to(dtype).requires_grad_()
    out = low(xl)
    assert out.dtype == dtype
    grads = gradients(low, out, xl, upstream.to(dtype))
    assert [g.dtype for g in grads] == [dtype, *(p.dtype for p in low.parameters())]

    rounded = copy.deepcopy(layer)
    rounded.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    xr = xl.detach().double().requires_grad_()
    exact_out = rounded(xr)
    exact = gradients(rounded, exact_out, xr, upstream.to(dtype).double())
    eps = torch.finfo(dtype).eps
    assert (out.double() - exact_out).norm() <= 2 * eps * exact_out.norm() + 1e-5
    for g, e in zip(grads, exact, strict=True):
        assert (g.double() - e).norm() <= 8 * eps * e.norm() + 1e-5 * e.norm()


@every_backward
@every_recurrence
@both
def test_autocast_changes_nothing(cls, recurrence, backward):
    layer = rough(cls(D, R, backward=backward, recurrence=recurrence))
    x, upstream = tokens(6, dtype=torch.float32), torch.randn(6, D)
    plain = layer(x)
    expected = gradients(layer, plain, x, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, again = layer(x), layer(x)
        (inside,) = torch.autograd.grad(again, x, upstream)
        inner = F.linear(mixed, torch.eye(D))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain) and inner.dtype == torch.bfloat16
    assert_equal_each(gradients(layer, mixed, x, upstream), expected)
    assert cls is reference.LionLayer or torch.equal(inside, expected[0])


# Module behaviour


def test_copies_survive(tmp_path):
    layer, x = rough(LionLayer(D, R)), torch.randn(4, D)
    expected = layer(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = LionLayer(D, R)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), expected)
        other(x).sum().backward()
        assert other.W.grad is not None and layer.W.grad is None
    moved = copy.deepcopy(layer).to(torch.float64).to("cpu")
    assert torch.allclose(moved(x.double()).float(), expected, atol=1e-4)
    assert copy.deepcopy(layer).half()(x.half()).dtype == torch.float16
    assert sorted(layer.state_dict()) == ["A", "V", "W", "b", "c"]
    assert sorted(LionLayer(D, R, recurrence="tied").state_dict()) == ["A", "V", "b", "c"]


def test_two_forwards_one_backward():
    layer = double_layer()
    x1, x2, upstream = tokens(3), tokens(5), torch.randn(5, D, dtype=torch.float64)
    o1, o2 = layer(x1), layer(x2)
    ((o1 * upstream[:3]).sum() + (o2 * upstream).sum()).backward()
    got = [p.grad.clone() for p in layer.parameters()]
    g1 = torch.autograd.grad(layer(x1), list(layer.parameters()), upstream[:3])
    g2 = torch.autograd.grad(layer(x2), list(layer.parameters()), upstream)
    assert_close_each(got, [a + b for a, b in zip(g1, g2, strict=True)], 1e-14)


@both
def test_the_same_again_with_a_kept_graph_and_with_checkpointing(cls):
    layer = rough(cls(D, R, dtype=torch.float64))
    x, upstream = tokens(4), torch.randn(4, D, dtype=torch.float64)
    out, wanted = layer(x), [x, *layer.parameters()]
    first = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
    assert_equal_each(first, torch.autograd.grad(out, wanted, upstream))
    assert_equal_each(first, gradients(layer, checkpoint(layer, x, use_reentrant=False), x, upstream))


@every_backward
@both
def test_second_derivative_is_refused(cls, backward):
    layer = rough(cls(D, R, backward=backward, dtype=torch.float64))
    x = tokens(3)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|second time"):
        g.square().sum().backward()


@every_backward
@pytest.mark.parametrize(
    "cls, wanted",
    [
        *[(cls, wanted) for cls in (LionLayer, reference.LionLayer) for wanted in ("x", "A", "W", "b")],
        (LionLayer, "V"),  # the reference's read-out is plain autograd, and right
    ],
)
def test_second_derivative_is_refused_beside_another_path(cls, backward, wanted):
    """A linear loss, whose upstream gradient has no graph, plus a term that can be differentiated twice:
    without an error the answer would be that term's alone."""
    layer = rough(cls(D, R, backward=backward, activation="tanh", dtype=torch.float64))
    layer.requires_grad_(False)
    tensor = tokens(3) if wanted == "x" else getattr(layer, wanted).requires_grad_()
    x = tensor if wanted == "x" else tokens(3, requires_grad=False)
    loss = (layer(x) * torch.randn(3, D, dtype=torch.float64)).sum() + tensor.square().sum()
    (g,) = torch.autograd.grad(loss, tensor, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(g.sum(), tensor)


@both
def test_who_gets_a_gradient(cls):
    """In eval mode too, and at the first step: V must not start at zero, or none would reach A, W and b."""
    layer = cls(64, 16).eval()
    layer(torch.randn(50, 64)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())
    layer.zero_grad()
    layer.A.requires_grad_(False)
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.A.grad is None and layer.W.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(3, 64)).requires_grad


# Memory


def saved_tensors(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return saved


@every_backward
def test_saved_for_backward_is_x_and_one_state(backward):
    """Per token: X itself and one R-wide tensor, whatever the number of iterations."""
    rows = 1000
    for max_iter in (1, 5, 50):
        layer = rough(LionLayer(D, R, backward=backward, max_iter=max_iter, tol=0.0))
        x = tokens(rows, dtype=torch.float32)
        per_token = [t for t in saved_tensors(layer, x) if t.numel() >= rows]
        widths = sorted(t.shape[-1] for t in per_token)
        assert widths == [R, D], widths
        assert {t.untyped_storage().data_ptr() for t in per_token if t.shape[-1] == D} == {x.data_ptr()}
        with torch.no_grad():
            assert not [t for t in saved_tensors(layer, x) if t.numel() >= rows]


@both
@pytest.mark.parametrize("backward", ["neumann", "exact"])
def test_nothing_outlives_a_skipped_backward(cls, backward):
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # a tensor with its graph would close a cycle

    layer = rough(cls(D, R, backward=backward))
    x, alive = tokens(10, dtype=torch.float32), []

    def pack(tensor):
        saved = Saved(tensor)
        alive.append(weakref.ref(saved))
        return saved

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            out, info = layer(x, return_info=True)
        assert sum(ref() is not None for ref in alive) > 5
        del out
        assert all(ref() is None for ref in alive), "the graph is kept alive by more than its output"
    finally:
        gc.enable()
    assert info.residual.shape == (10,)


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@every_recurrence
def test_compiles_as_one_graph(compiler, recurrence):
    torch._dynamo.reset()
    layer = rough(LionLayer(D, R, recurrence=recurrence))
    x, upstream = tokens(2, 8, dtype=torch.float32), torch.randn(2, 8, D)
    expected = layer(x)
    grads = gradients(layer, expected, x, upstream)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    out = compiled(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    assert_close_each(gradients(layer, out, x, upstream), grads, 1e-4)
    (out, info), (_, other) = compiled(x, return_info=True), layer(x, return_info=True)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(info.iterations, other.iterations) and info.reason == "converged"


# Batch invariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width,state", [(D, R), (384, 32), (768, 51), (65, 64)])
def test_a_token_does_not_depend_on_its_batch(dtype, width, state):
    layer = rough(LionLayer(width, state, activation="tanh", gamma=0.95))
    x = torch.randn(1000, width).to(dtype)
    x[500:] *= 100  # half of the tokens converge at another speed
    whole, info = layer(x, return_info=True)
    for start, count in ((0, 1), (0, 2), (3, 1), (499, 2), (17, 63), (17, 64), (250, 65), (400, 500)):
        part, some = layer(x[start : start + count], return_info=True)
        assert torch.equal(part, whole[start : start + count]), (start, count)
        assert torch.equal(some.iterations, info.iterations[start : start + count])
    order = torch.randperm(1000)
    assert torch.equal(layer(x[order]), whole[order])


def test_an_input_gradient_does_not_depend_on_its_batch():
    layer = rough(LionLayer(384, 32, backward="exact"))
    x, upstream = torch.randn(300, 384, requires_grad=True), torch.randn(300, 384)
    (whole,) = torch.autograd.grad(layer(x), x, upstream)
    part = x[100:117].detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(layer(part), part, upstream[100:117])[0], whole[100:117])


# The solve's record and its failures


def test_one_iteration_is_one_application():
    layer = double_layer(max_iter=1)
    x = tokens(4)
    out, info = layer(x, return_info=True)
    expected = x + F.relu(x @ layer.A.T + layer.b) @ layer.V.T + layer.c
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    assert info.iterations.tolist() == [1] * 4 and info.reason == "max_iter"


def aligned(x, rate, **options):
    """An equilibrium that contracts by exactly `rate`: W = rate I and positive states; z = x / (1 - rate)."""
    eye, zero = torch.eye(R, dtype=torch.float64), torch.zeros(R, dtype=torch.float64)
    return equilibrium(x, eye, rate * eye, zero, eye, zero, residual=False, return_info=True, **options)


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_geometric_rates(rate):
    x, tol = torch.rand(3, R, dtype=torch.float64) + 0.5, 1e-6
    z, info = aligned(x, rate, max_iter=100_000, tol=tol)
    assert info.reason == "converged"
    assert (z * (1 - rate) / x - 1).abs().max() < 1.1 * tol / (1 - rate)
    # |z_k - z_k-1| / |z_k| = rate^(k-1) (1 - rate) / (1 - rate^k) falls under tol at:
    expected = 1 + torch.log(torch.tensor(tol / (1 - rate))) / torch.log(torch.tensor(rate))
    assert (info.iterations - expected).abs().max() <= 2


def test_damping_does_not_fake_convergence():
    """A small step changes z little; the residual is that of the un-damped map."""
    x = torch.rand(3, R, dtype=torch.float64) + 0.5
    for damping in (0.1, 0.01):
        _, info = aligned(x, 0.9, damping=damping, max_iter=5, tol=0.05)
        assert info.reason == "max_iter" and (info.residual > 0.4).all()


def test_info_says_what_happened():
    layer = double_layer(tol=1e-8, max_iter=100)
    x = tokens(6)
    out, info = layer(x, return_info=True)
    Wh = layer.recurrence_matrix()
    z = torch.linalg.lstsq(layer.V, (out - x - layer.c).T).solution.T
    f = F.relu(z @ Wh.T + x @ layer.A.T + layer.b)
    residual = (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-3 * R**0.5)
    assert (residual < 2e-8).all() and (info.residual <= 1e-8).all() and info.converged.all()
    assert info.summary()["reason"] == "converged" and 1 < info.summary()["iterations"] < 100
    assert info.backward is None
    layer.backward = "exact"
    out, info = layer(x, return_info=True)
    out.sum().backward()
    assert info.backward.reason == "converged" and (info.backward.iterations > 1).all()
    assert double_layer(max_iter=2)(x, return_info=True)[1].reason == "max_iter"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_stays_alone(bad):
    layer = rough(LionLayer(D, R))
    x = torch.randn(100, D)
    clean = layer(x)
    x[41, 3] = bad
    out, info = layer(x, return_info=True)
    others = torch.arange(100) != 41
    assert torch.equal(out[others], clean[others])
    assert info.reason == "non_finite" and info.converged.tolist() == others.tolist()
    assert torch.isfinite(out[41, torch.arange(D) != 3]).all()


@both
@pytest.mark.parametrize("activation", PHI)
def test_expansive_maps_are_flagged_and_finite(activation, cls):
    layer = cls(D, R, activation=activation, gamma=50.0, allow_expansive=True, max_iter=200)
    with torch.no_grad():
        layer.W.copy_(40 * torch.eye(R)), layer.A.normal_(), layer.V.normal_()
    x = torch.randn(30, D, requires_grad=True)
    out, info = layer(x, return_info=True)
    assert torch.isfinite(out).all()
    if activation != "tanh":
        assert info.reason == "non_finite" and not info.converged.all()


def test_policies():
    layer = rough(LionLayer(D, R, max_iter=2, tol=1e-6, on_failure="raise"))
    with pytest.raises(ConvergenceError, match="did not reach their equilibrium .max_iter."):
        layer(torch.randn(4, D))
    layer.on_failure = "warn"
    with pytest.warns(UserWarning, match="Raise max_iter"):
        layer(torch.randn(4, D))
    layer.on_failure = "ignore"
    layer(torch.randn(4, D))


@pytest.mark.parametrize("name", ["A", "W", "b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(name, bad):
    layer = LionLayer(D, R, on_failure="raise")
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] = bad
    with pytest.raises(ConvergenceError, match=f"weights {name} hold NaN or Inf"):
        layer(torch.randn(4, D))
    layer.on_failure = "ignore"
    assert layer(torch.randn(4, D), return_info=True)[1].reason == "non_finite"


def test_no_host_synchronisation():
    """Fake CUDA tensors have no values: any look at one from the host raises."""
    if torch.__version__ < "2.8" and not torch.cuda.is_available():
        pytest.skip("fake CUDA tensors need a GPU in this torch")
    with FakeTensorMode(), torch.no_grad():
        layer = LionLayer(D, R, device="cuda", backend="torch")
        x = torch.randn(70, D, device="cuda")
        out, info = layer(x, return_info=True)
        assert out.device.type == info.residual.device.type == info.converged.device.type == "cuda"
        args = (x, layer.A, layer.recurrence_matrix(), layer.b, layer.V, layer.c, "relu", 50, 1e-4, 1.0, True)
        _, p, _, count = kernels.solve(*args)
        assert count.shape == (70,) and p.shape == (70, R)
        kernels.adjoint(x, x, p, layer.A, layer.recurrence_matrix(), layer.V, "relu", 8, 1e-4, 1.0, True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            info.summary()


# Bad input


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer, StateLayer])
@pytest.mark.parametrize(
    "option, values",
    {
        "gamma": (1.0, 0.0, -0.5, float("nan"), "0.5"),
        "activation": ("elu",),
        "backward": ("bptt",),
        "backend": ("cuda",),
        "on_failure": ("panic",),
        "damping": (0.0, 1.5, None),
        "max_iter": (0, 2.5),
        "neumann_terms": (-1,),
        "tol": (-1e-3, 2.0, "small"),
        "state_dim": (0,),
        "dim": (3.0,),
    }.items(),
)
def test_bad_options(cls, option, values):
    for value in values:
        with pytest.raises(OptionError, match=option):
            cls(**{"dim": D, option: value})


def test_bad_options_of_the_layer_alone():
    with pytest.raises(OptionError, match="recurrence"):
        LionLayer(D, recurrence="loose")
    with pytest.raises(OptionError, match="gamma"):
        LionLayer(D, gamma=0.0, allow_expansive=True)


@pytest.mark.parametrize("make", [LionLayer, reference.LionLayer, StateLayer, PixelEnd])
def test_options_of_a_solve_are_attributes(make):
    layer = make(4, 3, max_iter=7, backward="jfb", on_failure="warn")
    assert (layer.max_iter, layer.tol, layer.backward, layer.backend) == (7, None, "jfb", "auto")
    layer.tol, layer.neumann_terms = 1e-3, 2
    assert layer.solve == SolveOptions(
        max_iter=7, backward="jfb", on_failure="warn", tol=1e-3, neumann_terms=2
    )
    with pytest.raises(OptionError, match="max_iter"):
        layer.max_iter = 0
    assert pickle.loads(pickle.dumps(layer)).solve == copy.deepcopy(layer).solve == layer.solve
    listed = inspect.signature(make).parameters
    assert {f.name: f.default for f in dataclasses.fields(SolveOptions)}.items() <= {
        name: p.default for name, p in listed.items()
    }.items()


def test_unknown_options_raise():
    for cls in (LionLayer, reference.LionLayer, StateLayer, PixelEnd):
        with pytest.raises(TypeError, match="'gama'; did you mean gamma") as raised:
            cls(D, R, gama=0.5)
        assert isinstance(raised.value, OptionError)
    with pytest.raises(TypeError, match="iterations"):
        LionLayer(D, R)(torch.randn(2, D), iterations=3)
    layer = LionLayer(D, R)
    arguments = (torch.randn(2, D), layer.A, layer.W, layer.b, layer.V, layer.c)
    with pytest.raises(TypeError, match="'terms'.*neumann_terms"):
        equilibrium(*arguments, terms=3)


def test_bad_input():
    layer = LionLayer(D, R)
    with pytest.raises(ValueError, match="12.*13"):
        layer(torch.randn(4, 13))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(4, D, dtype=torch.int64))
    with pytest.raises(ValueError, match="W must have shape"):
        equilibrium(torch.randn(4, D), layer.A, torch.eye(4), layer.b, layer.V, layer.c)
    with pytest.raises(RuntimeError, match="cannot run"):
        LionLayer(D, R, backend="triton")(torch.randn(4, D))
