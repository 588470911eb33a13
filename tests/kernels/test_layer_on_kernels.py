"""The operators and the layer with backend="triton", against autograd through the unrolled loop."""

import pytest
import torch
from kernel_helpers import DEVICE, problem

from lion_fast.equilibrium import LionLayer, StateLayer, equilibrium
from lion_kernels import ops, reference
from lion_kernels.adjoint import adjoint

ACTIVATIONS = list(reference.ACTIVATIONS)


@pytest.mark.parametrize("save", [True, False])
def test_solve_is_registered_as_torch_wants(save):
    args = (*problem(70, 24, 8), "relu", 20, 1e-4, 1.0, True, save, "triton")
    assert set(torch.library.opcheck(ops.solve, args).values()) == {"SUCCESS"}


def test_adjoint_is_registered_as_torch_wants():
    x, A, W, _, V, _ = problem(70, 24, 8)
    p = torch.randn(70, 8, device=DEVICE)
    args = (torch.randn_like(x), x, p, A, W, V, "gelu", 4, 0.0, 1.0, True, "triton")
    assert set(torch.library.opcheck(ops.adjoint, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_those_of_the_unrolled_loop(activation, residual):
    given = problem(70, 30, 12, gamma=0.6)
    leaves = [t.double().requires_grad_() for t in given]
    x, A, W, b, V, c = leaves
    phi = reference.ACTIVATIONS[activation].phi
    z = torch.zeros(70, 12, dtype=torch.float64, device=DEVICE)
    for _ in range(80):
        z = phi(z @ W.T + x @ A.T + b)
    out = z @ V.T + c + (x if residual else 0)
    grad_out = torch.randn_like(out)
    exact = torch.autograd.grad(out, leaves, grad_out)

    leaves = [t.clone().requires_grad_() for t in given]
    options = {"activation": activation, "tol": 1e-7, "max_iter": 80, "backward": "exact"}
    ours = equilibrium(*leaves, **options, residual=residual, backend="triton")
    torch.testing.assert_close(ours.double(), out, rtol=1e-5, atol=1e-5)
    for name, got, expected in zip(
        "xAWbVc", torch.autograd.grad(ours, leaves, grad_out.float()), exact, strict=True
    ):
        relative = (got - expected).norm() / expected.norm()
        assert relative < 5e-6, f"d{name}: {relative:.1e}"


LAYERS = [
    *((LionLayer, 12, {"recurrence": r, "activation": "tanh", "backward": backward})
      for r in ("free", "tied") for backward in ("neumann", "jfb", "phantom", "exact")),
    *((StateLayer, state, {"backward": backward}) for state in (12, 32) for backward in ("neumann", "exact")),
]  # fmt: skip


@pytest.mark.parametrize("make, state, options", LAYERS)
def test_a_layer_agrees_with_its_torch_backend(make, state, options):
    """out, dx and residual by entries; parameters' gradients, sums over rows that cancel, by their norm."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        layer = make(30, state, **options, tol=1e-6, backend=backend).to(DEVICE)
        x = torch.randn(2, 35, 30, device=DEVICE, requires_grad=True)
        out, info = layer(x, return_info=True)
        out.backward(torch.randn_like(out))
        results.append([out, x.grad, info.residual, *(p.grad for p in layer.parameters())])
        assert info.converged.all()
    expected, got = results
    for theirs, ours in zip(expected[:3], got[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for theirs, ours in zip(expected[3:], got[3:], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


def test_the_layer_compiles_to_one_graph():
    layer = LionLayer(30, 12, backend="triton", device=DEVICE)
    x = torch.randn(70, 30, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


def test_an_unsaved_pre_activation_is_an_error_for_the_adjoint():
    x, A, W, b, V, c = problem(70, 24, 8)
    out, p, _, _ = ops.solve(x, A, W, b, V, c, "relu", 20, 1e-4, 1.0, True, False, "triton")
    with pytest.raises(AssertionError, match=r"p must be \[70, 8\]; got \[0, 8\]"):
        adjoint(out, x, p, A, W, V, "relu", 8, 0.0, 1.0, True)
