"""A whole mesh for tests: started by `lmesh up` in a folder of its own, on free ports, stopped by `lmesh down`."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import grpc
from lmesh.inference.v1 import inference_pb2_grpc

MODEL = "smollm2-135m-instruct"
SOURCE = "packaged:smollm2-135m-instruct"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass(frozen=True)
class Mesh:
    """Addresses of a running mesh."""

    http_port: int
    grpc_port: int
    env: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def cli(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return run_cli(self.env, *args, timeout=timeout)

    @contextmanager
    def stub(self) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
        with grpc.insecure_channel(self.target) as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)

    def state(self) -> dict[str, object]:
        return json.loads((Path(self.env["LMESH_RUN_DIR"]) / "state.json").read_text())

    def metrics(self, port: int) -> dict[str, float]:
        """Samples of a /metrics page by name with labels, as `name{label="x"}`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def run_cli(env: dict[str, str], *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lmesh_cli.app", *args]
    with _one_at_a_time() if args[0] == "up" else nullcontext():
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Tests run side by side, and two launchers would find the same ports free."""
    with (Path(tempfile.gettempdir()) / "lmesh-tests-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def running_mesh(folder: Path, *args: str, **env: str) -> Iterator[Mesh]:
    """`lmesh up` with `args`, and `lmesh down` at the end whatever happens."""
    http_port, grpc_port = free_ports(2)
    full = {**os.environ, "LMESH_RUN_DIR": str(folder), "COLUMNS": "200", **env}
    up = run_cli(full, "up", "--http-port", str(http_port), "--grpc-port", str(grpc_port), *args, timeout=240)
    try:
        assert up.returncode == 0, f"{up.stdout}\n{up.stderr}\n{logs(folder)}"
        yield Mesh(http_port, grpc_port, full)
    finally:
        run_cli(full, "down")


def logs(folder: Path) -> str:
    """The tail of every log in the run folder, for a failing test's message."""
    return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(folder.rglob("*.log")))
