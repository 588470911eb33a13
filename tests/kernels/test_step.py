"""The step kernels for wide states, against float64, torch in the same dtype, and the reference."""

import pytest
import torch
from kernel_helpers import (
    DEVICE,
    DTYPES,
    assert_as_good_as_torch,
    assert_gradients_as_good_as_torch,
    assert_rows_close,
    double,
    error,
    problem,
    torch_solve,
)

from lion_kernels import launch_step, ops, reference
from lion_kernels.launch_step import StepConfig
from lion_kernels.step import adjoint_wide, solve_wide

ACTIVATIONS = list(reference.ACTIVATIONS)
# Several row tiles, column blocks and slices already for small problems.
SMALL = StepConfig(32, 64, 32, 4, 2)
NEVER = 0.0


def names(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("activation, damping", [*((a, 1.0) for a in ACTIVATIONS), ("gelu", 0.7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_error_is_at_most_twice_that_of_torch(dtype, activation, damping):
    args = problem(37, 40, 72, dtype)
    out, p, _, count = solve_wide(*args, activation, 5, NEVER, damping, True, config=SMALL)
    exact = torch_solve(*double(*args), activation, 5, damping, True)
    same = torch_solve(*args, activation, 5, damping, True)
    assert_as_good_as_torch(out, same[0], exact[0], "out")
    assert_as_good_as_torch(p, same[1], exact[1], "p")
    assert (count == 5).all()

    x, A, W, _, V, _ = args
    grad_out = torch.randn(37, 40, device=DEVICE).to(dtype)
    got = adjoint_wide(grad_out, x, p, A, W, V, activation, 3, NEVER, damping, True, config=SMALL)
    assert_gradients_as_good_as_torch(got, (grad_out, x, p, A, W, V), activation, 3, damping, True)


@pytest.mark.parametrize(
    "rows, width, state", [(0, 20, 70), (1, 20, 70), (33, 17, 129), (64, 64, 64), (5, 1, 7)]
)
def test_every_shape(rows, width, state):
    args = problem(rows, width, state)
    out, p, change, count = solve_wide(*args, "tanh", 4, NEVER, 1.0, False, config=SMALL)
    exact = torch_solve(*double(*args), "tanh", 4, 1.0, False)
    assert error(out, exact[0]) < 1e-5 and error(p, exact[1]) < 1e-5
    assert [list(t.shape) for t in (out, p, change, count)] == [[rows, width], [rows, state], [rows], [rows]]
    x, A, W, _, V, _ = args
    grad_out = torch.randn_like(x)
    got = adjoint_wide(grad_out, x, p, A, W, V, "tanh", 2, NEVER, 1.0, False, config=SMALL)
    exact = reference.adjoint(*double(grad_out, x, p, A, W, V), "tanh", 2, NEVER, 1.0, False)
    for ours, right in zip(got[:6], exact[:6], strict=True):
        assert ours.shape == right.shape and error(ours, right) < 1e-5 * max(1, rows)


def test_a_shipped_configuration_and_the_dispatch_of_the_operators():
    args = problem(70, 40, 300)
    options = ("gelu", 5, 1e-4, 1.0, True)
    out, p, change, count = ops.solve(*args, *options, True, "triton")
    expected = reference.solve(*double(*args), *options)
    assert error(out, expected[0]) < 1e-5 and error(p, expected[1]) < 1e-5
    assert torch.equal(count, expected[3])
    x, A, W, _, V, _ = args
    grad_out = torch.randn_like(x)
    given = ("gelu", 2, 0.0, 1.0, True)
    got = ops.adjoint(grad_out, x, p, A, W, V, *given, "triton")
    for ours, right in zip(
        got[:6], reference.adjoint(*double(grad_out, x, p, A, W, V), *given)[:6], strict=True
    ):
        assert error(ours, right) < 1e-5 * right.abs().max()
    assert ops.why_not_triton(x.device, torch.float32, 1024) is None
    assert "1024" in ops.why_not_triton(x.device, torch.float32, 1025)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_rows_stop_where_the_reference_stops(damping):
    args = problem(100, 30, 72, gamma=0.7)
    # The first tile is done at once, the others hold rows of very different size.
    scale = torch.logspace(-4, 1, 100, device=DEVICE)[torch.randperm(100)]
    scale[:32] = 0
    args[0] *= scale[:, None]
    args[3] *= 0
    options = ("tanh", 25, 1e-4, damping, True)
    out, p, change, count = solve_wide(*args, *options, config=SMALL)
    exact = reference.solve(*double(*args), *options)
    borderline = ((change.double() / 1e-4 - 1).abs() < 0.01) | ((exact[2] / 1e-4 - 1).abs() < 0.01)
    same = count == exact[3]
    assert (borderline | same).all() and borderline.float().mean() < 0.1
    assert (count[:32] == 1).all() and len(count[32:64].unique()) > 3
    torch.testing.assert_close(change[same], exact[2][same].float(), rtol=2e-2, atol=1e-6)
    assert error(out[same], exact[0][same]) < 1e-5 and error(p[same], exact[1][same]) < 1e-5


def test_adjoint_rows_stop_where_the_reference_stops():
    x, A, W, b, V, c = problem(70, 30, 72, gamma=0.7)
    x *= torch.logspace(-3, 2, 70, device=DEVICE)[:, None]
    p = reference.solve(x, A, W, b, V, c, "tanh", 30, 1e-5, 1.0, True)[1]
    given = (torch.randn_like(x), x, p, A, W, V)
    options = ("tanh", 25, 1e-3, 1.0, True)
    got = adjoint_wide(*given, *options, config=SMALL)
    exact = reference.adjoint(*double(*given), *options)
    assert torch.equal(got[7], exact[7]) and len(got[7].unique()) > 3
    torch.testing.assert_close(got[6], exact[6], rtol=2e-2, atol=1e-6)
    for ours, right in zip(got[:6], exact[:6], strict=True):
        assert error(ours, right) < 2e-5 * right.abs().max()


def test_max_iter_of_one_and_max_iter_reached():
    x, A, W, b, V, c = args = problem(40, 30, 72, gamma=0.95)
    out, p, change, count = solve_wide(*args, "silu", 1, 1e-4, 0.5, True, config=SMALL)
    torch.testing.assert_close(p, x @ A.T + b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, x + torch.nn.functional.silu(p) @ V.T + c, rtol=1e-5, atol=1e-5)
    assert (count == 1).all() and (change > 0.9).all()
    _, _, change, count = solve_wide(*args, "relu", 3, 1e-6, 1.0, True, config=SMALL)
    expected = reference.solve(*args, "relu", 3, 1e-6, 1.0, True)
    assert (count == 3).all() and (change > 1e-6).all()
    torch.testing.assert_close(change, expected[2], rtol=1e-4, atol=0)


def test_the_jacobian_free_gradient_makes_no_step():
    x, A, W, b, V, c = problem(40, 30, 72)
    p = torch.randn(40, 72, device=DEVICE)
    given = (torch.randn_like(x), x, p, A, W, V)
    got = adjoint_wide(*given, "gelu", 0, NEVER, 1.0, True, config=SMALL)
    exact = reference.adjoint(*double(*given), "gelu", 0, NEVER, 1.0, True)
    for ours, right in zip(got[:6], exact[:6], strict=True):
        assert error(ours, right) < 1e-5 * right.abs().max()
    assert got[6].isinf().all() and (got[7] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_flagged_and_alone(bad, dtype):
    x, *weights = problem(40, 30, 72, dtype)
    options = ("relu", 12, 1e-2, 1.0, False)
    clean = solve_wide(x, *weights, *options, config=SMALL)
    broken = x.clone()
    broken[[3, 36], 7] = bad
    got = solve_wide(broken, *weights, *options, config=SMALL)
    hit = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    hit[[3, 36]] = True
    out, p, change, count = got
    assert change[hit].isinf().all() and (count[hit] == 1).all() and (p[hit] == 0).all()
    torch.testing.assert_close(out[hit], weights[4].expand(2, -1))
    for ours, expected in zip(got, clean, strict=True):
        assert torch.equal(ours[~hit], expected[~hit])


def test_a_row_that_diverges_keeps_its_last_finite_state():
    x, A, W, b, V, c = problem(40, 30, 72, gamma=1e6)
    x[::2], b[:] = 0, 0
    args = (x, A, W, b, V, c, "relu", 12, 1e-4, 1.0, True)
    out, p, change, count = solve_wide(*args, config=SMALL)
    expected = reference.solve(*args)
    assert torch.equal(count, expected[3]) and torch.equal(change.isinf(), expected[2].isinf())
    assert change[1::2].isinf().any() and count[1::2].max() > 2 and torch.isfinite(p).all()
    assert_rows_close(p, expected[1])
    assert_rows_close(out, expected[0])

    given = (torch.randn_like(x), x, torch.ones(40, 72, device=DEVICE), A, W, V)
    options = ("relu", 9, 1e-4, 1.0, True)
    got, expected = adjoint_wide(*given, *options, config=SMALL), reference.adjoint(*given, *options)
    assert torch.equal(got[7], expected[7]) and got[6].isinf().all()
    for ours, right in zip(got[:6], expected[:6], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_row_is_the_same_in_every_batch(dtype):
    x, *weights = problem(70, 30, 72, dtype)
    options = ("gelu_tanh", 20, 1e-2 if dtype != torch.float32 else 1e-4, 1.0, True)
    together = solve_wide(x, *weights, *options, config=SMALL)
    assert len(together[3].unique()) > 1
    for rows in (slice(0, 1), slice(31, 40)):
        for whole, alone in zip(together, solve_wide(x[rows], *weights, *options, config=SMALL), strict=True):
            assert torch.equal(whole[rows], alone)


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_half_precision_gradients_of_any_size(size):
    """The planes of an adjoint are float16: without a scale per row these would vanish or overflow."""
    x, A, W, b, V, c = problem(40, 30, 72, torch.float16)
    p = torch.randn(40, 72, device=DEVICE).half()
    grad_out = torch.randn(40, 30, device=DEVICE) * torch.logspace(-3, 0, 40, device=DEVICE)[:, None]
    grad_out = (grad_out * size).half()
    grad_out[5] = 0
    got = adjoint_wide(grad_out, x, p, A, W, V, "gelu", 4, 0.0, 1.0, False, config=SMALL)
    exact = reference.adjoint(*double(grad_out, x, p, A, W, V), "gelu", 4, 0.0, 1.0, False)
    # The smallest numbers of float16 are the tokens' own limit.
    for ours, right in zip(got[:6], exact[:6], strict=True):
        assert error(ours, right) < 4e-3 * right.abs().max() + 40 * 2**-24 * x.abs().max()
    assert (got[0][5] == 0).all() and got[6][5] == 0


def test_residual_save_and_other_dtypes():
    x, *weights = problem(40, 30, 72)
    expected = solve_wide(x, *weights, "gelu", 8, 1e-3, 1.0, False, config=SMALL)
    out, p, change, count = solve_wide(x, *weights, "gelu", 8, 1e-3, 1.0, False, save=False, config=SMALL)
    assert p.shape == (0, 72)
    for got, same in zip((out, change, count), (expected[0], *expected[2:]), strict=True):
        assert torch.equal(got, same)
    half = solve_wide(x.half(), *weights, "gelu", 8, 1e-2, 1.0, False, config=SMALL)
    assert half[0].dtype == half[1].dtype == torch.float16 and error(half[0], expected[0]) < 2e-2


def test_the_planes_of_the_state():
    half, full = torch.float16, torch.float32
    assert launch_step.plane_dtypes(torch.bfloat16, 1.0, 1e-2) == (half, half)
    assert launch_step.plane_dtypes(torch.bfloat16, 1.0, 0.0) == (half, half)
    assert launch_step.plane_dtypes(torch.bfloat16, 0.5, 1e-2) == (full, half)
    assert launch_step.plane_dtypes(torch.float16, 1.0, 1e-4) == (full, half)
    assert launch_step.plane_dtypes(full, 1.0, 1e-2) == (full, full)


def test_what_no_step_kernel_serves_is_named():
    with pytest.raises(ValueError, match="up to a state of 1024, not 1025"):
        launch_step.config(1, 8, 1025, torch.float32, (9, 0))
    with pytest.raises(ValueError, match="not torch.float64"):
        launch_step.config(1, 8, 300, torch.float64, (9, 0))
    with pytest.raises(ValueError, match="activation must be one of relu"):
        solve_wide(*problem(4, 30, 16), "elu", 20, 1e-4, 1.0, True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_captured_solve_repeats_its_bits_on_new_tokens():
    x, *weights = problem(500, 96, 512, torch.bfloat16)
    weights = [w.float() for w in weights]
    options = ("relu", 30, 1e-2, 1.0, True)
    solve_wide(x, *weights, *options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve_wide(x, *weights, *options)
    x.copy_(torch.randn_like(x) * torch.logspace(-3, 1, 500, device=DEVICE)[:, None])
    graph.replay()
    for ours, eager in zip(captured, solve_wide(x, *weights, *options), strict=True):
        assert torch.equal(ours, eager)
