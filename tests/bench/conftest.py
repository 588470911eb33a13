"""The scripts of bench/ and bench/gpu/ are imported by their own names."""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "gpu")]
