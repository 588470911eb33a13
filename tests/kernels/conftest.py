"""These tests run the kernels: in Triton's interpreter on a CPU, compiled on a GPU.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, so
tests/test_kernels_interpreted.py starts them in a process of their own.
By hand:  TRITON_INTERPRET=1 pytest tests/kernels
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "gpu"))

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    runs_kernels = ("solve", "adjoint", "step", "sparse", "layer_on_kernels", "exact")
    collect_ignore_glob = [f"test_{name}.py" for name in runs_kernels]


def pytest_collection_modifyitems(items):
    """Where there is a GPU these are its tests: `pytest -m gpu` runs them too."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN (the largest number for integers), so that an element not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
