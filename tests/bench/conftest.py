"""The programs of bench/ as modules, and one revision for all that a test measures."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench")]


@pytest.fixture
def one_revision(monkeypatch):
    """A commit between two runs of a test would make them different runs."""
    monkeypatch.setenv("LION_FAST_REVISION", "test")
    monkeypatch.delenv("LION_FAST_RUN", raising=False)
