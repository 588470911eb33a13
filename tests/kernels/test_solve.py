"""The forward kernel against float64, torch in the same dtype, and the reference's stopping rule."""

import pytest
import torch
from kernel_helpers import (
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
from lion_kernels.solve import solve

ACTIVATIONS = list(reference.ACTIVATIONS)
# No row stops by this tolerance, but for a change of exactly zero, which changes nothing.
NEVER = 0.0


def assert_same_stops(count, change, expected_count, expected_change, tol):
    """Equal counts, save for rows whose residual lies within a hundredth of the tolerance."""
    borderline = ((change.double() / tol - 1).abs() < 0.01) | (
        (expected_change.double() / tol - 1).abs() < 0.01
    )
    assert (borderline | (count == expected_count)).all()
    assert borderline.float().mean() < 0.1


@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype, activation, damping):
    args = problem(70, 50, 24, dtype)
    out, p, _, _ = solve(*args, activation, 20, NEVER, damping, True)
    exact = torch_solve(*double(*args), activation, 20, damping, True)
    same = torch_solve(*args, activation, 20, damping, True)
    assert_as_good_as_torch(out, same[0], exact[0], "out")
    assert_as_good_as_torch(p, same[1], exact[1], "p")


SHAPES = [
    (0, 20, 16), (1, 20, 16), (1, 1, 1), (63, 17, 5), (64, 64, 16), (65, 100, 32), (130, 33, 48),
    (70, 130, 64), (40, 48, 100), (40, 33, 128), (3, 192, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, state", SHAPES)
def test_every_shape(rows, width, state, dtype):
    args = problem(rows, width, state, dtype)
    out, p, change, count = solve(*args, "tanh", 8, NEVER, 1.0, True)
    exact = torch_solve(*double(*args), "tanh", 8, 1.0, True)
    same = torch_solve(*args, "tanh", 8, 1.0, True)
    assert_as_good_as_torch(out, same[0], exact[0], "out")
    assert_as_good_as_torch(p, same[1], exact[1], "p")
    assert [list(t.shape) for t in (out, p, change, count)] == [[rows, width], [rows, state], [rows], [rows]]
    assert [t.dtype for t in (out, p, change, count)] == [dtype, dtype, torch.float32, torch.int32]


def test_a_state_of_256_for_half_precision():
    args = problem(35, 40, 200, torch.float16)
    out, p, _, _ = solve(*args, "relu", 6, NEVER, 1.0, True)
    exact = torch_solve(*double(*args), "relu", 6, 1.0, True)
    same = torch_solve(*args, "relu", 6, 1.0, True)
    assert_as_good_as_torch(out, same[0], exact[0], "out")
    assert_as_good_as_torch(p, same[1], exact[1], "p")


@pytest.mark.parametrize("state", [5, 16, 24, 48])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_rows_stop_where_the_reference_stops(state, damping):
    args = problem(150, 30, state)
    # Rows of very different size converge after different numbers of steps, within one tile too.
    args[0] *= torch.logspace(-4, 1, 150, device=DEVICE)[torch.randperm(150), None]
    out, p, change, count = solve(*args, "tanh", 60, 1e-4, damping, True)
    exact = reference.solve(*double(*args), "tanh", 60, 1e-4, damping, True)
    assert_same_stops(count, change, exact[3], exact[2], 1e-4)
    assert len(count[:64].unique()) > 3
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


def test_max_iter_reached():
    args = problem(70, 30, 16, gamma=0.95)
    out, p, change, count = solve(*args, "relu", 3, 1e-6, 1.0, True)
    expected = reference.solve(*args, "relu", 3, 1e-6, 1.0, True)
    assert (count == 3).all() and (change > 1e-6).all()
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(change, expected[2], rtol=1e-4, atol=0)


def test_one_iteration_is_a_plain_adapter():
    x, A, W, b, V, c = problem(70, 30, 16)
    out, p, change, count = solve(x, A, W, b, V, c, "silu", 1, 1e-4, 0.5, True)
    torch.testing.assert_close(p, x @ A.T + b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, x + torch.nn.functional.silu(x @ A.T + b) @ V.T + c, rtol=1e-5, atol=1e-5)
    assert (count == 1).all() and (change > 0.9).all()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("save", [True, False])
def test_residual_and_save(residual, save):
    args = problem(66, 35, 20)
    out, p, _, _ = solve(*args, "gelu", 30, 1e-5, 1.0, residual, save)
    expected = reference.solve(*args, "gelu", 30, 1e-5, 1.0, residual)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    assert p.shape == ((66, 20) if save else (0, 20))
    if save:
        torch.testing.assert_close(p, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_a_row_is_the_same_in_every_batch(dtype, damping):
    x, *weights = problem(150, 50, 24, dtype)
    options = ("gelu_tanh", 40, 1e-2 if dtype != torch.float32 else 1e-4, damping, True)
    together = solve(x, *weights, *options)
    assert len(together[3].unique()) > 1
    for rows in (slice(0, 1), slice(63, 65), slice(149, 150), slice(10, 100)):
        for whole, alone in zip(together, solve(x[rows], *weights, *options), strict=True):
            assert torch.equal(whole[rows], alone)
    order = torch.randperm(150, device=DEVICE)
    for whole, shuffled in zip(together, solve(x[order], *weights, *options), strict=True):
        assert torch.equal(whole[order], shuffled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_flagged_and_alone(bad, activation, dtype):
    x, *weights = problem(70, 30, 16, dtype)
    options = (activation, 50, 1e-2, 1.0, False)
    clean = solve(x, *weights, *options)
    broken = x.clone()
    broken[[3, 64], 7] = bad
    out, p, change, count = solve(broken, *weights, *options)
    hit = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    hit[[3, 64]] = True
    assert change[hit].isinf().all() and (count[hit] == 1).all()
    # The last finite state is the start, z = 0.
    assert (p[hit] == 0).all()
    torch.testing.assert_close(out[hit], weights[4].expand(2, -1))
    for got, expected in zip((out, p, change, count), clean, strict=True):
        assert torch.equal(got[~hit], expected[~hit])


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("check_every", [1, 3, 7])
def test_a_row_that_diverges_keeps_its_last_finite_state(check_every, carry):
    x, A, W, b, V, c = problem(70, 30, 16, gamma=1e6)
    x[::2], b[:] = 0, 0
    args = (x, A, W, b, V, c, "relu", 20, 1e-4, 1.0, True)
    config = launch.Config(64, 32, 4, 2, check_every, carry)
    out, p, change, count = solve(*args, config=config)
    expected = reference.solve(*args, check_every=check_every)
    assert torch.equal(count, expected[3]) and torch.equal(change.isinf(), expected[2].isinf())
    assert change[1::2].isinf().any() and (change[::2] == 0).all()
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


def test_parameters_of_another_dtype_and_strided_tokens():
    x, A, W, b, V, c = problem(70, 30, 16)
    wide = torch.randn(70, 60, device=DEVICE)
    wide[:, ::2] = x
    strided = (A.T.contiguous().T, W.T.contiguous().T, b, V.T.contiguous().T, c)
    expected = solve(x, A, W, b, V, c, "relu", 20, 1e-4, 1.0, True)
    for got, same in zip(solve(wide[:, ::2], *strided, "relu", 20, 1e-4, 1.0, True), expected, strict=True):
        assert torch.equal(got, same)
    half = solve(x.half(), A, W, b, V, c, "relu", 20, 1e-2, 1.0, True)
    assert half[0].dtype == half[1].dtype == torch.float16
    assert error(half[0], expected[0]) < 2e-2


def test_wrong_shapes_are_named():
    x, A, W, b, V, c = problem(4, 30, 16)
    with pytest.raises(AssertionError, match=r"V must be \[30, 16\]; got \[16, 30\]"):
        solve(x, A, W, b, V.T, c, "relu", 20, 1e-4, 1.0, True)
    with pytest.raises(ValueError, match="lion_kernels.step"):
        solve(*problem(4, 8, 300), "relu", 20, 1e-4, 1.0, True)
    with pytest.raises(ValueError, match="activation must be one of relu"):
        solve(x, A, W, b, V, c, "elu", 20, 1e-4, 1.0, True)
