"""Equilibria written out: unrolled states, and layers on which every term counts."""

import torch
import torch.nn.functional as F

PHI = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}


def rough(layer):
    """Weights large enough that the bound is at work and every term of the gradient matters."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.6 * torch.randn_like(p))
    return layer


def unrolled(layer, x, steps=400):
    """The formula, `steps` times, differentiated by plain autograd."""
    Wh, phi = layer.recurrence_matrix(), PHI[layer.activation]
    q = x @ layer.masked("A").T + layer.b
    z = torch.zeros_like(q)
    for _ in range(steps):
        z = phi(z @ Wh.T + q)
    return z


def gradients(module, out, upstream, *inputs):
    return torch.autograd.grad(out, [*inputs, *(p for p in module.parameters() if p.requires_grad)], upstream)


def assert_close_each(actual, expected, tol):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= tol * e.norm() + 1e-14
