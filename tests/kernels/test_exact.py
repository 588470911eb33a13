"""Exact and repeatable results of the whole-solve kernels, and what a CUDA device alone can show."""

import pytest
import torch
from kernel_helpers import DEVICE, DTYPES, GRADIENTS, INTERPRETED, problem, torch_adjoint, torch_solve
from problems import integers

from lion_fast import LionLayer
from lion_kernels import launch
from lion_kernels.adjoint import adjoint
from lion_kernels.solve import solve

on_gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")

# The interpreter works through a tile in milliseconds to seconds, so it gets small problems.
STATES = [16, 64] if INTERPRETED else [16, 32, 64, 128, 256]
CASES = [(dtype, state) for dtype in DTYPES for state in STATES if launch.why_not(dtype, state) is None]


@pytest.mark.parametrize(
    "dtype, state, tf32",
    [*((*case, False) for case in CASES), *((torch.float32, s, True) for s in STATES[:4])],
)
def test_integers_are_exact(dtype, state, tf32):
    """A wrong fragment, a missed wait or a wrong mask shows as a wrong integer."""
    exact_args = integers(*((70, 100) if INTERPRETED else (1000, 768)), state, DEVICE)
    args = [t.to(dtype) for t in exact_args]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for steps in (1, 2, 3):
            out, p, _, _ = solve(*args, "relu", steps, 0.0, 1.0, True)
            exact = torch_solve(*exact_args, "relu", steps, 1.0, True)
            assert max(t.abs().max() for t in exact) < 256, "the problem is not exact in bfloat16"
            assert torch.equal(out.double(), exact[0]) and torch.equal(p.double(), exact[1])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype, state", CASES)
def test_integer_gradients_are_exact(dtype, state):
    rows, width = (70, 100) if INTERPRETED else (1000, 768)
    x, A, W, b, V, _ = integers(rows, width, state, DEVICE)
    # Few nonzero entries, so that sums over all rows stay below 256 too.
    grad_out = x.roll(1, 0) * (torch.arange(rows, device=DEVICE) % max(1, rows // 12) == 0)[:, None]
    p = torch_solve(x, A, W, b, V, x[0] * 0, "relu", 1, 1.0, True)[1]
    exact_args = (grad_out, x, p, A, W, V)
    args = [t.to(dtype) for t in exact_args]
    exact = torch_adjoint(*exact_args, "relu", 1, 1.0, True)
    for split in (0, 64):
        got = adjoint(*args, "relu", 1, 0.0, 1.0, True, rows_per_split=split)
        for name, ours, truth in zip(GRADIENTS, got, exact, strict=False):
            if truth.abs().max() < 256:
                assert torch.equal(ours.double(), truth), name
        # Every sum over rows is exact in float32, where it is kept, though not in bfloat16.
        assert exact[0].abs().max() < 256 and torch.equal(got[3].double(), exact[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs_give_the_same_bits(dtype):
    rows, width, state = (70, 30, 16) if INTERPRETED else (3000, 768, 64)
    args = problem(rows, width, state, dtype)
    x, A, W, _, V, _ = args
    grad_out = torch.randn_like(x)
    first = None
    for _ in range(3 if INTERPRETED else 100):
        out, p, change, count = solve(*args, "gelu", 30, 1e-2, 1.0, True)
        results = [out, p, change, count]
        for split in (0, 512):
            results += adjoint(grad_out, x, p, A, W, V, "gelu", 8, 0.0, 1.0, True, rows_per_split=split)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@on_gpu_only
@pytest.mark.parametrize("rows", [197, 20000])
def test_a_cuda_graph_replays_on_new_tokens(rows):
    args = problem(rows, 768, 64, torch.bfloat16)
    x, A, W, _, V, _ = args
    grad_out = torch.randn_like(x)

    def step():
        out, p, change, count = solve(*args, "relu", 30, 1e-2, 1.0, True)
        return [out, p, change, count, *adjoint(grad_out, x, p, A, W, V, "relu", 30, 1e-3, 1.0, True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (0.1, 10.0):
        # Rows of another size converge after another number of iterations.
        x.copy_(scale * torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@on_gpu_only
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
def test_the_layer_compiles_whole(backend):
    layer = LionLayer(768, 32, backend="triton", device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 197, 768, device="cuda", dtype=torch.bfloat16)
    # Inductor may round W's bound otherwise, and with it a result to its other neighbour in bfloat16.
    rounding = 2**-7 if backend == "inductor" else 0
    torch.testing.assert_close(compiled(x), layer(x), rtol=rounding, atol=rounding)


@on_gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_current():
    args = [t.to("cuda:1") for t in problem(200, 64, 16)]
    with torch.cuda.device(0):
        out = solve(*args, "relu", 10, 0.0, 1.0, True)[0]
    torch.testing.assert_close(out, torch_solve(*args, "relu", 10, 1.0, True)[0])
