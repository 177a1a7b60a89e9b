"""The modules beside this file can be imported by the benchmarks of pytest, as by the scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
