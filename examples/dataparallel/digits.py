"""What is taken from the other example: its data, and its way with processes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))

import dataset as dataset
import processes as processes
