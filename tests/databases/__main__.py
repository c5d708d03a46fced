"""Writes the golden database of the current schema."""

import sys
import tempfile
from pathlib import Path

from tests.databases import write

with tempfile.TemporaryDirectory() as directory:
    sys.stdout.write(f"{write(Path(directory))}\n")
