"""Makes `networks.py` importable from every test, and keeps PyTorch to the cores it is given."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
