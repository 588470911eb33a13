"""Runs the kernels' tests in Triton's interpreter, which must be chosen before Triton is imported.

A file at a time, each in a process of its own, so that the workers of a parallel run share them. Once with
the installed Triton and once, for the solve and its adjoint, with the oldest that is supported, which is kept
in the cache.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lion_fast.files import cache_dir

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
OLDEST = "3.6.0"
# The longest first, and those where releases of Triton could differ.
WHOLE = (
    "test_sparse",
    "test_step",
    "test_adjoint",
    "test_solve",
    "test_layer_on_kernels",
    "test_exact",
)
CORE = ("test_adjoint", "test_solve")


def interpret(name, path=None):
    file = TESTS / "kernels" / f"{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def oldest_triton():
    """A folder with the oldest supported Triton, installed once; skips where it cannot be fetched."""
    folder = cache_dir() / f"triton-{OLDEST}-{sys.implementation.cache_tag}"  # it is compiled for a Python
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(dir=folder.parent)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part]
        done = subprocess.run([*command, f"triton=={OLDEST}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part)
            pytest.skip(f"Triton {OLDEST} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        try:
            os.replace(part, folder)
        except OSError:  # another worker was quicker
            shutil.rmtree(part)
            assert folder.exists()
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_kernels_in_the_interpreter(name):
    interpret(name)


@pytest.mark.skipif(
    importlib.metadata.version("triton") == OLDEST, reason="the installed Triton is the oldest"
)
@pytest.mark.parametrize("name", CORE)
def test_kernels_in_the_interpreter_of_the_oldest_triton(name):
    interpret(name, oldest_triton())


def test_no_file_of_the_kernels_is_left_out():
    named = {path.stem for path in TESTS.glob("kernels/test_*.py")}
    # These need no interpreter and run with the rest.
    assert named - {"test_interpreter", "test_launch", "test_ops"} == set(WHOLE)
