"""Tests import the flat modules from the repository root, wherever pytest is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "examples"):
    sys.path.insert(0, str(folder))
