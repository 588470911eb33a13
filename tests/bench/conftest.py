"""The scripts of bench/ and bench/gpu/ are imported by their own names."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "gpu")]


@pytest.fixture
def one_revision(monkeypatch):
    """A commit between two runs of a test would make them different runs."""
    monkeypatch.setenv("LION_FAST_REVISION", "test")
    monkeypatch.delenv("LION_FAST_RUN", raising=False)
