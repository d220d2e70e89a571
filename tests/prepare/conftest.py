"""Helpers beside the tests are imported by name: decoders, which are other processes, must find them too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
