"""The operator boundary: registration, fakes and the choice of a backend."""

import warnings

import pytest
import torch
from kernel_helpers import problem

from lion_kernels import ops, present

ROWS, D, R = 70, 24, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("save", [True, False])
def test_solve_is_registered_as_torch_wants(dtype, save):
    args = (*problem(ROWS, D, R, dtype), "relu", 50, 1e-4, 1.0, True, save, "torch")
    report = torch.library.opcheck(ops.solve, args)
    assert set(report.values()) == {"SUCCESS"}
    assert ops.solve(*args)[1].shape == (ROWS if save else 0, R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adjoint_is_registered_as_torch_wants(dtype):
    x, A, W, _, V, _ = problem(ROWS, D, R, dtype)
    args = (torch.randn_like(x), x, torch.randn(ROWS, R).to(x), A, W, V)
    report = torch.library.opcheck(ops.adjoint, (*args, "gelu", 8, 0.0, 1.0, True, "torch"))
    assert set(report.values()) == {"SUCCESS"}


def test_outputs_do_not_alias_inputs():
    args = problem(ROWS, D, R)
    for residual in (True, False):
        out, p, change, count = ops.solve(*args, "relu", 3, 0.0, 1.0, residual, True, "torch")
        x, A, W, _, V, _ = args
        grads = ops.adjoint(out, x, p, A, W, V, "relu", 0, 0.0, 1.0, residual, "torch")
        given = {t.untyped_storage().data_ptr() for t in (*args, out, p)}
        results = {t.untyped_storage().data_ptr() for t in grads}
        assert len(results) == len(grads) and not given & results


def test_backend_choice(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.resolve_backend("auto", cpu, torch.float32, 32) == "torch"
    assert ops.resolve_backend("torch", cuda, torch.float32, 32) == "torch"
    with pytest.raises(RuntimeError, match="CUDA device"):
        ops.resolve_backend("triton", cpu, torch.float32, 32)
    with pytest.raises(ValueError, match="backend"):
        ops.resolve_backend("cuda", cpu, torch.float32, 32)


@pytest.mark.parametrize(
    "version, fits", [("3.2.0", False), ("3.5.1", False), ("3.6.0", True), ("3.10.0+git", True)]
)
def test_a_triton_that_cannot_compile_the_kernels_is_not_asked(monkeypatch, version, fits):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(present, "interpreted", lambda: False)
    assert (present.triton_missing.__wrapped__() is None) == fits


def test_falling_back_breaks_no_graph():
    def added(x):
        return x + (ops.resolve_backend("auto", torch.device("cuda", 0), torch.float64, 32) == "torch")

    ops._say_once.cache_clear()
    with pytest.warns(UserWarning, match="float64|Triton"):
        assert torch.compile(added, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


def test_auto_falls_back_and_says_so_once(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(present, "triton_missing", lambda: "Triton is not installed")
    ops._say_once.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert ops.resolve_backend("auto", cuda, torch.float32, 32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.resolve_backend("auto", cuda, torch.float32, 32) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        ops.resolve_backend("triton", cuda, torch.float32, 32)
