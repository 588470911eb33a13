"""The step kernels for wide states, against float64, torch in the same dtype, and the reference."""

import pytest
import torch
from kernel_helpers import DEVICE, double, error, problem

from lion_kernels import launch_step, ops, reference
from lion_kernels.launch_step import StepConfig
from lion_kernels.step import adjoint_wide, solve_wide

# Several row tiles, column blocks and slices already for small problems.
SMALL = StepConfig(32, 64, 32, 4, 2)


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


def test_gradients_of_rows_that_diverge():
    x, A, W, _, V, _ = problem(40, 30, 72, gamma=1e6)
    x[::2] = 0
    given = (torch.randn_like(x), x, torch.ones(40, 72, device=DEVICE), A, W, V)
    options = ("relu", 9, 1e-4, 1.0, True)
    got, expected = adjoint_wide(*given, *options, config=SMALL), reference.adjoint(*given, *options)
    assert torch.equal(got[7], expected[7]) and got[6].isinf().all()
    for ours, right in zip(got[:6], expected[:6], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


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


def test_the_planes_of_the_state():
    half, full = torch.float16, torch.float32
    assert launch_step.plane_dtypes(torch.bfloat16, 1.0, 1e-2) == (half, half)
    assert launch_step.plane_dtypes(torch.bfloat16, 1.0, 0.0) == (half, half)
    assert launch_step.plane_dtypes(torch.bfloat16, 0.5, 1e-2) == (full, half)
    assert launch_step.plane_dtypes(torch.float16, 1.0, 1e-4) == (full, half)
    assert launch_step.plane_dtypes(full, 1.0, 1e-2) == (full, full)


def test_what_no_step_kernel_serves_is_named():
    with pytest.raises(ValueError, match="1024, not 1025"):
        launch_step.config(1, 8, 1025, torch.float32, (9, 0))
    with pytest.raises(ValueError, match="float64"):
        launch_step.config(1, 8, 300, torch.float64, (9, 0))


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
