"""The parts of ``gpu_suite.py``: what a GPU has to show, a module each.

A part is a function of a ``Job`` and runs in a process of its own: ``python -m gpu PART``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# Neither the packages nor the benchmarks need be installed.
sys.path[:0] = [path for path in (str(ROOT), str(BENCHMARKS)) if path not in sys.path]
