"""The run folder of a mesh: its state, logs, sockets and artifacts; one mesh a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmesh_cli import process_table

Phase = Literal["starting", "ready", "degraded", "stopping", "stopped", "failed"]
# sun_path holds 108 bytes on Linux and 104 on macOS, with the closing zero.
_MAX_SOCKET_PATH = 100


class AlreadyRunningError(RuntimeError):
    """Another supervisor holds the run folder."""


@dataclass(kw_only=True, slots=True)
class ServiceState:
    """One service as the supervisor sees it."""

    name: str
    log: str
    state: Literal["starting", "ready", "restarting", "failed", "stopped"] = "starting"
    pid: int = 0
    born: str = ""
    restarts: int = 0
    message: str = ""


@dataclass(kw_only=True, slots=True)
class MeshState:
    """What the supervisor publishes in state.json."""

    pid: int
    born: str
    phase: Phase = "starting"
    error: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    redis: dict[str, str] = field(default_factory=dict)  # version, server, url, folder
    services: list[ServiceState] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the supervisor that wrote this lives."""
        return process_table.is_alive(self.pid, self.born)


class RunDir:
    """Paths in a run folder, and who may use it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_path()).absolute()
        self.logs = self.path / "logs"
        self.artifacts = self.path / "artifacts"  # datasets, checkpoints, adapters, exports: outlives the mesh
        self._state = self.path / "state.json"

    def create(self) -> None:
        """Makes the folder, readable by its owner only."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        self.logs.mkdir(exist_ok=True)

    def log(self, name: str) -> Path:
        """The log file of one service, or of the supervisor."""
        return self.logs / f"{name}.log"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process's supervisor; the kernel lets go when the process dies.

        Raises AlreadyRunningError when another one holds it.
        """
        self.create()
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunningError(f"a supervisor is already running in {self.path}") from None
            yield

    def read(self) -> MeshState | None:
        """The last published state; None when there is none."""
        try:
            data = json.loads(self._state.read_text())
        except FileNotFoundError:
            return None
        return MeshState(**{**data, "services": [ServiceState(**service) for service in data["services"]]})

    def write(self, state: MeshState) -> None:
        """Publishes a state; readers see the old one or the new one, never half of one."""
        fresh = self._state.with_suffix(".tmp")
        fresh.write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
        fresh.replace(self._state)

    def live(self) -> MeshState | None:
        """The state of a mesh that is up or on its way up or down; None when no supervisor lives."""
        state = self.read()
        return state if state is not None and state.alive else None

    def clean(self) -> bool:
        """Removes what a dead supervisor left: processes that outlived it, its socket folder, its state.

        True when there was anything. Only for a caller that holds the lock.
        """
        state = self.read()
        if state is None:
            return False
        for service in state.services:
            if process_table.is_alive(service.pid, service.born):
                process_table.signal_group(service.pid, signal.SIGKILL)
        if folder := state.redis.get("folder"):
            shutil.rmtree(folder, ignore_errors=True)
        self._state.unlink(missing_ok=True)
        return True

    def socket_folder(self) -> Path:
        """A folder for sockets, open to its owner only: in the run folder, or elsewhere if that path is too long."""
        folder = self.path / "redis"
        if len(os.fsencode(folder / "redis.sock")) > _MAX_SOCKET_PATH:
            return Path(tempfile.mkdtemp(prefix="lmesh-"))
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        return folder

    def redis_data(self) -> Path:
        """Where the embedded Redis keeps its file. It outlives the mesh: published adapters and jobs are in it."""
        folder = self.path / "redis-data"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def default_path() -> Path:
    """$LMESH_RUN_DIR, else lmesh in the user's state folder."""
    if explicit := os.environ.get("LMESH_RUN_DIR"):
        return Path(explicit).expanduser()
    state_home = os.environ.get("XDG_STATE_HOME")
    return (Path(state_home) if state_home else Path.home() / ".local" / "state") / "lmesh"
