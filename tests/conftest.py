"""Before anything imports triton: without a GPU its kernels are interpreted, in every process of the tests."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
