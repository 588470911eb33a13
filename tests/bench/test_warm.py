"""bench/gpu/warm.py: a later launch finds in Triton's cache what it compiled, and nothing else."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lion_kernels import launch, tuned

pytest.importorskip("triton")
import warm  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
)

# A launch of the real kernels on a CPU's tensors, in another order, up to the point where a GPU is needed.
LAUNCH = """
import json, types
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lion_kernels import adjoint, present, solve

triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 80, 32),
))
run = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
present.capability = lambda device: (8, 0)
hits = []
knobs.compilation.listener = lambda src, cache_hit, **_: hits.append((src.name, cache_hit))

D, R, x, p = 48, 24, torch.randn(70, 48).bfloat16(), torch.randn(70, 24).bfloat16()
A, W, b, V, c = (torch.randn(shape) for shape in ((R, D), (R, R), (R,), (D, R), (D,)))
adjoint.adjoint(x, x, p, A, W, V, "gelu", 3, 0.0, 1.0, True)
solve.solve(x, A, W, b, V, c, "gelu", 50, 1e-3, 1.0, True, True)
there = dict(hits)
hits.clear()
solve.solve(x, A, W, b, V, c, "relu", 50, 1e-3, 1.0, True, True)
print(json.dumps([there, dict(hits)]))
"""
SMALL = {"width": 48, "state": 24, "activation": "gelu"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def worker():
    found = warm.Worker(warm.Setting(90, {}, cuda=False))
    yield found
    found.stop()


def kernels(worker, *args, **options) -> list[str]:
    found, reason = worker.ask(warm.find, warm.Call(*args, **options))
    assert reason is None
    return [request.kernel for request in found]


def test_a_later_launch_finds_its_kernel(cache):
    calls = [warm.Call("solve", 70, **SMALL), warm.Call("adjoint", 70, **SMALL)]
    said = []
    first = warm.warm(calls, capability=80, jobs=2, say=said.append)
    assert (first.compiled, first.there, first.failed, first.left) == (4, 0, {}, 0)
    assert said[0] == "4 kernels for 2 calls, 2 processes"
    result = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    asked, another = json.loads(result.stdout)
    names = {"_adjoint_kernel", "_weight_grads_kernel", "_sum_splits_kernel", "_solve_fwd_kernel"}
    assert asked == dict.fromkeys(names, True)
    assert another == {"_solve_fwd_kernel": False}
    again = warm.warm(calls, capability=80, jobs=1, say=said.append)
    assert (again.compiled, again.there, again.failed) == (0, 4, {})


def test_functions_that_kernels_call_have_their_keys_from_the_start():
    """Else, in Triton 3.6, the name of a kernel in the cache depends on what was launched before it."""
    code = (
        "from triton.runtime.jit import JITFunction\n"
        "from lion_kernels import activations, adjoint, solve, sparse_kernels, step_kernels, tile\n"
        "modules = activations, adjoint, solve, sparse_kernels, step_kernels, tile\n"
        "found = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]\n"
        "late = {f.__name__ for f in found if f.hash is None}\n"
        "assert len(found) > 20 and all(name.endswith('_kernel') for name in late), late\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_launchers_say_what_a_call_needs(worker):
    assert kernels(worker, "solve", 131) == ["_solve_fwd_kernel"]
    fused = ["_adjoint_kernel", "_weight_grads_kernel", "_sum_splits_kernel"]
    assert kernels(worker, "adjoint", 131) == fused
    assert kernels(worker, "adjoint", 12608) == fused[:1]
    steps = ["step_fwd_kernel"] * 3 + ["step_finish_kernel", "read_out_kernel"]
    assert kernels(worker, "solve", 131, state=512) == kernels(worker, "solve_wide", 131) == steps
    back = ["step_bwd_kernel"] * 3 + ["step_bwd_finish_kernel", "read_out_kernel"]
    assert kernels(worker, "adjoint", 131, state=512) == back
    sparse = kernels(worker, "adjoint_wide", 131, width=96, state=64, block=32)
    assert sorted(set(sparse)) == sorted({*back, "_sampled_kernel"})


def test_what_a_kernel_depends_on(worker):
    def found(**options):
        return worker.ask(warm.find, warm.Call("solve", **{"rows": 131, **options}))[0]

    base = found()
    assert found(rows=50432) == base and found(steps=30, tol=1e-2) == base
    for options in (
        {"state": 16}, {"width": 64}, {"dtype": torch.float32}, {"activation": "gelu"}, {"damping": 0.5},
        {"residual": False}, {"save": False},
    ):  # fmt: skip
        assert found(**options) != base, options
    assert found(dtype=torch.float32, tf32=True) != found(dtype=torch.float32)
    # A wide state is float16 where the tolerance allows it.
    assert found(state=512, tol=1e-4) != found(state=512)
    with pytest.raises(ValueError, match="op must be one of solve, adjoint"):
        warm.Call("sum", 131)


def test_tuned_tiles_are_those_that_are_compiled(worker):
    tile = launch.Config(16, 32, 4, 2)
    other = warm.Worker(warm.Setting(90, {tuned.key("solve", 768, 64, torch.bfloat16, False): tile}, False))
    ours, plain = (w.ask(warm.find, warm.Call("solve", 131)) for w in (other, worker))
    other.stop()
    assert ours != plain and "'num_stages': 2" in ours[0][0].key


def test_what_fails_is_said_and_the_rest_goes_on(cache):
    said = []
    calls = [warm.Call("solve", 70, activation="swish"), warm.Call("solve", 70, **SMALL)]
    summary = warm.warm(calls, capability=80, jobs=1, say=said.append)
    assert summary.compiled == 1
    ((call, reason),) = summary.failed.items()
    assert "swish" in call and reason.startswith("ValueError: activation must be one of")
    assert any(line.startswith("FAILED Call(op='solve'") for line in said)


def test_a_compiler_that_dies_takes_one_kernel_with_it(worker):
    assert worker.ask(os._exit, 7) == (None, "the compiler's process died")
    assert kernels(worker, "solve", 131) == ["_solve_fwd_kernel"]


def test_no_kernel_begins_after_the_time(cache, capsys):
    assert warm.main(["--device", "cpu", "--minutes", "0", "--jobs", "1", "--capability", "80"]) == 0
    printed = capsys.readouterr().out
    assert "0 kernels compiled, 0 were there, 0 failed, " in printed
    assert not list(cache.rglob("*.cubin"))
    assert len(warm.default_calls()) == len(set(warm.default_calls())) > 100
