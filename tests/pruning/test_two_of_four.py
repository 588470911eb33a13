"""2:4 storage: what it refuses and why, and its arithmetic against the masked dense layer on a CPU."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lion_fast import LionLayer, pruning
from lion_fast.equilibrium.solve import default_tol
from lion_fast.errors import ConvergenceError, OptionError
from lion_fast.pruning import two_of_four


def pruned(state=64, width=64, **options) -> LionLayer:
    torch.manual_seed(0)
    layer = LionLayer(width, state, **options)
    with torch.no_grad():
        layer.W.mul_(3)
        layer.b.normal_()
        layer.c.normal_()
        layer.V.normal_().mul_(state**-0.5)
    pruning.prune_once(layer, 0.5, granularity="2:4")
    return layer


def test_it_refuses_what_torch_has_no_product_for():
    sparse = pruning.TwoOfFourLayer(pruned())
    with pytest.raises(OptionError, match="need a CUDA device, not cpu; run the layer itself"):
        sparse(torch.zeros(3, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError):
        sparse(torch.zeros(3, 65))
    with pytest.raises(OptionError, match="W is not 2:4"):
        pruning.TwoOfFourLayer(LionLayer(64, 64))
    with pytest.raises(OptionError, match="recurrence='free'"):
        pruning.TwoOfFourLayer(LionLayer(64, 64, recurrence="tied"))
    with torch.no_grad():
        sparse.layer.set_mask("W", None)
        sparse.layer.W.fill_(0.01)
    with pytest.raises(OptionError, match="W is not 2:4"):
        sparse.refresh()


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "reason"),
    [
        ((7, 5), torch.float16, (64, 64), "sm_80 or newer, not sm_75"),
        ((9, 0), torch.float32, (64, 64), "float16 and bfloat16 tokens, not torch.float32"),
        ((9, 0), torch.bfloat16, (48, 64), "multiples of 32 x 64, not 48 x 64"),
        ((9, 0), torch.bfloat16, (64, 96), "multiples of 32 x 64, not 64 x 96"),
        ((8, 0), torch.bfloat16, (32, 128), None),
    ],
)
def test_why_not_names_the_reason(monkeypatch, capability, dtype, shape, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = two_of_four.why_not(torch.device("cuda"), dtype, shape)
    assert found is None if reason is None else reason in found


def test_the_pattern_is_checked_by_fours_within_a_row():
    good = torch.zeros(2, 8)
    good[0, 2:4], good[0, 4:6] = 1.0, 1.0
    assert two_of_four.is_two_of_four(good)
    good[0, 1] = 1.0
    assert not two_of_four.is_two_of_four(good)
    assert not two_of_four.is_two_of_four(torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("activation", "damping"), [("relu", 1.0), ("gelu", 0.7)])
def test_it_equals_the_masked_dense_layer(monkeypatch, dtype, activation, damping):
    """torch's own compression there and back stands in for the sparse tensor cores' product."""
    packed = []

    def there_and_back(matrix):
        packed.append(sparse_semi_structured_from_dense_cutlass(matrix.contiguous()))
        assert packed[-1][0].shape == (matrix.shape[0], matrix.shape[1] // 2)
        return sparse_semi_structured_to_dense_cutlass(*packed[-1])

    monkeypatch.setattr(two_of_four, "compress", there_and_back)
    monkeypatch.setattr(two_of_four, "why_not", lambda *a: None)
    tol = default_tol(dtype)
    options = {"activation": activation, "damping": damping, "max_iter": 60}
    sparse = pruning.TwoOfFourLayer(pruned(**options))
    x = torch.randn(2, 7, 64).to(dtype)
    with pytest.raises(OptionError, match="no gradients"):
        sparse(x)
    with torch.no_grad():
        out, info = sparse(x, return_info=True)
        exact = pruned(**options, tol=1e-12).double()(x.double())
        same_tol = pruned(**options, tol=tol).double()(x.double(), return_info=True)[1]
    assert len(packed) == 3 and out.dtype == dtype and out.shape == x.shape
    assert info.converged.all() and same_tol.iterations.min() > 3
    assert (info.iterations - same_tol.iterations).abs().max() <= 2
    # A step at the tolerance is at most 1 / (1 - gamma) of it away from the equilibrium.
    bound = 4 * torch.finfo(dtype).eps + tol / (damping * (1 - 0.8))
    assert (out.double() - exact).norm() / (exact - x.double()).norm() < bound
    with torch.no_grad():
        assert torch.equal(sparse(x), out) and len(packed) == 3
        sparse.layer.V.mul_(-1)
        torch.testing.assert_close(sparse(x) - sparse.layer.c - x, x + sparse.layer.c - out, rtol=0, atol=0.1)
    assert len(packed) == 6


def test_rows_that_are_not_finite_leave_the_others_alone(monkeypatch):
    monkeypatch.setattr(two_of_four, "compress", lambda matrix: matrix)
    monkeypatch.setattr(two_of_four, "why_not", lambda *a: None)
    sparse = pruning.TwoOfFourLayer(pruned())
    x = torch.randn(4, 64).to(torch.bfloat16)
    with torch.no_grad():
        alone = sparse(x[1:])
        x[0, 3] = float("nan")
        out, info = sparse(x, return_info=True)
        sparse.layer.on_failure = "raise"
        with pytest.raises(ConvergenceError, match="1 of 4"):
            sparse(x)
        sparse.layer.on_failure = "ignore"
        sparse.layer.c.fill_(float("nan"))
        assert sparse(x, return_info=True)[1].residual.isinf().all()
    torch.testing.assert_close(out[1:], alone)
    assert info.residual[0] == float("inf") and torch.isfinite(info.residual[1:]).all()
