"""Gradients of the layers against unrolled autograd, dense linear algebra and the eager loop."""

import copy

import pytest
import torch
from equilibrium_helpers import (
    KINDS,
    MODES,
    PHI,
    REFERENCES,
    assert_close_each,
    assert_equal_each,
    both,
    every_backward,
    every_kind,
    gradients,
    rough,
    states,
    unrolled,
)
from torch.utils.checkpoint import checkpoint

from lion_fast.equilibrium import LionLayer, StateLayer, reference
from lion_fast.pruning import prune_once
from lion_fast.pruning.blocksparse import BlockSparseLayer

D, R = 12, 5


def solved(kind="free", **options):
    """A float64 layer that iterates to the end."""
    layer = KINDS[kind](D, R, **{"tol": 1e-14, "max_iter": 400, "gamma": 0.9} | options)
    return rough(layer.double(), 0.4)


def tokens(*shape, width=D, requires_grad=True):
    return torch.randn(*shape, width, dtype=torch.float64, requires_grad=requires_grad)


def linear_solve(layer, x, upstream, inverse):
    """All gradients by dense linear algebra: `inverse(J)` maps each token's J = Phi' Wh to the matrix
    that stands for (I - J)^-1. Derivatives of the activation by autograd, none from the library."""
    Wh, phi = layer.recurrence_matrix(), PHI[layer.activation]
    z = states(layer, x).detach()
    p = (z @ Wh.T + x @ layer.A.T + layer.b).detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi(p).sum(), p)
    reads_out = "V" in layer.matrices
    g = upstream @ layer.V if reads_out else upstream
    T = torch.stack(
        [s * (inverse(s[:, None] * Wh).T @ row) for s, row in zip(slope, g, strict=True)]
    ).detach()
    through_wh = torch.autograd.grad(Wh, list(layer.parameters()), T.T @ z, allow_unused=True)
    direct = {"A": T.T @ x, "b": T.sum(0)}
    if reads_out:
        direct |= {"V": upstream.T @ z, "c": upstream.sum(0)}
    grads = [T @ layer.A + (upstream if reads_out else 0)]
    for (name, p), via in zip(layer.named_parameters(), through_wh, strict=True):
        grads.append((torch.zeros_like(p) if via is None else via) + direct.get(name, 0))
    return grads


@pytest.mark.parametrize("activation", PHI)
@every_kind
def test_exact_gradient_is_that_of_unrolled_autograd(kind, activation):
    layer = solved(kind, activation=activation, backward="exact")
    x = tokens(3, 4)
    out, expected = layer(x), unrolled(layer, x)
    assert out.shape == expected.shape and torch.allclose(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    assert_close_each(gradients(layer, out, upstream, x), gradients(layer, expected, upstream, x), 1e-9)


@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_gradient_is_the_dense_linear_solve(kind, mode):
    options, inverse = MODES[mode]
    layer = solved(kind, activation="silu", **options)
    assert kind == "tied" or torch.linalg.matrix_norm(layer.W, 2) > 0.9  # so the bound is in the graph
    x = tokens(6)
    out = layer(x)
    upstream = torch.randn_like(out)
    expected = linear_solve(layer, x.detach(), upstream, inverse)
    assert_close_each(gradients(layer, out, upstream, x), expected, 1e-10)


def test_neumann_error_falls_with_the_bound():
    """|error| <= gamma^(k+1) / (1 - gamma) |g| on the adjoint state, seen through db."""
    layer = solved(activation="relu", backward="exact", gamma=0.8)
    x, upstream = tokens(1), tokens(1, requires_grad=False)
    exact = gradients(layer, layer(x), upstream, x)[3]
    g = (upstream @ layer.V).norm()
    previous = torch.inf
    for k in range(0, 30, 5):
        layer.backward, layer.neumann_terms = "neumann", k
        error = (gradients(layer, layer(x), upstream, x)[3] - exact).norm()
        assert error <= 0.8 ** (k + 1) / 0.2 * g
        assert error < previous or error < 1e-12
        previous = error


@every_backward
@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_reference_layer_agrees(recurrence, backward):
    options = {"tol": 1e-14, "max_iter": 400, "gamma": 0.9, "backward": backward, "activation": "gelu"}
    fast = solved(recurrence, **options)
    plain = reference.LionLayer(D, R, recurrence=recurrence, dtype=torch.float64, **options)
    plain.load_state_dict(fast.state_dict())
    x, upstream = tokens(2, 3), tokens(2, 3, requires_grad=False)
    out = fast(x)
    assert torch.allclose(out, plain(x), rtol=0, atol=1e-11)
    actual = dict(zip(["x", *dict(fast.named_parameters())], gradients(fast, out, upstream, x), strict=True))
    expected = dict(zip(actual, gradients(plain, plain(x), upstream, x), strict=True))
    if recurrence == "tied" and backward in ("neumann", "phantom"):
        # Truncated in R dimensions, V's gradient has one term more than in token space: closer to exact.
        fast.backward = "exact"
        exact = gradients(fast, fast(x), upstream, x)[3]
        mine, theirs = actual.pop("V"), expected.pop("V")
        assert (mine - exact).norm() < (theirs - exact).norm()
    for name, value in actual.items():
        assert (value - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_damping_changes_the_path_and_not_the_point():
    layer = solved(damping=0.7, backward="exact")
    x, upstream = tokens(5), tokens(5, requires_grad=False)
    expected = unrolled(layer, x)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-11)
    assert_close_each(gradients(layer, layer(x), upstream, x), gradients(layer, expected, upstream, x), 1e-8)


@every_backward
@pytest.mark.parametrize("kind", [*KINDS, *REFERENCES, "block-sparse"])
def test_one_step_has_its_own_gradient(kind, backward):
    """max_iter=1 is a plain adapter: the gradient of that, in every mode, and none for W."""
    make = (KINDS | REFERENCES | {"block-sparse": LionLayer})[kind]
    layer = rough(make(32, 32, activation="tanh", max_iter=1, backward=backward).double())
    net = layer
    if kind == "block-sparse":
        prune_once(layer, 0.9, granularity="block", block=16, criterion="magnitude")
        net = BlockSparseLayer(layer, block=16)
    x = tokens(5, width=32)
    given = [x, *(p for name, p in layer.named_parameters() if name != "W")]
    out, info = net(x, return_info=True)
    expected = unrolled(layer, x, steps=1)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert info.iterations.tolist() == [1] * 5 and info.reason == "max_iter"
    found = torch.autograd.grad(out, given, upstream, retain_graph=True)
    assert_close_each(found, torch.autograd.grad(expected, given, upstream), 1e-12)
    if "tied" not in kind:
        assert not torch.autograd.grad(out, layer.W, upstream)[0].any()


def test_a_gradient_has_no_more_terms_than_there_were_recurrences():
    """Two applications pass one recurrence: one Neumann term, however many are asked for."""
    x, upstream = torch.randn(6, D, dtype=torch.float64), torch.randn(6, R, dtype=torch.float64)
    layers = [StateLayer(D, R, max_iter=2, neumann_terms=terms).double() for terms in (1, 8)]
    layers[1].load_state_dict(rough(layers[0]).state_dict())
    assert_equal_each(*(gradients(layer, layer(x), upstream) for layer in layers))


def test_non_contiguous_input_and_gradient():
    layer = solved()
    x = torch.randn(D, 6, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    upstream = torch.randn(D, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous() and not upstream.is_contiguous()
    copied = x.detach().contiguous().requires_grad_()
    expected = gradients(layer, layer(copied), upstream.contiguous(), copied)
    assert_equal_each(gradients(layer, layer(x), upstream, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_parameters", [True, False])
def test_lower_precision(dtype, cast_parameters):
    """Error at most twice that of rounding the input, the weights and the output alone."""
    layer = solved(activation="tanh", backward="neumann")
    x, upstream = tokens(40), tokens(40, requires_grad=False)
    low = LionLayer(D, R, activation="tanh", gamma=0.9, tol=1e-6, max_iter=100)
    low.load_state_dict(layer.state_dict())
    low = low.to(dtype) if cast_parameters else low
    xl = x.detach().to(dtype).requires_grad_()
    out = low(xl)
    assert out.dtype == dtype
    grads = gradients(low, out, upstream.to(dtype), xl)
    assert [g.dtype for g in grads] == [dtype, *(p.dtype for p in low.parameters())]

    rounded = copy.deepcopy(layer)
    rounded.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    xr = xl.detach().double().requires_grad_()
    exact_out = rounded(xr)
    exact = gradients(rounded, exact_out, upstream.to(dtype).double(), xr)
    eps = torch.finfo(dtype).eps
    assert (out.double() - exact_out).norm() <= 2 * eps * exact_out.norm() + 1e-5
    for g, e in zip(grads, exact, strict=True):
        assert (g.double() - e).norm() <= 8 * eps * e.norm() + 1e-5 * e.norm()


def test_two_forwards_one_backward():
    layer = solved()
    x1, x2, upstream = tokens(3), tokens(5), tokens(5, requires_grad=False)
    o1, o2 = layer(x1), layer(x2)
    ((o1 * upstream[:3]).sum() + (o2 * upstream).sum()).backward()
    got = [p.grad.clone() for p in layer.parameters()]
    first, second = gradients(layer, layer(x1), upstream[:3]), gradients(layer, layer(x2), upstream)
    assert_close_each(got, [a + b for a, b in zip(first, second, strict=True)], 1e-14)


@both
def test_the_same_again_with_a_kept_graph_and_with_checkpointing(cls):
    layer = rough(cls(D, R, dtype=torch.float64))
    x, upstream = tokens(4), tokens(4, requires_grad=False)
    out, wanted = layer(x), [x, *layer.parameters()]
    first = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
    assert_equal_each(first, torch.autograd.grad(out, wanted, upstream))
    assert_equal_each(first, gradients(layer, checkpoint(layer, x, use_reentrant=False), upstream, x))


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
