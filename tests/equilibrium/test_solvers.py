"""The generic solvers and their gradient on maps with known fixed points."""

import pytest
import torch
from equilibrium_helpers import MODES, assert_close_each
from torch import nn

from lion_fast import ImplicitLayer, SolveInfo
from lion_fast.equilibrium.solvers import SOLVERS, anderson, broyden, implicit, picard
from lion_fast.errors import ConvergenceError, OptionError

N = 6
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def linear_map(rate, dtype=torch.float64, symmetric=True):
    """f(z) = J z + 1 with spectral radius `rate`, and its fixed point."""
    U = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]
    J = U @ torch.diag(torch.linspace(-rate, rate, N, dtype=torch.float64)) @ U.T if symmetric else rate * U
    fixed = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - J, torch.ones(N, dtype=torch.float64))
    J = J.to(dtype)
    return (lambda z: z @ J.T + 1), fixed


@every_solver
@pytest.mark.parametrize("rate", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finds_the_fixed_point(solver, rate, symmetric):
    f, fixed = linear_map(rate, symmetric=symmetric)
    z, info = SOLVERS[solver](f, torch.zeros(4, N, dtype=torch.float64), max_iter=5000, tol=1e-11)
    assert info.reason == "converged" and info.residual.shape == info.iterations.shape == (4,)
    assert (z - fixed).norm() <= 1e-8 * fixed.norm()
    assert (f(z) - z).norm() <= 1e-9 * z.norm()


@pytest.mark.parametrize("solver", [anderson, broyden])
@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_acceleration_pays_on_slow_maps(solver, rate):
    """Six dimensions: an accelerated method needs a few times six applications, Picard many more."""
    f, _ = linear_map(rate)
    z0 = torch.zeros(2, N, dtype=torch.float64)
    slow = picard(f, z0, max_iter=50_000, tol=1e-9)[1].iterations.max()
    fast = solver(f, z0, max_iter=500, tol=1e-9)[1]
    assert fast.reason == "converged" and 3 * fast.iterations.max() < slow


@every_solver
def test_nonlinear(solver):
    """cos has the Dottie number as its only fixed point."""
    z, info = SOLVERS[solver](torch.cos, torch.zeros(3, 2, dtype=torch.float64), max_iter=200, tol=1e-13)
    assert (z - 0.7390851332151607).abs().max() < 1e-12 and info.reason == "converged"


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(solver, dtype):
    f, fixed = linear_map(0.7, dtype=dtype)
    z, info = SOLVERS[solver](f, torch.zeros(4, N, dtype=dtype), max_iter=200)
    assert z.dtype == dtype and info.reason == "converged"
    assert (z.double() - fixed).norm() < 20 * info.tol * fixed.norm()


@every_solver
@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_few_iterations_count_applications(solver, max_iter):
    calls = []
    f, _ = linear_map(0.5)

    def counted(z):
        calls.append(1)
        return f(z)

    z0 = torch.zeros(2, N, dtype=torch.float64)
    z, info = SOLVERS[solver](counted, z0, max_iter=max_iter, tol=1e-12)
    assert len(calls) == max_iter and info.iterations.tolist() == [max_iter] * 2
    assert info.reason == "max_iter" and not torch.equal(z, z0)
    if max_iter == 1:
        assert torch.equal(z, f(z0))


@every_solver
def test_one_bad_step_keeps_the_last_finite_state(solver):
    f, fixed = linear_map(0.9)
    calls = []

    def breaks(z):
        calls.append(1)
        out = f(z)
        if len(calls) == 4:
            out = out.clone()
            out[1] = torch.nan
        return out

    z0 = torch.zeros(3, N, dtype=torch.float64)
    z, info = SOLVERS[solver](breaks, z0, max_iter=5000, tol=1e-10)
    assert torch.isfinite(z).all()
    assert info.converged.tolist() == [True, False, True] and info.reason == "non_finite"
    assert (z[[0, 2]] - fixed).norm() < 1e-7
    assert 0 < (z[1] - fixed).norm() < fixed.norm()  # three good steps were not thrown away


@every_solver
def test_a_row_does_not_depend_on_its_batch(solver):
    scale = torch.tensor([0.1, 0.5, 0.9, 0.99])

    def alone(i):
        return SOLVERS[solver](lambda z: torch.tanh(scale[i] * z + 1), torch.zeros(1, N), max_iter=300)

    z, info = SOLVERS[solver](lambda z: torch.tanh(scale[:, None] * z + 1), torch.zeros(4, N), max_iter=300)
    for i in range(4):
        zi, one = alone(i)
        assert torch.equal(z[i : i + 1], zi) and torch.equal(info.iterations[i : i + 1], one.iterations)
    assert info.iterations.unique().numel() > 1


@every_solver
@pytest.mark.parametrize("width", [33, 257])
def test_a_wide_row_does_not_depend_on_its_batch(solver, width):
    """Odd widths: a product of matrices takes another path for one row than for two."""
    scale, x = torch.tensor([-0.9, 0.3, 0.95])[:, None], torch.randn(3, width)
    z, info = SOLVERS[solver](lambda z: torch.tanh(scale * z + x), torch.zeros(3, width))
    for i in range(3):
        alone, _ = SOLVERS[solver](lambda z, i=i: torch.tanh(scale[i] * z + x[i]), torch.zeros(1, width))
        assert torch.equal(alone[0], z[i])


@every_solver
def test_f_may_not_change_its_state(solver):
    """The residual of a state that f changed in place would be that of another, or zero."""
    for wrong in (lambda z: z.mul_(0.5).add_(1), lambda z: torch.relu_(z) + 1):
        with pytest.raises(ValueError, match="in place"):
            SOLVERS[solver](wrong, -torch.ones(2, 3))
    with torch.inference_mode():
        assert SOLVERS[solver](torch.cos, torch.zeros(2, 3))[1].reason == "converged"


@every_solver
def test_expansion_is_flagged_and_no_rows_are_solved(solver):
    z, info = SOLVERS[solver](lambda z: z.exp() + 1, torch.zeros(2, N), max_iter=100)
    assert info.reason in ("non_finite", "max_iter") and torch.isfinite(z).all()
    z, info = SOLVERS[solver](torch.cos, torch.zeros(0, N))
    assert z.shape == (0, N) and info.reason == "converged" and info.summary()["iterations"] == 0


@every_solver
def test_the_stop_does_not_depend_on_the_size_of_a_state(solver):
    """An absolute norm would grow with the root of the width, and stop later."""
    z0 = torch.zeros(3, 4, dtype=torch.float64)

    def f(z):
        return torch.tanh(0.9 * z + 0.5)

    _, narrow = SOLVERS[solver](f, z0, max_iter=200, tol=1e-6)
    _, wide = SOLVERS[solver](f, z0.repeat(1, 1000), max_iter=200, tol=1e-6)
    assert narrow.reason == "converged" and torch.equal(narrow.iterations, wide.iterations)
    assert (narrow.residual / wide.residual - 1).abs().max() < 1e-6


class Cell(nn.Module):
    """A small convolutional f(z, x) that contracts."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
        self.injection = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight *= 0.6

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + self.injection(x))


@pytest.fixture
def cell():
    return Cell(), torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)


def start():
    return torch.zeros(2, 3, 5, 5, dtype=torch.float64)


def dense_gradient(cell, x, upstream, inverse):
    """Per sample: assemble J = df/dz, apply `inverse(J)` to it, then one vector-Jacobian product."""
    z = start()
    with torch.no_grad():
        for _ in range(300):
            z = cell(z, x)
    size = z[0].numel()
    y = torch.zeros_like(z)
    for i in range(len(z)):
        J = torch.autograd.functional.jacobian(lambda v, i=i: cell(v[None], x[i : i + 1].detach())[0], z[i])
        y[i] = (inverse(J.reshape(size, size)).T @ upstream[i].flatten()).view_as(z[i])
    return torch.autograd.grad(cell(z, x), [x, *cell.parameters()], y)


@every_solver
@pytest.mark.parametrize("mode", MODES)
def test_gradients_against_dense_algebra(cell, solver, mode):
    f, x = cell
    options, inverse = MODES[mode]
    upstream = torch.randn(start().shape, dtype=torch.float64)
    z, info = implicit(f, x, start(), solver=solver, tol=1e-13, max_iter=300, **options)
    actual = torch.autograd.grad(z, [x, *f.parameters()], upstream)
    assert_close_each(actual, dense_gradient(f, x, upstream, inverse), 1e-9)
    assert mode != "exact" or info.backward.reason == "converged"


def test_layer_of_any_f(cell):
    f, x = cell
    layer = ImplicitLayer(f, solver="anderson", backward="exact")
    z, info = layer(x, start(), return_info=True)
    assert isinstance(info, SolveInfo) and info.iterations.shape == (2,)
    z.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in f.parameters())
    assert set(layer.parameters()) == set(f.parameters())
    assert layer.eval()(x, start()).requires_grad
    with torch.no_grad():
        assert not layer(x, start()).requires_grad
    assert layer.double()(x, start()).shape == start().shape


def test_parameters_changed_before_the_backward_are_an_error(cell):
    f, x = cell
    z = ImplicitLayer(f)(x, start())
    with torch.no_grad():
        f.inner.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("backward", ["neumann", "exact", "jfb", "phantom"])
@every_solver
def test_autocast(solver, backward):
    f = nn.Linear(N, N)
    with torch.no_grad():
        f.weight *= 0.3
    layer = ImplicitLayer(lambda z, x: torch.tanh(f(z) + x), solver=solver, backward=backward)
    x = torch.randn(5, N, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    mixed = torch.autograd.grad(z.sum(), x)[0]
    assert (mixed - plain).norm() < 0.03 * plain.norm()


def test_policies(cell):
    f, x = cell
    layer = ImplicitLayer(f, max_iter=2, tol=1e-9, on_failure="raise")
    with pytest.raises(ConvergenceError, match="2 of 2"):
        layer(x, start())
    layer.on_failure = "warn"
    with pytest.warns(UserWarning, match="2 of 2"):
        layer(x, start())


def test_bad_use(cell):
    f, _ = cell
    with pytest.raises(OptionError, match="solver"):
        ImplicitLayer(f, solver="newton")
    with pytest.raises(TypeError, match="'max_iters'; did you mean max_iter.*on_failure"):
        ImplicitLayer(f, max_iters=3)
    z0 = torch.zeros(2, 3)
    for solver in SOLVERS.values():
        for unknown in ("max_iters", "backward"):
            with pytest.raises(TypeError, match=f"'{unknown}'.*max_iter"):
                solver(torch.cos, z0, **{unknown: 3})
        for option, wrong in {"max_iter": 0, "tol": -1.0, "damping": 0.0}.items():
            with pytest.raises(OptionError, match=option):
                solver(torch.cos, z0, **{option: wrong})
    with pytest.raises(ValueError, match="shape"):
        picard(lambda z: z[:, :2], z0)
    with pytest.raises(TypeError, match="int64"):
        picard(torch.cos, z0.long())
    with pytest.raises(OptionError, match="window"):
        anderson(torch.cos, z0, window=0)
    with pytest.raises(OptionError, match="memory"):
        broyden(torch.cos, z0, memory=0)
