"""The engine process: torch lives here, gRPC does not."""

from __future__ import annotations

import os

# OpenMP's threads spin at every barrier before they sleep. Beside any other busy process that spin takes the core from
# the thread that all wait for: a one-row step of SmolLM2-135M took 179 ms beside two busy processes, 121 ms with a
# short spin (2 AMD EPYC cores). Read when torch loads its OpenMP, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
