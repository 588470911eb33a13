"""LionLayer against independent references: unrolled autograd, dense linear algebra, the eager loop."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lion_fast
from lion_fast import LionLayer, reference
from lion_fast.errors import ConvergenceError, OptionError
from lion_kernels.reference import ACTIVATIONS

D, R = 12, 5
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
@pytest.mark.parametrize("recurrence", ["free", "tied"])
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


BACKWARDS = {
    "exact": ({"backward": "exact"}, lambda J: torch.linalg.inv(torch.eye(R, dtype=J.dtype) - J)),
    "jfb": ({"backward": "jfb"}, truncated(0)),
    **{f"neumann-{k}": ({"backward": "neumann", "neumann_terms": k}, truncated(k)) for k in (0, 1, 2, 5)},
    "phantom-5": ({"backward": "phantom", "neumann_terms": 5}, phantom(5)),
}


@pytest.mark.parametrize("mode", BACKWARDS)
@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_gradient_is_the_dense_linear_solve(recurrence, mode):
    options, inverse = BACKWARDS[mode]
    layer = double_layer(recurrence=recurrence, activation="silu", **options)
    x, upstream = tokens(6), torch.randn(6, D, dtype=torch.float64)
    actual = gradients(layer, layer(x), x, upstream)
    assert_close_each(actual, linear_solve(layer, x.detach(), upstream, inverse), 1e-10)


@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_jfb_is_one_application_at_the_detached_equilibrium(recurrence):
    layer = double_layer(recurrence=recurrence, activation="tanh", backward="jfb")
    x, upstream = tokens(6), torch.randn(6, D, dtype=torch.float64)
    with torch.no_grad():
        Wh = layer.recurrence_matrix()
        z = torch.zeros(6, R, dtype=torch.float64)
        for _ in range(400):
            z = torch.tanh(z @ Wh.T + x @ layer.A.T + layer.b)
        prompt = z @ layer.V.T
    if recurrence == "free":
        state = torch.tanh(z @ layer.recurrence_matrix().T + x @ layer.A.T + layer.b)
    else:
        limit = layer.gamma / ACTIVATIONS["tanh"].lipschitz
        s = lion_fast.equilibrium.contraction.contraction_scale(layer.A @ layer.V, limit)
        state = torch.tanh((x + s * prompt) @ layer.A.T + layer.b)
    expected = x + state @ layer.V.T + layer.c
    actual = gradients(layer, layer(x), x, upstream)
    assert_close_each(actual, gradients(layer, expected, x, upstream), 1e-11)


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


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
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
    assert lion_fast.replace_layers(model) is model
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
        free = sum(p.numel() for p in LionLayer(width, state).parameters())
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
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


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


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
@pytest.mark.parametrize("recurrence", ["free", "tied"])
@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
def test_autocast_changes_nothing(cls, recurrence, backward):
    layer = rough(cls(D, R, backward=backward, recurrence=recurrence))
    x, upstream = tokens(6, dtype=torch.float32), torch.randn(6, D)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
        inner = torch.nn.functional.linear(mixed, torch.eye(D))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain) and inner.dtype == torch.bfloat16
    expected = gradients(layer, plain, x, upstream)
    assert all(torch.equal(a, e) for a, e in zip(gradients(layer, mixed, x, upstream), expected, strict=True))


def test_the_adjoint_under_autocast_is_exact():
    layer = rough(LionLayer(D, R, backward="exact"))
    x, upstream = tokens(6, dtype=torch.float32), torch.randn(6, D)
    (expected,) = torch.autograd.grad(layer(x), x, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(layer(x), x, upstream)
    assert torch.equal(inside, expected)


# Module behaviour


def test_copies_survive():
    layer, x = rough(LionLayer(D, R)), torch.randn(4, D)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = LionLayer(D, R)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), expected)
        other(x).sum().backward()
        assert other.W.grad is not None and layer.W.grad is None
    moved = copy.deepcopy(layer).to(torch.float64).to("cpu")
    assert torch.allclose(moved(x.double()).float(), expected, atol=1e-4)
    assert copy.deepcopy(layer).half()(x.half()).dtype == torch.float16
    assert sorted(layer.state_dict()) == ["A", "V", "W", "b", "c"]
    assert sorted(LionLayer(D, R, recurrence="tied").state_dict()) == ["A", "V", "b", "c"]


def test_factory_arguments():
    layer = LionLayer(D, R, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_two_forwards_one_backward():
    layer = double_layer()
    x1, x2, upstream = tokens(3), tokens(5), torch.randn(5, D, dtype=torch.float64)
    o1, o2 = layer(x1), layer(x2)
    ((o1 * upstream[:3]).sum() + (o2 * upstream).sum()).backward()
    got = [p.grad.clone() for p in layer.parameters()]
    g1 = torch.autograd.grad(layer(x1), list(layer.parameters()), upstream[:3])
    g2 = torch.autograd.grad(layer(x2), list(layer.parameters()), upstream)
    assert_close_each(got, [a + b for a, b in zip(g1, g2, strict=True)], 1e-14)


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
def test_retain_graph_gives_the_same_again(cls):
    layer = rough(cls(D, R, dtype=torch.float64))
    x = tokens(4)
    out = layer(x)
    first = torch.autograd.grad(out.sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
def test_activation_checkpointing(cls):
    layer = rough(cls(D, R, dtype=torch.float64))
    x, upstream = tokens(4), torch.randn(4, D, dtype=torch.float64)
    expected = gradients(layer, layer(x), x, upstream)
    actual = gradients(layer, checkpoint(layer, x, use_reentrant=False), x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
def test_second_derivative_is_refused(backward):
    layer = double_layer(backward=backward)
    x = tokens(3)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|second time"):
        g.square().sum().backward()


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
def test_second_derivative_of_the_generic_gradient_is_refused(backward):
    layer = rough(reference.LionLayer(D, R, backward=backward, dtype=torch.float64))
    x = tokens(3)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|second time"):
        g.square().sum().backward()


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
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


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
def test_gradient_in_eval_mode(cls):
    layer = rough(cls(D, R)).eval()
    layer(torch.randn(3, D)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_frozen_parameters_get_no_gradient():
    layer = rough(LionLayer(D, R))
    layer.A.requires_grad_(False)
    layer(torch.randn(3, D)).sum().backward()
    assert layer.A.grad is None and layer.W.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(3, D)).requires_grad


def test_first_step_moves_every_parameter():
    """V must not start at zero: then no gradient would reach A, W and b."""
    layer = LionLayer(64, 16)
    out = layer(torch.randn(50, 64))
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())
    assert (out - torch.zeros(())).shape == (50, 64)


# Memory


def saved_tensors(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return saved


@pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
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


def test_nothing_is_saved_without_gradient():
    layer = rough(LionLayer(D, R))
    with torch.no_grad():
        assert not [t for t in saved_tensors(layer, torch.randn(500, D)) if t.numel() >= 500]


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
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
@pytest.mark.parametrize("recurrence", ["free", "tied"])
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
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0


@pytest.mark.slow
def test_info_compiles():
    torch._dynamo.reset()
    layer = rough(LionLayer(D, R))
    x = tokens(8, dtype=torch.float32)
    out, info = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, return_info=True)
    expected, other = layer(x, return_info=True)
    assert torch.allclose(out, expected, atol=1e-6)
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


def test_input_gradient_does_not_depend_on_the_batch():
    layer = rough(LionLayer(384, 32, backward="exact"))
    x, upstream = torch.randn(300, 384, requires_grad=True), torch.randn(300, 384)
    (whole,) = torch.autograd.grad(layer(x), x, upstream)
    part = x[100:117].detach().requires_grad_()
    (some,) = torch.autograd.grad(layer(part), part, upstream[100:117])
    assert torch.equal(some, whole[100:117])


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
    return lion_fast.equilibrium.functional.equilibrium(
        x, eye, rate * eye, zero, eye, zero, residual=False, return_info=True, **options
    )


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_geometric_rates(rate):
    x, tol = torch.rand(3, R, dtype=torch.float64) + 0.5, 1e-6
    z, info = aligned(x, rate, max_iter=100_000, tol=tol)
    assert info.reason == "converged"
    assert (z * (1 - rate) / x - 1).abs().max() < 1.1 * tol / (1 - rate)
    # |z_k - z_k-1| / |z_k| = rate^(k-1) (1 - rate) / (1 - rate^k) falls under tol at:
    expected = 1 + torch.log(torch.tensor(tol / (1 - rate))) / torch.log(torch.tensor(rate))
    assert (info.iterations - expected).abs().max() <= 2


@pytest.mark.parametrize("damping", [0.1, 0.01])
def test_damping_does_not_fake_convergence(damping):
    """A small step changes z little; the residual is that of the un-damped map."""
    x = torch.rand(3, R, dtype=torch.float64) + 0.5
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


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
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
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lion_kernels import reference as ops

    if torch.__version__ < "2.8" and not torch.cuda.is_available():
        pytest.skip("fake CUDA tensors need a GPU in this torch")
    with FakeTensorMode(), torch.no_grad():
        layer = LionLayer(D, R, device="cuda", backend="torch")
        x = torch.randn(70, D, device="cuda")
        out, info = layer(x, return_info=True)
        assert out.device.type == info.residual.device.type == info.converged.device.type == "cuda"
        args = (x, layer.A, layer.recurrence_matrix(), layer.b, layer.V, layer.c, "relu", 50, 1e-4, 1.0, True)
        _, p, _, count = ops.solve(*args)
        assert count.shape == (70,) and p.shape == (70, R)
        ops.adjoint(x, x, p, layer.A, layer.recurrence_matrix(), layer.V, "relu", 8, 1e-4, 1.0, True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            info.summary()


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -0.5}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"gamma": 0.0, "allow_expansive": True}, "gamma"),
        ({"activation": "elu"}, "activation must be one of relu, tanh"),
        ({"recurrence": "loose"}, "recurrence must be one of free, tied"),
        ({"backward": "bptt"}, "backward must be one of neumann, jfb, exact, phantom"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, triton"),
        ({"on_failure": "panic"}, "on_failure must be one of ignore, warn, raise"),
        ({"damping": 0.0}, "damping must be in"),
        ({"damping": 1.5}, "damping must be in"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"max_iter": 2.5}, "max_iter must be"),
        ({"neumann_terms": -1}, "neumann_terms must be"),
        ({"tol": -1e-3}, "tol must be in"),
        ({"tol": 2.0}, "tol must be in"),
        ({"state_dim": 0}, "state_dim must be"),
        ({"dim": 3.0}, "dim must be"),
        ({"gamma": "0.5"}, "gamma"),
        ({"tol": "small"}, "tol"),
        ({"damping": None}, "damping"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        LionLayer(**{"dim": D, **options})


def test_unknown_options_raise():
    for cls in (LionLayer, reference.LionLayer):
        with pytest.raises(TypeError, match="no option gama; the options are state_dim, .*gamma, .*dtype"):
            cls(D, R, gama=0.5)
        with pytest.raises(OptionError, match="gama"):
            cls(D, R, gama=0.5)
    with pytest.raises(TypeError, match="iterations"):
        LionLayer(D, R)(torch.randn(2, D), iterations=3)
    layer = LionLayer(D, R)
    arguments = (torch.randn(2, D), layer.A, layer.W, layer.b, layer.V, layer.c)
    with pytest.raises(TypeError, match="no option terms; the options are activation, .*neumann_terms"):
        lion_fast.equilibrium.functional.equilibrium(*arguments, terms=3)


def test_bad_input():
    layer = LionLayer(D, R)
    with pytest.raises(ValueError, match=r"width 12; x has shape \(4, 13\)"):
        layer(torch.randn(4, 13))
    with pytest.raises(TypeError, match="floating-point input; got torch.int64"):
        layer(torch.ones(4, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"W must have shape \(5, 5\)"):
        layer_args = (layer.A, torch.eye(4), layer.b, layer.V, layer.c)
        lion_fast.equilibrium.functional.equilibrium(torch.randn(4, D), *layer_args)


def test_triton_on_a_cpu_is_refused():
    layer = LionLayer(D, R, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .*Use backend='auto' or 'torch'"):
        layer(torch.randn(4, D))
