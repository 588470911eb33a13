"""Runs the kernels' tests in Triton's interpreter, which must be chosen before Triton is imported.

Once with the installed Triton and once with the oldest that is supported, which is kept in the cache.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lion_fast.weights import cache_dir

pytest.importorskip("triton")
TESTS = Path(__file__).parent
OLDEST = "3.6.0"
# With the oldest Triton: the solve and its adjoint, in the dtypes and shapes where releases could differ.
WHOLE = [TESTS / "kernels", TESTS / "gpu" / "test_gpu_kernels.py"]
CORE = [TESTS / "kernels" / "test_solve.py", TESTS / "kernels" / "test_adjoint.py"]


def interpret(tests, path=None):
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, *map(str, tests)], env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def oldest_triton():
    """A folder with the oldest supported Triton, installed once; skips where it cannot be fetched."""
    folder = cache_dir() / f"triton-{OLDEST}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(dir=folder.parent)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part]
        done = subprocess.run([*command, f"triton=={OLDEST}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part)
            pytest.skip(f"Triton {OLDEST} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        os.replace(part, folder)
    return folder


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    interpret(WHOLE)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.metadata.version("triton") == OLDEST, reason="the installed Triton is the oldest"
)
def test_kernels_in_the_interpreter_of_the_oldest_triton():
    interpret(CORE, oldest_triton())
