"""The adjoint kernels against float64, torch in the same dtype, and autograd through the unrolled loop."""

from functools import partial

import pytest
import torch
from kernel_helpers import (
    BIG,
    DEVICE,
    DTYPES,
    GRADIENTS,
    assert_gradients_as_good_as_torch,
    double,
    error,
    problem,
    torch_adjoint,
    torch_solve,
)

from lion_kernels import launch, reference
from lion_kernels.adjoint import adjoint, weight_grads_by_splits
from lion_kernels.launch_step import StepConfig
from lion_kernels.step import adjoint_wide

ACTIVATIONS = list(reference.ACTIVATIONS)
HOWS = {
    "products": partial(adjoint, rows_per_split=0),
    "splits": partial(adjoint, rows_per_split=64),
    "steps": partial(adjoint_wide, config=StepConfig(32, 64, 32, 4, 2)),
}


def adjoint_problem(rows, width, state, dtype=torch.float32, activation="tanh", **options):
    """grad_out, x, p, A, W, V of a solved problem, with a random gradient."""
    args = problem(rows, width, state, dtype, **options)
    p = torch_solve(*double(*args), activation, 60, 1.0, True)[1].to(dtype)
    x, A, W, _, V, _ = args
    grad_out = torch.randn(rows, width, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)
    return grad_out, x, p, A, W, V


def assert_gradients(how, args, activation, terms, damping, residual):
    got = HOWS[how](*args, activation, terms, 0.0, damping, residual)
    _, x, _, A, W, V = args
    shapes = (x.shape, A.shape, W.shape, A.shape[:1], V.shape, V.shape[:1])
    for name, ours, shape in zip(GRADIENTS, got, shapes, strict=False):
        assert ours.shape == shape and ours.is_contiguous()
        assert ours.dtype == (x.dtype if name == "dx" else torch.float32)
    assert_gradients_as_good_as_torch(got, args, activation, terms, damping, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOWS)
def test_a_gradient_that_is_not_finite_is_flagged_and_alone(how, dtype):
    grad_out, *given = adjoint_problem(70, 40, 24, dtype)
    clean = HOWS[how](grad_out, *given, "tanh", 3, 0.0, 1.0, True)
    grad_out[3, 7] = float("nan")
    dx, *_, change, _ = HOWS[how](grad_out, *given, "tanh", 3, 0.0, 1.0, True)
    others = [i for i in range(70) if i != 3]
    assert torch.equal(dx[others], clean[0][others]) and torch.equal(change[others], clean[6][others])
    assert change[3].isinf()


@pytest.mark.parametrize(
    "how, shape, activation, damping",
    [*((how, s, a, d) for how in ("products", "splits") for s in [(150, 50, 24), *BIG]
       for a in ACTIVATIONS for d in (1.0, 0.7)),
     *(("steps", (37, 40, 72), a, 1.0) for a in ACTIVATIONS), ("steps", (37, 40, 72), "gelu", 0.7)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype, how, shape, activation, damping):
    args, terms = adjoint_problem(*shape, dtype, activation), 3 if how == "steps" else 8
    assert_gradients(how, args, activation, terms, damping, True)


SHAPES = [(1, 20, 16), (63, 17, 5), (64, 64, 16), (65, 100, 32), (200, 33, 48), (40, 33, 100), (70, 130, 64)]


@pytest.mark.parametrize(
    "how, shape, dtype",
    [*((how, s, dtype) for how in ("products", "splits") for s in SHAPES for dtype in DTYPES),
     *((how, (70, 40, 200), torch.float16) for how in ("products", "splits"))],
)  # fmt: skip
def test_every_shape(how, shape, dtype):
    assert_gradients(how, adjoint_problem(*shape, dtype), "tanh", 3, 1.0, False)


@pytest.mark.parametrize("shape", [(1, 20, 70), (33, 17, 129), (64, 64, 64), (5, 1, 7)])
def test_every_shape_in_steps(shape):
    args = adjoint_problem(*shape)
    got = HOWS["steps"](*args, "tanh", 2, 0.0, 1.0, False)
    exact = reference.adjoint(*double(*args), "tanh", 2, 0.0, 1.0, False)
    for ours, right in zip(got[:6], exact[:6], strict=True):
        assert ours.shape == right.shape and error(ours, right) < 1e-5 * shape[0]


@pytest.mark.parametrize("how", HOWS)
def test_no_rows_give_zero_gradients(how):
    got = HOWS[how](*adjoint_problem(0, 20, 16), "relu", 8, 0.0, 1.0, True)
    assert got[0].shape == (0, 20) and got[6].shape == got[7].shape == (0,)
    assert all((grad == 0).all() and grad.numel() for grad in got[1:6])


@pytest.mark.parametrize("how", ["products", "steps"])
@pytest.mark.parametrize("terms", [0, 1, 2])
def test_terms_are_counted_as_the_reference_counts(terms, how):
    args = adjoint_problem(40, 30, 72 if how == "steps" else 16)
    got = HOWS[how](*args, "tanh", terms, 0.0, 1.0, True)
    expected = reference.adjoint(*args, "tanh", terms, 0.0, 1.0, True)
    assert (got[7] == terms).all()
    torch.testing.assert_close(got[6], expected[6], rtol=1e-4, atol=1e-7)
    for ours, right in zip(got[:6], expected[:6], strict=True):
        assert error(ours, right) < 1e-5 * max(1, right.abs().max())


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_rows_stop_at_the_tolerance(damping):
    args = adjoint_problem(150, 30, 24)
    # The adjoint is linear: what makes rows differ is the slope, which vanishes for saturated states.
    args[2].mul_(torch.logspace(-2, 1.5, 150, device=DEVICE)[torch.randperm(150), None])
    got = adjoint(*args, "tanh", 80, 1e-4, damping, True)
    exact = reference.adjoint(*double(*args), "tanh", 80, 1e-4, damping, True)
    borderline = ((got[6].double() / 1e-4 - 1).abs() < 0.01) | ((exact[6].double() / 1e-4 - 1).abs() < 0.01)
    assert (borderline | (got[7] == exact[7])).all() and borderline.float().mean() < 0.1
    assert len(got[7][:64].unique()) > 3 and (got[6] <= 1e-4).all()
    same = got[7] == exact[7]
    assert error(got[0][same], exact[0][same]) < 1e-5


def test_rows_without_gradient_stop_at_once():
    args = adjoint_problem(70, 30, 16)
    args[0][5:65] = 0
    got = adjoint(*args, "relu", 8, 0.0, 1.0, True)
    expected = reference.adjoint(*args, "relu", 8, 0.0, 1.0, True)
    assert torch.equal(got[7], expected[7]) and (got[7][5:65] == 1).all() and (got[6][5:65] == 0).all()
    assert (got[0][5:65] == 0).all()


@pytest.mark.parametrize("check_every", [2, 5])
def test_testing_every_nth_step_gives_the_same_series(check_every):
    args = adjoint_problem(70, 30, 16)
    config = launch.Config(64, 32, 4, 2, check_every)
    every = adjoint(*args, "tanh", 7, 0.0, 1.0, True)
    nth = adjoint(*args, "tanh", 7, 0.0, 1.0, True, config=config)
    assert all(torch.equal(a, b) for a, b in zip(every, nth, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_every_batch(dtype):
    grad_out, x, p, *weights = adjoint_problem(150, 50, 24, dtype)
    options = ("gelu_tanh", 40, 1e-3, 1.0, True)
    together = adjoint(grad_out, x, p, *weights, *options)
    assert len(together[7].unique()) > 1
    for rows in (slice(0, 1), slice(63, 65), slice(149, 150), slice(10, 100)):
        alone = adjoint(grad_out[rows], x[rows], p[rows], *weights, *options)
        for k in (0, 6, 7):
            assert torch.equal(together[k][rows], alone[k])


@pytest.mark.parametrize("how", HOWS)
def test_the_gradients_are_deterministic(how):
    args = adjoint_problem(200 if how != "steps" else 70, 40, 24, torch.float16)
    first, *others = (HOWS[how](*args, "relu", 4, 0.0, 1.0, True) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_stays_in_its_row(dtype, bad):
    args = adjoint_problem(70, 30, 16, dtype)
    clean = adjoint(*args, "tanh", 8, 0.0, 1.0, True)
    args[0][3, 7] = bad
    got = adjoint(*args, "tanh", 8, 0.0, 1.0, True)
    others = torch.arange(70, device=DEVICE) != 3
    for k in (0, 6, 7):
        assert torch.equal(got[k][others], clean[k][others])
    assert got[6][3].isinf() and not torch.isfinite(got[0][3]).all() and not torch.isfinite(got[1]).all()


def test_a_row_that_diverges_keeps_its_last_finite_state():
    args = adjoint_problem(70, 30, 16, gamma=0.8)
    args[4].mul_(1e7)
    args[0][::2] = 0
    got = adjoint(*args, "relu", 12, 0.0, 1.0, True)
    expected = reference.adjoint(*args, "relu", 12, 0.0, 1.0, True)
    assert torch.equal(got[6].isinf(), expected[6].isinf()) and got[6][1::2].isinf().any()
    # The kernel scales rows by a power of two, so it overflows at another step than the reference.
    assert torch.isfinite(got[0][::2]).all() and not got[0].isnan().any()


def test_half_precision_keeps_small_gradients():
    """A state gradient below float16's normal range: the loop runs on rows scaled to one."""
    grad_out, x, p, A, W, V = adjoint_problem(70, 64, 16, torch.float16)
    V, A = V * 1e-3, A * 1e3
    args = (grad_out * 1e-3, x, p, A, W, V)
    got = adjoint(*args, "tanh", 8, 0.0, 1.0, False)
    exact = torch_adjoint(*double(*args), "tanh", 8, 1.0, False)[0]
    naive = torch_adjoint(*args, "tanh", 8, 1.0, False)[0]
    size = exact.abs().max()
    assert error(got[0], exact) < 2e-3 * size < error(naive, exact)


@pytest.mark.parametrize("how", HOWS)
def test_the_size_of_a_gradient_changes_nothing(how):
    """Powers of two at which the square of an entry under- or overflows float32."""
    grad_out, *given = adjoint_problem(37, 40, 24)
    dx, *_, change, count = HOWS[how](grad_out, *given, "tanh", 8, 1e-3, 1.0, False)
    for size in (2.0**-90, 2.0**80):
        got = HOWS[how](size * grad_out, *given, "tanh", 8, 1e-3, 1.0, False)
        assert torch.equal(got[0], size * dx) and torch.equal(got[6], change) and torch.equal(got[7], count)


def test_fused_sums_write_every_element_and_nothing_else():
    grad_out, x, p, A, _, _ = adjoint_problem(130, 50, 24)
    t, z = torch.randn_like(p), torch.randn_like(p)
    config = launch.Config(32, 32, 4, 2)
    for rows in (64, 128, 256):
        grads = weight_grads_by_splits(grad_out, x, t, z, config, rows)
        exact = [m.T @ n for m, n in ((t, x), (t, z))] + [t.sum(0), grad_out.T @ z, grad_out.sum(0)]
        for got, expected in zip(grads, exact, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_shapes_are_named():
    grad_out, x, p, A, W, V = adjoint_problem(4, 30, 16)
    with pytest.raises(AssertionError, match=r"p must be \[4, 16\]; got \[3, 16\]"):
        adjoint(grad_out, x, p[:3], A, W, V, "relu", 8, 0.0, 1.0, True)
