"""Tests import the flat modules from the repository root, wherever pytest is started."""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "examples"):
    sys.path.insert(0, str(folder))

# A shell starts background jobs with Ctrl-C ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
