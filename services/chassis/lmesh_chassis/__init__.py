"""Boots, secures, observes and stops any lmesh service; knows no tokens."""

from __future__ import annotations

import os

# gRPC's fork handlers close a child's descriptors between fork and exec: measured, 4 of 150 children lost their pipes.
# Services start children (template helpers, the engine) but never go on in a fork, so the handlers can only harm.
# Read when gRPC is first imported, hence here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
