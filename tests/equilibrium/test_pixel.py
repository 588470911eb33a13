"""The pixel end: a certified bound of its convolution, and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound


def dense(weight, height, width):
    """The matrix of the zero-padded convolution."""
    channels = weight.shape[1]
    basis = torch.eye(channels * height * width, dtype=weight.dtype).reshape(-1, channels, height, width)
    return F.conv2d(basis, weight, padding=weight.shape[-1] // 2).flatten(1).T


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (2, 3), (5, 5), (8, 11), (12, 12)])
@pytest.mark.parametrize("c_out, c_in, k", [(1, 1, 3), (4, 4, 3), (2, 5, 3), (3, 3, 5)])
def test_conv_norm_bound_against_a_dense_svd(height, width, c_out, c_in, k):
    for kind in range(4):
        weight = torch.randn(c_out, c_in, k, k, dtype=torch.float64)
        if kind == 1:
            weight = weight.abs()  # its norm is that of frequency zero
        if kind == 2:
            weight = torch.ones_like(weight)
        if kind == 3:
            weight = weight * 1e-9
        true = torch.linalg.matrix_norm(dense(weight, height, width), 2)
        bound = conv_norm_bound(weight, height, width)
        assert bound >= true
        # the circular convolution on the larger torus is what is bounded: within 2 % of that
        taps = torch.arange(k, dtype=torch.float64) - k // 2
        phases = [
            torch.exp(2j * math.pi * torch.arange(n + k - 1)[:, None] / (n + k - 1) * taps)
            for n in (height, width)
        ]
        matrices = torch.einsum("oihw,ah,bw->aboi", weight.to(torch.complex128), *phases)
        assert bound <= 1.02 * torch.linalg.svdvals(matrices).max()


def test_conv_norm_bound_on_large_maps():
    """Sampling with a margin, against every frequency of the true size."""
    for size in (33, 64, 224):
        weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
        padded = torch.zeros(4, 4, size + 2, size + 2, dtype=torch.float64)
        padded[..., :3, :3] = weight
        exact = torch.linalg.svdvals(torch.fft.fft2(padded).permute(2, 3, 0, 1)).max()
        assert exact <= conv_norm_bound(weight, size, size) <= 1.025 * exact
        assert exact * (1 - 1e-5) <= conv_norm_bound(weight.float(), size, size) <= 1.025 * exact


def test_conv_norm_bound_of_smooth_worst_cases():
    """Kernels whose peak lies exactly between two samples: where sampling without a margin is too small."""
    for shift in (0.5 / 32, 0.25 / 32, 7.5 / 32):
        phase = torch.exp(2j * math.pi * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * shift)
        outer = torch.outer(phase, phase)
        weight = torch.stack([torch.stack([outer.real, -outer.imag]), torch.stack([outer.imag, outer.real])])
        # the complex kernel's response is 3 x 3 at its peak, and this is its real form
        assert 9 <= conv_norm_bound(weight, 10_000, 10_000) <= 9 * 1.025


def test_conv_norm_bound_gradient_and_zero():
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: conv_norm_bound(w, 6, 6), weight)
    zero = torch.zeros(3, 3, 3, 3, requires_grad=True)
    bound = conv_norm_bound(zero, 6, 6)
    assert bound == 0
    assert torch.isfinite(torch.autograd.grad(bound, zero)[0]).all()


@pytest.mark.parametrize(
    "activation, lipschitz", [("relu", 1.0), ("tanh", 1.0), ("gelu", 1.1289), ("silu", 1.0998)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pixel_end_is_a_contraction(activation, lipschitz, dtype):
    for scale in (0.01, 1.0, 100.0, 1e6):
        end = PixelEnd(3, 4, activation=activation, gamma=0.9)
        end.W.data.mul_(scale)
        if scale == 100.0:
            end.W.data.fill_(1.0)
        end = end.to(dtype)
        norm = torch.linalg.matrix_norm(dense(end.recurrence_kernel(9, 7).double(), 9, 7), 2)
        assert lipschitz * norm <= 0.9
        if scale == 0.01:
            assert torch.equal(end.recurrence_kernel(9, 7), end.W)


def test_pixel_end_bound_survives_rounding():
    """One tap, one channel: the norm is the tap itself, and rounding it up would exceed gamma."""
    for gamma in torch.linspace(0.5, 0.99, 50).tolist():
        end = PixelEnd(3, 1, gamma=gamma).bfloat16()
        end.W.data.zero_()[0, 0, 1, 1] = 100
        assert end.recurrence_kernel(9, 9).double().abs().sum() <= gamma


@pytest.mark.parametrize("steps, activation, tol", [(1, "tanh", 1e-12), (400, "relu", 1e-9)])
def test_pixel_end_and_its_gradients(steps, activation, tol):
    """Against autograd through unrolled steps, in float64; one step is a plain adapter, without W."""
    end = PixelEnd(3, 4, activation=activation, backward="exact", tol=1e-13, max_iter=steps).double()
    for p in end.parameters():
        p.data.normal_(std=0.6)  # so that the bound is active and its gradient counts
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    q = F.conv2d(x, end.U, end.b, padding=1)
    z, kernel, phi = torch.zeros_like(q), end.recurrence_kernel(8, 8), getattr(torch, activation)
    for _ in range(steps):
        z = phi(F.conv2d(z, kernel, padding=1) + q)
    expected, upstream = x + F.conv2d(z, end.V, end.c), torch.randn_like(x)
    out, info = end(x, return_info=True)
    assert info.converged.all() == (steps > 1) and info.residual.shape == (2,)
    with torch.no_grad():
        torch.testing.assert_close(end(x), out, rtol=tol, atol=tol)
    inputs = [x, *end.parameters()]
    found = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip((out, *found), (expected, *torch.autograd.grad(expected, inputs, upstream)), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    assert found[1 + [n for n, _ in end.named_parameters()].index("W")].any() == (steps > 1)


def test_pixel_end_does_not_mix_images():
    end = PixelEnd(3, 4)
    end.V.data.normal_()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(end(x)[:1], end(x[:1]), rtol=0, atol=1e-6)
