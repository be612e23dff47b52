"""Makes `benchmarks` importable: it is part of the checkout, not of the installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that installed packages come before the checkout's.
sys.path.append(str(Path(__file__).parents[2]))
