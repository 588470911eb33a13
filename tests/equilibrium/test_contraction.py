"""The certified bound against exact singular values, for weights chosen to break it."""

import pytest
import torch
from equilibrium_helpers import KINDS, every_kind
from torch.nn.utils import prune

from lion_fast.equilibrium import LionLayer, bounded, spectral_norm_bound
from lion_fast.equilibrium.contraction import bounded_product
from lion_kernels.reference import ACTIVATIONS

LIPSCHITZ = {"relu": 1.0, "tanh": 1.0, "gelu": 1.1290, "gelu_tanh": 1.1290, "silu": 1.0998}


def adversarial(n, dtype=torch.float32):
    """Matrices on which power iteration, Frobenius scaling or plain squaring goes wrong."""
    g = torch.Generator().manual_seed(n)
    W = torch.randn(n, n, generator=g)
    U = torch.linalg.qr(W)[0]
    spectrum = torch.ones(n)
    spectrum[0] = 1.001  # a nearly flat spectrum: power iteration does not separate it
    yield "gaussian", W
    yield "orthogonal", 7 * U
    yield "flat", U @ torch.diag(spectrum) @ torch.linalg.qr(W.T)[0]
    yield "ones", torch.ones(n, n)
    yield "rank one", torch.outer(W[0], W[-1])
    yield "nilpotent", 100 * torch.diag(torch.ones(n - 1), 1) if n > 1 else torch.ones(1, 1)
    one = torch.zeros(n, n)
    one[0, -1] = -3.0
    yield "one entry", one
    yield "sparse", W * (torch.rand(n, n, generator=g) < 0.05)
    yield "huge", 1e30 * W
    yield "tiny", 1e-30 * W
    yield "mixed scales", W * 10.0 ** torch.linspace(-6, 6, n)


@pytest.mark.parametrize("n", [1, 2, 5, 32, 51, 128, 512])
def test_bound_is_never_below_and_close_above(n):
    for name, W in adversarial(n):
        sigma = torch.linalg.matrix_norm(W.double(), 2)
        bound = spectral_norm_bound(W).double()
        assert bound >= sigma, name
        if W.any():
            assert bound <= sigma * (1.0002 * n ** (1 / 256)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0.2, 0.8, 0.999])
def test_bounded_holds_in_every_dtype(dtype, limit):
    for n in (1, 5, 64):
        for name, W in adversarial(n):
            W = W.to(dtype)
            if torch.isfinite(W).all():
                assert torch.linalg.matrix_norm(bounded(W, limit).double(), 2) <= limit, name


def test_within_the_limit_nothing_changes():
    W = 0.5 * torch.linalg.qr(torch.randn(16, 16))[0]
    assert torch.equal(bounded(W, 0.8), W)
    assert torch.equal(bounded(torch.zeros(4, 4), 0.8), torch.zeros(4, 4))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_gradient(scale):
    W = (scale * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: bounded(W, 0.8), W)
    zero = torch.zeros(6, 6, requires_grad=True)
    bounded(zero, 0.8).sum().backward()
    assert torch.equal(zero.grad, torch.ones(6, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1e-3, 0.8, 0.999])
@pytest.mark.parametrize("size", ["least", "tiny", "one", "huge", "largest"])
def test_bounds_hold_at_the_edges_of_a_dtype(size, limit, dtype):
    """Of W, and of A V, whose product leaves the range where its factors do not."""
    about = torch.finfo(dtype)
    size = {
        "least": 4 * about.tiny * about.eps, "tiny": about.tiny, "one": 1.0,
        "huge": about.max / 2e3, "largest": about.max,
    }[size]  # fmt: skip
    for state in (1, 8, 64):
        W, A, V = (
            (torch.randn(shape, dtype=torch.float64).clamp(-1, 1) * size).to(dtype)
            for shape in ((state, state), (state, 20), (20, state))
        )
        whole = A.double() @ V.double() if size < 1e150 else None
        for found, exact in ((bounded(W, limit), W.double()), (bounded_product(A, V, limit), whole)):
            assert found.dtype == dtype
            if size == about.max and not torch.isfinite(found).all():
                assert (
                    exact is not whole and found.isnan().all()
                )  # flagged: the norm itself is beyond the range
                continue
            norm = torch.linalg.matrix_norm(found.double(), 2)
            assert norm <= limit
            if exact is None or torch.linalg.matrix_norm(exact, 2) > limit:
                assert norm > 0.9 * limit  # scaled, and not away
            elif exact is not whole:
                assert torch.equal(found, W)


def test_a_tied_layer_in_float16_with_large_weights():
    layer = LionLayer(64, 8, recurrence="tied").half()
    with torch.no_grad():
        layer.A.fill_(500), layer.V.fill_(500)
    torch.testing.assert_close(layer.recurrence_matrix().float(), torch.full((8, 8), 0.1), rtol=3e-3, atol=0)
    assert layer(1e-6 * torch.ones(2, 64, dtype=torch.float16), return_info=True)[1].converged.all()


def test_the_bound_of_what_is_not_finite_is_nan_and_that_of_subnormals_is_a_bound():
    for bad in (float("nan"), float("inf")):
        W = torch.eye(3)
        W[0, 1] = bad
        assert spectral_norm_bound(W).isnan() and bounded(W, 0.8).isnan().any()
    W = torch.full((3, 3), 1e-40)
    assert 3e-40 <= spectral_norm_bound(W).double() <= 3.02e-40


def test_rectangular():
    W = torch.randn(20, 7)
    sigma = torch.linalg.matrix_norm(W, 2)
    for M in (W, W.T):
        assert sigma <= spectral_norm_bound(M) <= 1.02 * sigma


def holds(layer):
    norm = torch.linalg.matrix_norm(layer.recurrence_matrix().detach().double(), 2)
    return LIPSCHITZ[layer.activation] * norm <= layer.gamma * (1 + 1e-6)


@pytest.mark.parametrize("activation", LIPSCHITZ)
@every_kind
def test_layer_is_a_contraction_for_any_weights(activation, kind):
    for name, W in adversarial(8):
        layer = KINDS[kind](8, 8, activation=activation, gamma=0.9)
        with torch.no_grad():
            (layer.A if kind == "tied" else layer.W).copy_(W)
            if kind == "tied":
                layer.V.copy_(torch.eye(8))
        assert holds(layer), name


def test_bound_survives_masks_steps_and_loading():
    layer = LionLayer(16, 16, gamma=0.8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3.0)
    for _ in range(10):
        layer(torch.randn(30, 16)).square().mean().backward()
        optimizer.step()
        assert holds(layer)
    other = LionLayer(16, 16, gamma=0.8)
    other.load_state_dict({k: 1000 * v for k, v in layer.state_dict().items()})
    assert holds(other)
    # Masking can raise the 2-norm: a Hadamard matrix of norm 1 becomes one of norm > 1.
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    H16 = torch.kron(torch.kron(H, H), torch.kron(H, H)) / 4
    mask = (H16 > 0).float()
    assert torch.linalg.matrix_norm(H16 * mask, 2) > 1.3
    with torch.no_grad():
        layer.W.copy_(0.8 * H16)
    prune.custom_from_mask(layer, "W", mask)
    assert holds(layer) and torch.equal(layer.recurrence_matrix() != 0, mask.bool())


@pytest.mark.parametrize("activation, expected", LIPSCHITZ.items())
def test_lipschitz_constants_bound_the_slope(activation, expected):
    p = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation].phi(p).sum(), p)
    constant = ACTIVATIONS[activation].lipschitz
    assert slope.abs().max() <= constant <= slope.abs().max() + 1e-4
    assert abs(constant - expected) < 1e-3
