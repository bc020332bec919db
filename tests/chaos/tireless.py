"""`lmesh up --foreground` with a supervisor that never gives a service up: chaos kills more than a crash loop does.

Run by its path with `lmesh up`'s arguments; it ends as `lmesh up --foreground` does, on SIGTERM.
"""

from __future__ import annotations

import functools
import sys

from lmesh_cli import app, daemon
from lmesh_cli.restart import RestartPolicy
from lmesh_cli.supervisor import Supervisor

if __name__ == "__main__":
    policy = functools.partial(RestartPolicy, first_s=0.2, most_s=0.2, limit=10**9, first_limit=10**9)
    daemon.Supervisor = functools.partial(Supervisor, policy=policy)  # type: ignore[misc, assignment]
    app.app(["up", "--foreground", *sys.argv[1:]])
