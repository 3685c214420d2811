"""The tests' helpers lie one folder up, and beside the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
