"""The forward kernels against float64, torch in the same dtype, and the reference's stopping rule.

"whole" is the solve in one launch, "steps" one launch per application.
"""

from functools import partial

import pytest
import torch
from kernel_helpers import (
    BIG,
    DEVICE,
    DTYPES,
    assert_as_good_as_torch,
    assert_rows_close,
    double,
    error,
    problem,
    torch_solve,
)

from lion_kernels import launch, reference
from lion_kernels.launch_step import StepConfig
from lion_kernels.solve import solve
from lion_kernels.step import solve_wide

ACTIVATIONS = list(reference.ACTIVATIONS)
# Several row tiles, column blocks and slices already for small problems.
SMALL = StepConfig(32, 64, 32, 4, 2)
# The solve, and rows, width and state of a problem for it.
HOWS = {"whole": (solve, 70, 50, 24), "steps": (partial(solve_wide, config=SMALL), 37, 40, 72)}
hows = pytest.mark.parametrize("how", HOWS)
# No row stops by this tolerance, but for a change of exactly zero, which changes nothing.
NEVER = 0.0


def assert_same_stops(count, change, expected_count, expected_change, tol):
    """Equal counts, save for rows whose residual lies within a hundredth of the tolerance."""
    borderline = ((change.double() / tol - 1).abs() < 0.01) | (
        (expected_change.double() / tol - 1).abs() < 0.01
    )
    assert (borderline | (count == expected_count)).all()
    assert borderline.float().mean() < 0.1


def assert_as_good(how, shape, dtype, activation, steps, damping, residual):
    args = problem(*shape, dtype)
    got = HOWS[how][0](*args, activation, steps, NEVER, damping, residual)
    exact = torch_solve(*double(*args), activation, steps, damping, residual)
    same = torch_solve(*args, activation, steps, damping, residual)
    for name, ours, theirs, right in zip(("out", "p"), got, same, exact, strict=False):
        assert_as_good_as_torch(ours, theirs, right, name)
    rows, width, state = shape
    assert [list(t.shape) for t in got] == [[rows, width], [rows, state], [rows], [rows]]
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.int32]
    assert how == "whole" or (got[3] == steps).all()


@pytest.mark.parametrize(
    "how, shape, activation, damping",
    [*(("whole", s, a, d) for s in [(70, 50, 24), *BIG] for a in ACTIVATIONS for d in (1.0, 0.7)),
     *(("steps", (37, 40, 72), a, 1.0) for a in ACTIVATIONS), ("steps", (37, 40, 72), "gelu", 0.7)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype, how, shape, activation, damping):
    assert_as_good(how, shape, dtype, activation, 20 if how == "whole" else 5, damping, True)


SHAPES = [
    (0, 20, 16), (1, 20, 16), (1, 1, 1), (63, 17, 5), (64, 64, 16), (65, 100, 32), (130, 33, 48),
    (70, 130, 64), (40, 48, 100), (40, 33, 128), (3, 192, 16),
]  # fmt: skip
STEP_SHAPES = [(0, 20, 70), (1, 20, 70), (33, 17, 129), (64, 64, 64), (5, 1, 7)]


@pytest.mark.parametrize(
    "how, shape, dtype",
    [*(("whole", shape, dtype) for shape in SHAPES for dtype in DTYPES),
     ("whole", (35, 40, 200), torch.float16),
     *(("steps", shape, torch.float32) for shape in STEP_SHAPES)],
)  # fmt: skip
def test_every_shape(how, shape, dtype):
    assert_as_good(how, shape, dtype, "tanh", 8 if how == "whole" else 4, 1.0, how == "whole")


@pytest.mark.parametrize(
    "how, rows, still, state",
    [*(("whole", 150, 64, state) for state in (5, 16, 24, 48)), ("steps", 100, 32, 72)],
)
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_rows_stop_where_the_reference_stops(how, rows, still, state, damping):
    args = problem(rows, 30, state, gamma=0.7)
    # The first tile is done at once; the others hold rows of very different size.
    scale = torch.logspace(-4, 1, rows, device=DEVICE)[torch.randperm(rows)]
    scale[:still] = 0
    args[0] *= scale[:, None]
    args[3] *= 0
    options = ("tanh", 25 if how == "steps" else 60, 1e-4, damping, True)
    out, p, change, count = HOWS[how][0](*args, *options)
    exact = reference.solve(*double(*args), *options)
    assert_same_stops(count, change, exact[3], exact[2], 1e-4)
    assert (count[:still] == 1).all() and len(count[still : 2 * still].unique()) > 3
    same = count == exact[3]
    # Residuals are differences of nearly equal states.
    torch.testing.assert_close(change[same], exact[2][same].float(), rtol=2e-2, atol=1e-6)
    assert error(out[same], exact[0][same]) < 1e-5 and error(p[same], exact[1][same]) < 1e-5


def test_tolerance_of_half_precision_stops_every_row():
    args = problem(130, 40, 32, torch.float16)
    _, _, change, count = solve(*args, "relu", 50, 1e-2, 1.0, True)
    expected = reference.solve(*args, "relu", 50, 1e-2, 1.0, True)
    assert (change <= 1e-2).all() and count.max() < 50
    # Float16 operands move a residual by parts in a thousand of the tolerance.
    assert (count - expected[3]).abs().max() <= 1


@hows
def test_one_iteration_and_max_iter_reached(how):
    """One iteration is a plain adapter."""
    run, *shape = HOWS[how]
    x, A, W, b, V, c = args = problem(*shape, gamma=0.95)
    out, p, change, count = run(*args, "silu", 1, 1e-4, 0.5, True)
    torch.testing.assert_close(p, x @ A.T + b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, x + torch.nn.functional.silu(p) @ V.T + c, rtol=1e-5, atol=1e-5)
    assert (count == 1).all() and (change > 0.9).all()
    out, _, change, count = run(*args, "relu", 3, 1e-6, 1.0, True)
    expected = reference.solve(*args, "relu", 3, 1e-6, 1.0, True)
    assert (count == 3).all() and (change > 1e-6).all()
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(change, expected[2], rtol=1e-4, atol=0)


@hows
@pytest.mark.parametrize("residual", [True, False])
def test_residual_and_save(residual, how):
    run, *shape = HOWS[how]
    args = problem(*shape)
    out, p, *told = run(*args, "gelu", 8, 1e-3, 1.0, residual)
    expected = reference.solve(*args, "gelu", 8, 1e-3, 1.0, residual)
    for got, right in zip((out, p), expected, strict=False):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    again = run(*args, "gelu", 8, 1e-3, 1.0, residual, save=False)
    assert again[1].shape == (0, shape[2])
    for got, same in zip((again[0], *again[2:]), (out, *told), strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how, damping", [("whole", 1.0), ("whole", 0.7), ("steps", 1.0)])
def test_a_row_is_the_same_in_every_batch(dtype, how, damping):
    run, rows, width, state = HOWS[how]
    rows = 150 if how == "whole" else 70
    if BIG and how == "whole":
        rows, width, state = 2000, 768, 64
    x, *weights = problem(rows, width, state, dtype)
    steps = 40 if how == "whole" else 20
    options = ("gelu_tanh", steps, 1e-2 if dtype != torch.float32 else 1e-4, damping, True)
    together = run(x, *weights, *options)
    assert len(together[3].unique()) > 1
    for part in (slice(0, 1), slice(31, 40), slice(63, 65), slice(rows - 1, rows)):
        for whole, alone in zip(together, run(x[part], *weights, *options), strict=True):
            assert torch.equal(whole[part], alone)
    order = torch.randperm(rows, device=DEVICE)
    for whole, shuffled in zip(together, run(x[order], *weights, *options), strict=True):
        assert torch.equal(whole[order], shuffled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how, activation", [("whole", "relu"), ("whole", "gelu_tanh"), ("steps", "relu")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_flagged_and_alone(bad, how, activation, dtype):
    run, rows, width, state = HOWS[how]
    x, *weights = problem(rows, width, state, dtype)
    options = (activation, 12, 1e-2, 1.0, False)
    clean = run(x, *weights, *options)
    broken = x.clone()
    broken[[3, rows - 1], 7] = bad
    got = run(broken, *weights, *options)
    hit = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    hit[[3, rows - 1]] = True
    out, p, change, count = got
    # The last finite state is the start, z = 0.
    assert change[hit].isinf().all() and (count[hit] == 1).all() and (p[hit] == 0).all()
    torch.testing.assert_close(out[hit], weights[4].expand(2, -1))
    for ours, expected in zip(got, clean, strict=True):
        assert torch.equal(ours[~hit], expected[~hit])


@hows
@pytest.mark.parametrize("name", ["A", "W", "b", "V", "c"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_flag_every_row(bad, name, how):
    run, *shape = HOWS[how]
    args = problem(*shape)
    args["xAWbVc".index(name)].view(-1)[0] = bad
    for activation in ("relu", "tanh"):
        assert run(*args, activation, 5, 1e-4, 1.0, True)[2].isinf().all()


@pytest.mark.parametrize("steps", [1, 2, 12])
@hows
def test_rows_beyond_the_range_of_float16_are_flagged(how, steps):
    """The pre-activation that is saved is within it, so that no row spoils the gradients of the weights."""
    run, rows, width, state = HOWS[how]
    x, A, W, b, V, c = problem(rows, width, state, torch.float16)
    A[:], W[:] = 0.5, 0.5 * torch.eye(state)
    x[3], x[7] = (sign * 65504 / width for sign in (4, -4))
    out, p, change, _ = run(x, A, W, b, V, c, "relu", steps, 1e-2, 1.0, True)
    hit = torch.arange(rows, device=DEVICE) == 3
    assert torch.equal(change.isinf(), hit) and torch.isfinite(p).all()
    assert torch.isfinite(out[~hit]).all() and p[7].max() < -30_000
    # The read-out alone.
    x[3], x[5], x[7], c[:] = 1, 65504, 1, 65504
    _, p, change, _ = run(x, 0 * A, W, b, V, c, "tanh", steps, 1e-2, 1.0, True)
    assert change[5].isinf() and torch.isfinite(p).all()


@hows
def test_a_norm_that_overflows_is_no_residual_of_zero(how):
    run, rows, width, state = HOWS[how]
    x, A, W, b, V, c = problem(rows, width, state)
    A[:], W[:], b[:] = 1e19 / state**0.5, 0.8 * torch.eye(state), 0
    x[:] = 0
    x[1, 0] = 1.5
    change = run(x, A, W, b, V, c, "relu", 12, 1e-4, 1.0, True)[2]
    assert change[1].isinf() and (torch.cat([change[:1], change[2:]]) == 0).all()


@pytest.mark.parametrize(
    "how, check_every, carry",
    [*(("whole", n, carry) for n in (1, 3, 7) for carry in (False, True)), ("steps", 1, False)],
)
def test_a_row_that_diverges_keeps_its_last_finite_state(how, check_every, carry):
    run, rows, width, state = HOWS[how]
    x, A, W, b, V, c = problem(rows, width, state, gamma=1e6)
    x[::2], b[:] = 0, 0
    args = (x, A, W, b, V, c, "relu", 20, 1e-4, 1.0, True)
    if how == "whole":
        run = partial(run, config=launch.Config(64, 32, 4, 2, check_every, carry))
    out, p, change, count = run(*args)
    expected = reference.solve(*args, check_every=check_every)
    assert torch.equal(count, expected[3]) and torch.equal(change.isinf(), expected[2].isinf())
    assert change[1::2].isinf().any() and count[1::2].max() > 2 and (change[::2] == 0).all()
    assert torch.isfinite(p).all() and p.abs().max() > 1e6
    assert_rows_close(p, expected[1])
    assert_rows_close(out, expected[0])


@pytest.mark.parametrize("check_every", [2, 5])
def test_testing_every_nth_step(check_every):
    args = problem(130, 30, 24)
    config = launch.Config(64, 32, 4, 2, check_every)
    _, _, change, count = solve(*args, "tanh", 33, 1e-4, 1.0, True, config=config)
    expected = reference.solve(*double(*args), "tanh", 33, 1e-4, 1.0, True, check_every)
    assert_same_stops(count, change, expected[3], expected[2], 1e-4)
    assert (count % check_every == 0).all()


def test_carrying_the_pre_activation_changes_no_bit():
    args = problem(130, 30, 24)
    plain, carried = (
        solve(*args, "tanh", 30, 1e-4, 0.8, True, config=launch.Config(64, 32, 4, 2, carry=carry))
        for carry in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, carried, strict=True))


@hows
def test_parameters_of_another_dtype_and_strided_tokens(how):
    run, rows, width, state = HOWS[how]
    x, A, W, b, V, c = problem(rows, width, state)
    wide = torch.randn(rows, 2 * width, device=DEVICE)
    wide[:, ::2] = x
    strided = (A.T.contiguous().T, W.T.contiguous().T, b, V.T.contiguous().T, c)
    expected = run(x, A, W, b, V, c, "relu", 8, 1e-4, 1.0, True)
    for got, same in zip(run(wide[:, ::2], *strided, "relu", 8, 1e-4, 1.0, True), expected, strict=True):
        assert torch.equal(got, same)
    half = run(x.half(), A, W, b, V, c, "relu", 8, 1e-2, 1.0, True)
    assert half[0].dtype == half[1].dtype == torch.float16
    assert error(half[0], expected[0]) < 2e-2


@hows
def test_what_does_not_fit_is_named(how):
    run = HOWS[how][0]
    x, A, W, b, V, c = problem(4, 30, 16)
    with pytest.raises(AssertionError, match=r"V must be \[30, 16\]; got \[16, 30\]"):
        run(x, A, W, b, V.T, c, "relu", 20, 1e-4, 1.0, True)
    with pytest.raises(ValueError, match="activation"):
        run(x, A, W, b, V, c, "elu", 20, 1e-4, 1.0, True)
    with pytest.raises(ValueError, match="lion_kernels.step"):
        solve(*problem(4, 8, 300), "relu", 20, 1e-4, 1.0, True)
