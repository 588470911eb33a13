"""Equilibria written out: the layers under test, unrolled, and with weights on which every term counts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lion_fast.equilibrium import LionLayer, StateLayer, reference

KINDS = {"free": LionLayer, "tied": partial(LionLayer, recurrence="tied"), "states": StateLayer}
REFERENCES = {
    "reference": reference.LionLayer,
    "reference tied": partial(reference.LionLayer, recurrence="tied"),
}
both = pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer])
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backward = pytest.mark.parametrize("backward", ["neumann", "jfb", "exact", "phantom"])
PHI = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "silu": F.silu,
}


def rough(layer, scale=0.6):
    """Weights large enough that the bound is at work and every term of the gradient matters."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(scale * torch.randn_like(p))
    return layer


def states(layer, x, steps=400):
    """The formula of the state, `steps` times, differentiated by plain autograd."""
    Wh, phi = layer.recurrence_matrix(), PHI[layer.activation]
    q = x @ layer.masked("A").T + layer.b
    z = torch.zeros_like(q)
    for _ in range(steps):
        z = phi(z @ Wh.T + q)
    return z


def unrolled(layer, x, steps=400):
    """The output of a layer, from `states`: those of a StateLayer, their read-out of a LionLayer."""
    z = states(layer, x, steps)
    return x + z @ layer.masked("V").T + layer.c if "V" in layer.matrices else z


def gradients(module, out, upstream, *inputs):
    return torch.autograd.grad(out, [*inputs, *(p for p in module.parameters() if p.requires_grad)], upstream)


def assert_close_each(actual, expected, tol):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= tol * e.norm()


def assert_equal_each(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def truncated(terms):
    """J -> I + J + ... + J^terms."""
    return lambda J: sum(torch.linalg.matrix_power(J, k) for k in range(terms + 1))


def phantom(steps, damping=0.5):
    """J -> what `steps` damped steps differentiate to."""
    return lambda J: damping * truncated(steps - 1)((1 - damping) * torch.eye(len(J)).to(J) + damping * J)


# Options of a gradient, and the matrix that stands for (I - J)^-1 in it.
MODES = {
    "exact": ({"backward": "exact"}, lambda J: torch.linalg.inv(torch.eye(len(J), dtype=J.dtype) - J)),
    "jfb": ({"backward": "jfb"}, truncated(0)),
    **{f"neumann-{k}": ({"backward": "neumann", "neumann_terms": k}, truncated(k)) for k in (0, 1, 2, 5)},
    "phantom-5": ({"backward": "phantom", "neumann_terms": 5}, phantom(5)),
}
