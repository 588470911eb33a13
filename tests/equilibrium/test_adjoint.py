"""The gradient of a solve where its series does not converge: right, or flagged, in every mode."""

import pytest
import torch
from equilibrium_helpers import assert_close_each, assert_equal_each, every_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lion_fast import ImplicitLayer
from lion_fast.equilibrium import LionLayer, PixelEnd, StateLayer, equilibrium, reference
from lion_fast.equilibrium.solvers import implicit
from lion_fast.errors import ConvergenceError, OptionError
from lion_fast.pruning import BlockSparseLayer, prune_once

B, N = 4, 6
accelerated = pytest.mark.parametrize("solver", ["anderson", "broyden"])
every_solver = pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
# Matrices J of maps f(z, x) = J z + x: those that contract, by name, and those that do not.
CONTRACTING = {f"rate {rate}": torch.diag(torch.linspace(-rate, rate, N)) for rate in (0.5, 0.9, 0.99, 0.999)}
CONTRACTING["turns by 0.9"] = torch.block_diag(*[0.9 * TURN] * 3)
EXPANDING = {
    "-1.5": -1.5 * torch.eye(N),
    "from -1.5 to 0.5": torch.diag(torch.linspace(-1.5, 0.5, N)),
    "from 1.5 to 3": torch.diag(torch.linspace(1.5, 3, N)),
    "turns by 1.5": torch.block_diag(*[1.5 * TURN] * 3),
}


def linear(J, x, **options):
    """z, info, gradients of J and x, and these by a dense solve in float64; every tensor in x's dtype."""
    U = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]
    J, x64 = U @ J.double() @ U.T, x.double()
    upstream = torch.randn(len(x), N, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.eye(N, dtype=torch.float64) - J)
    W, x = J.to(x.dtype).requires_grad_(), x.detach().clone().requires_grad_()
    z, info = implicit(lambda z, x: z @ W.T + x, x, torch.zeros_like(x), **options)
    y = upstream @ inverse
    found = torch.autograd.grad(z, (W, x), upstream.to(x.dtype))
    return info, found, (y.T @ (x64 @ inverse.T), y)


@accelerated
@pytest.mark.parametrize("dtype, tol, worst", [(torch.float32, 1e-5, 1e-2), (torch.float64, 1e-10, 1e-6)])
@pytest.mark.parametrize("name", [*CONTRACTING, *EXPANDING])
def test_the_chosen_solver_solves_the_adjoint(solver, dtype, tol, worst, name):
    """Its error is the tolerance by the condition of I - J; the exact gradient is these solvers' default."""
    J = (CONTRACTING | EXPANDING)[name]
    # five steps do not span six directions that all expand
    options = {"solver_options": {"window": N + 1}} if (solver, name) == ("anderson", "from 1.5 to 3") else {}
    x = torch.randn(B, N, dtype=dtype)
    info, found, expected = linear(J, x, solver=solver, max_iter=2000, tol=tol, **options)
    assert info.reason == info.backward.reason == "converged"
    assert info.backward.residual.shape == (B,) and info.backward.tol == tol
    assert_close_each(found, expected, worst)


@pytest.mark.parametrize("name", CONTRACTING)
def test_picard_solves_the_adjoint_of_a_contraction(name):
    """To the tolerance by 1 / (1 - rate)."""
    options = {"backward": "exact", "max_iter": 50_000, "tol": 1e-5}
    info, found, expected = linear(CONTRACTING[name], torch.randn(B, N, dtype=torch.float64), **options)
    assert info.backward.reason == "converged"
    assert_close_each(found, expected, 3e-2 if "999" in name else 3e-3)


def test_damping_reaches_the_adjoint():
    """Damped by a half, Picard finds the equilibrium of z -> -1.5 z + x: the adjoint's as well."""
    options = {"damping": 0.5, "max_iter": 200, "tol": 1e-12, "backward": "exact", "on_failure": "raise"}
    _, found, expected = linear(EXPANDING["-1.5"], torch.randn(B, N, dtype=torch.float64), **options)
    assert_close_each(found, expected, 1e-9)


@accelerated
@pytest.mark.parametrize("backward", ["neumann", "jfb", "phantom"])
@pytest.mark.parametrize("name", ["-1.5", "from 1.5 to 3", "turns by 1.5"])
def test_a_series_that_cannot_converge_is_flagged(solver, backward, name):
    """Damped by a half, the phantom's series converges at -1.5, and is the right gradient there."""
    options = {"solver": solver, "backward": backward, "tol": 1e-8, "max_iter": 500, "neumann_terms": 30}
    x = torch.randn(B, N, dtype=torch.float64)
    info, found, expected = linear(EXPANDING[name], x, on_failure="ignore", **options)
    told = info.backward
    if backward == "phantom" and name == "-1.5":
        assert not told.failed.any()
        assert_close_each(found, expected, 1e-6)
    elif not (backward == "phantom" and name == "turns by 1.5"):  # its rate is 0.9
        assert told.failed.all() and not told.converged.any() and told.reason == "diverged"
        with pytest.raises(ConvergenceError, match="exact"):
            linear(EXPANDING[name], torch.randn(B, N, dtype=torch.float64), on_failure="raise", **options)


@accelerated
@pytest.mark.parametrize("backward", ["neumann", "jfb"])
def test_a_series_beside_an_accelerated_solver_warns_by_default(solver, backward):
    x = torch.randn(B, N, dtype=torch.float64)
    with pytest.warns(UserWarning, match="exact"):
        linear(EXPANDING["-1.5"], x, solver=solver, backward=backward, tol=1e-8, max_iter=500)


@every_solver
@pytest.mark.parametrize("backward", ["neumann", "jfb", "phantom"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate, terms", [(0.3, 40), (0.9, 8), (0.9, 0)])
def test_a_series_that_shrinks_is_not_flagged(solver, backward, dtype, rate, terms):
    """However slow it is, and where nothing but rounding is left of its terms."""
    W = (rate * torch.linalg.qr(torch.randn(N, N))[0]).to(dtype).requires_grad_()
    options = {"solver": solver, "backward": backward, "neumann_terms": terms, "max_iter": 500, "tol": 0.04}
    z, info = implicit(
        lambda z, x: z @ W.T + x, torch.randn(50, N).to(dtype), torch.zeros(50, N).to(dtype), **options
    )
    z.backward(1e-3 * torch.randn_like(z))
    assert not info.backward.failed.any() and torch.isfinite(W.grad).all()


def test_the_tanh_map_of_minus_one_and_a_half():
    """Anderson finds its equilibrium, Picard does not: the series is 31 times off, Picard's adjoint 1e19."""
    W, x = (-1.5 * torch.eye(N)).double().requires_grad_(), torch.randn(B, N, dtype=torch.float64)
    layer = ImplicitLayer(
        lambda z, x: torch.tanh(z @ W.T + x), solver="anderson", on_failure="raise", tol=1e-12, max_iter=200
    )
    z = layer(x)
    z.sum().backward()
    slope = (1 - z.square()).detach()
    assert (z - torch.tanh(-1.5 * z + x)).abs().max() < 1e-10
    expected = (slope / (1 + 1.5 * slope)).T @ z.detach()  # J is diagonal: -1.5 slope
    assert layer.backward == "exact" and (W.grad - expected).norm() < 1e-9 * expected.norm()
    for backward in ("neumann", "jfb"):
        layer.backward = backward
        with pytest.raises(ConvergenceError, match="exact"):
            layer(0.1 * x).sum().backward()
    layer.on_failure = "warn"
    with pytest.warns(UserWarning, match="gradients of 4 of 4"):
        layer(0.1 * x).sum().backward()


@every_solver
def test_an_adjoint_that_is_not_reached_is_told(solver):
    """z* = 0 is reached at once, the adjoint not in 4 steps; where it overflows, it stays finite."""
    W = (0.999 * torch.linalg.qr(torch.randn(40, 40))[0]).requires_grad_()
    options = {"solver": solver, "backward": "exact", "max_iter": 2, "tol": 1e-6}
    z, info = implicit(lambda z, x: z @ W.T + x, torch.zeros(B, 40), torch.zeros(B, 40), **options)
    z.backward(torch.randn(B, 40))
    assert info.reason == "converged" and info.backward.reason == "max_iter"
    z, _ = implicit(lambda z, x: z @ W.T, None, torch.zeros(B, 40), on_failure="raise", **options)
    with pytest.raises(ConvergenceError, match="max_iter"):
        z.backward(torch.randn(B, 40))
    if solver == "picard":
        z, info = implicit(
            lambda z, x: 1e30 * z @ W.T, None, torch.zeros(B, 40), **options | {"max_iter": 20}
        )
        (grad,) = torch.autograd.grad(z, W, torch.randn(B, 40))
        assert info.backward.reason == "non_finite" and torch.isfinite(grad).all()


@every_solver
@every_backward
def test_a_row_of_a_gradient_does_not_depend_on_its_batch(solver, backward):
    """Elementwise, so that f itself rounds alike; and NaN or Inf in a row's gradient is that row's alone."""
    scale = (
        torch.tensor([-1.4, -0.5, 0.1, 0.9]) if solver != "picard" else torch.tensor([-0.9, -0.5, 0.1, 0.9])
    )

    def grad(rows, upstream, **options):
        x = torch.ones(len(rows), N, requires_grad=True)
        z, info = implicit(
            lambda z, x: torch.tanh(scale[rows, None] * z + x), x, torch.zeros(len(rows), N), solver=solver,
            backward=backward, max_iter=300, **{"on_failure": "ignore"} | options,
        )  # fmt: skip
        return torch.autograd.grad(z, x, upstream[rows])[0], info.backward

    every, upstream = torch.arange(4), torch.randn(4, N) * torch.tensor([[1e-25], [1.0], [1e5], [1e25]])
    whole, told = grad(every, upstream)
    for i in range(4):
        alone, one = grad(every[i : i + 1], upstream)
        assert torch.equal(alone[0], whole[i])
        assert torch.equal(one.iterations[0], told.iterations[i]) and torch.isfinite(one.residual).all()
    for bad in (torch.nan, torch.inf):
        broken = upstream.clone()
        broken[1, 2] = bad
        # an upstream gradient that overflowed is the scaler's business: no failure of the adjoint
        spoilt, told = grad(every[1:], broken, on_failure="raise" if backward == "exact" else "ignore")
        assert torch.equal(spoilt[1:], whole[2:]) and not torch.isfinite(spoilt[0]).all()
        assert told.converged[0].item() is False


class NoLook(TorchDispatchMode):
    """Raises where the host reads a number of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host looks at a tensor"
        return func(*args, **kwargs or {})


@every_solver
@every_backward
def test_ignoring_failures_looks_at_nothing(solver, backward):
    W = (-1.5 * torch.eye(N)).requires_grad_()
    options = {"solver": solver, "backward": backward, "max_iter": 4, "early_exit": False}
    layer = ImplicitLayer(lambda z, x: torch.tanh(z @ W.T + x), on_failure="ignore", **options)
    with NoLook():
        z, info = layer(torch.randn(B, N), return_info=True)
        z.backward(torch.randn(B, N))
    assert info.backward.failed.shape == (B,)
    layer.on_failure = "warn"
    with NoLook(), pytest.raises(AssertionError, match="looks"):
        layer(torch.randn(B, N))


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["jfb", "phantom"])
def test_a_gradient_that_needs_no_adjoint_compiles_as_one_graph(backward):
    """The policy looks at nothing there."""
    torch._dynamo.reset()
    W = (0.5 * torch.eye(N)).requires_grad_()
    options = {"backward": backward, "early_exit": False, "max_iter": 20, "on_failure": "raise"}
    layer = ImplicitLayer(lambda z, x: torch.tanh(z @ W.T + x), **options)
    x = torch.randn(B, N)
    found, expected = (
        torch.autograd.grad(call(x).sum(), W)[0]
        for call in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


# The layers of tokens


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
@pytest.mark.parametrize("return_info", [True, False])
@every_backward
def test_expansion_at_the_equilibrium_of_a_layer(cls, backward, return_info):
    """tanh(1.5 z) is at rest at zero and expands there: the forward has converged, no series does."""
    layer = cls(N, 3, activation="tanh", gamma=2, allow_expansive=True, backward=backward, max_iter=100)
    with torch.no_grad():
        layer.W.copy_(1.5 * torch.eye(3)), layer.V.normal_()
    x, upstream = torch.zeros(2, B, N), torch.randn(2, B, N)
    out, info = layer(x, return_info=True)
    out.backward(upstream)
    assert info.reason == "converged" and info.backward.failed.all()
    assert info.backward.residual.shape == (2, B) and not info.backward.converged.any()
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="gradients of 8 of 8 .*gamma"):
        found = layer(x, return_info=return_info)
        (found[0] if return_info else found).backward(upstream)


@every_backward
def test_damping_of_a_layer_reaches_its_adjoint(backward):
    options = {"damping": 0.5, "tol": 1e-10, "max_iter": 300, "backward": backward}
    layer = LionLayer(N, 3, activation="tanh", gamma=2, allow_expansive=True, **options).double()
    with torch.no_grad():
        layer.W.copy_(-1.5 * torch.eye(3)), layer.V.normal_(), layer.A.mul_(0.1)
    x, upstream = torch.randn(B, N, dtype=torch.float64), torch.randn(B, N, dtype=torch.float64)
    out, info = layer(x, return_info=True)
    out.backward(upstream)
    z = torch.linalg.lstsq(layer.V, (out - x).T).solution.T.detach()
    slope = 1 - z.square()
    expected = (slope * (upstream @ layer.V) / (1 + 1.5 * slope)).sum(0)
    assert info.reason == "converged"
    if backward in ("exact", "phantom"):
        assert not info.backward.failed.any()
        assert (layer.b.grad - expected).norm() < 1e-4 * expected.norm()
    else:
        assert info.backward.reason == "diverged"


@pytest.mark.parametrize(
    "make", [LionLayer, reference.LionLayer, StateLayer, lambda n, r, **o: PixelEnd(3, r, **o)]
)
@every_backward
def test_a_bounded_layer_may_raise_and_does_not(make, backward):
    """Truncation is by design: only what is no gradient at all is a failure."""
    layer = make(N, 4, gamma=0.9, backward=backward, on_failure="raise", max_iter=200)
    shape = (2, 3, 8, 8) if isinstance(layer, PixelEnd) else (7, N)
    out, info = layer(torch.randn(shape), return_info=True)
    out.backward(torch.randn_like(out))
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert info.backward is None or not info.backward.failed.any()
    assert (info.backward is None) == (backward == "jfb" and type(layer) in (LionLayer, StateLayer))


@every_backward
def test_a_storage_takes_the_policy_of_its_layer(backward):
    layer = LionLayer(
        16, 16, activation="tanh", gamma=2, allow_expansive=True, backward=backward, on_failure="raise"
    )
    with torch.no_grad():
        layer.W.copy_(1.5 * torch.eye(16)), layer.V.normal_()
    prune_once(layer, 1.0, granularity="block", block=16)
    stored = BlockSparseLayer(layer, 16)
    with pytest.raises(ConvergenceError, match="gradients of 5 of 5"):
        stored(torch.zeros(5, 16)).backward(torch.randn(5, 16))
    layer.max_iter = 2
    with pytest.raises(ConvergenceError, match="max_iter"):
        stored(torch.randn(5, 16))


def test_the_function_of_tokens_takes_a_policy():
    eye, zero = torch.eye(3), torch.zeros(3)
    W = (-1.5 * eye).requires_grad_()
    options = {"activation": "tanh", "damping": 0.5, "on_failure": "raise", "max_iter": 200}
    x = 0.1 * torch.randn(B, 3)
    equilibrium(x, eye, W, zero, eye, zero, backward="exact", **options).sum().backward()
    with pytest.raises(ConvergenceError, match="gradients"):
        equilibrium(x, eye, W, zero, eye, zero, **options).sum().backward()


# Bad and odd use


@every_solver
@every_backward
def test_odd_maps(solver, backward):
    """No rows, no width, no z in f, no x, one number a row, another dtype, a kink."""
    options = {"solver": solver, "backward": backward, "on_failure": "raise", "neumann_terms": 20}
    W = (0.5 * torch.eye(N)).requires_grad_()
    for shape in ((0, N), (3, 0), (3,), (3, 2, 5)):
        x = torch.randn(shape, requires_grad=True)
        z, info = implicit(lambda z, x: 0.5 * z.cos() + x, x, torch.zeros(shape), **options)
        assert torch.autograd.grad(z.sum(), x)[0].shape == shape and info.reason == "converged"
    z, _ = implicit(lambda z, x: 2 * x, x, torch.zeros(shape), **options)
    assert (torch.autograd.grad(z.sum(), x)[0] - 2).abs().max() < 1e-4
    z, _ = implicit(lambda z, x: torch.relu(z @ W.T), None, torch.zeros(3, N), **options)
    assert not torch.autograd.grad(z.sum(), W)[0].any()
    for state, inner in ((torch.float32, torch.float64), (torch.float32, torch.float16)):
        x = torch.randn(3, N, dtype=inner, requires_grad=True)
        z, _ = implicit(lambda z, x: 0.5 * z.to(x.dtype) + x, x, torch.zeros(3, N, dtype=state), **options)
        (grad,) = torch.autograd.grad(z.sum(), x)
        assert z.dtype == state and grad.dtype == inner
        assert backward == "jfb" or (grad - 2).abs().max() < 0.02


@every_solver
@every_backward
def test_one_application_is_its_own_gradient_by_every_solver(solver, backward):
    W, x, z0 = (torch.randn(N, N, requires_grad=True) for _ in range(3))

    def f(z, x):
        return torch.tanh(z @ W.T + x)

    z, info = implicit(f, x, z0, solver=solver, backward=backward, max_iter=1)
    assert torch.equal(z, f(z0, x)) and info.iterations.tolist() == [1] * N
    found, expected = (torch.autograd.grad(out.sum(), (W, x, z0)) for out in (z, f(z0, x)))
    assert_equal_each(found, expected)


@every_backward
def test_an_overflowing_last_step_stays_out(backward):
    """The state is finite after the last step, f of it is not."""
    x = torch.ones(2, 3, requires_grad=True)
    z, info = implicit(lambda z, x: z.exp() + x, x, torch.zeros(2, 3), max_iter=3, backward=backward)
    assert torch.isfinite(z).all() and info.reason == "max_iter"
    z, info = implicit(lambda z, x: 1e5 * x, x, torch.zeros(2, 3, dtype=torch.float16), backward=backward)
    assert info.reason == "non_finite"


@pytest.mark.parametrize("backward", ["neumann", "exact", "phantom"])
def test_what_a_function_closes_over_must_stay(backward):
    inner = nn.Linear(N, N)
    nn.init.orthogonal_(inner.weight, 0.5)
    z = ImplicitLayer(lambda z, x: torch.tanh(inner(z) + x), backward=backward)(torch.randn(B, N))
    with torch.no_grad():
        inner.weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_options_of_a_solver():
    def f(z, x):
        return z @ W.T + x

    W = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0] * 1.2
    x = torch.randn(2, 20, dtype=torch.float64)
    few, many = (
        ImplicitLayer(f, solver="broyden", solver_options={"memory": memory}, max_iter=60)
        for memory in (2, 60)
    )
    assert many(x, return_info=True)[1].reason == "converged"
    assert few(x, return_info=True)[1].reason == "max_iter"
    for solver, given in (
        ("picard", {"memory": 3}), ("anderson", {"memory": 3}), ("broyden", {"memory": 0}),
        ("anderson", {"window": 1.5}), ("anderson", {"ridge": -1.0}), ("anderson", 3),
    ):  # fmt: skip
        with pytest.raises(OptionError):
            ImplicitLayer(f, solver=solver, solver_options=given)
        with pytest.raises(OptionError):
            implicit(f, x, x, solver=solver, solver_options=given)


def test_what_f_may_do_with_x():
    x = torch.randn(3, N)
    with pytest.raises(ValueError, match="in place"):
        implicit(lambda z, x: 0.5 * z + x.add_(1), x, torch.zeros(3, N))
    with pytest.raises(TypeError, match="close over"):
        implicit(lambda z, x: 0.5 * z + x[0], [x], torch.zeros(3, N))


@pytest.mark.parametrize("wrong", [lambda z: (z, z), lambda z: z.long(), lambda z: z + 1j])
@every_solver
def test_what_f_may_return(solver, wrong):
    with pytest.raises(TypeError, match="floating-point"):
        implicit(lambda z, x: wrong(z), None, torch.ones(2, 3), solver=solver)


@pytest.mark.parametrize(
    "layer",
    [LionLayer(N, 3), reference.LionLayer(N, 3), StateLayer(N, 3), ImplicitLayer(lambda z, x: 0.5 * z + x)],
    ids=lambda layer: type(layer).__module__.rpartition(".")[-1],
)
def test_transforms_of_functions_are_refused(layer):
    x = torch.randn(B, N)
    for call in (
        torch.vmap(layer), torch.func.grad(lambda x: layer(x).sum()), torch.func.jacrev(layer),
        lambda x: torch.func.jvp(layer, (x,), (x,)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="whole batch"):
            call(x)
    assert torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)).shape[0] == B
    assert torch.autograd.functional.jacobian(layer, x).shape[-1] == N
