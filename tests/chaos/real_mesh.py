"""A mesh of real processes for chaos: a tiny model, two workers, and handles to kill or stop any of its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from lmesh.scheduler.v1 import fleet_pb2, fleet_pb2_grpc

from tests.mesh import free_ports, logs, run_cli

MODEL = "tiny"
START_S = 120.0
HEARD_MS = 2500  # heartbeats come every second
# Bounds of minutes are for real models; what is promised is the same with shorter ones.
SETTINGS = {
    "LMESH_WORKER_KV_CACHE_BYTES": "64MiB",
    "LMESH_WORKER_MAX_SEQS": "32",
    "LMESH_WORKER_STEP_BOUND_S": "3",
    "LMESH_WORKER_THREADS": "1",
    "LMESH_WORKER_PREFIX_CACHE": "true",
}


def until(check: Callable[[], Any], what: str, timeout_s: float = START_S) -> Any:
    """Asks again until the answer is true, and returns it; the bound is generous, because only order matters."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class RealMesh:
    """A running mesh. Names of processes are the supervisor's, and `engine-N` and `gateway-N` for those below."""

    folder: Path
    grpc_port: int
    http_port: int
    env: dict[str, str]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def services(self) -> dict[str, dict[str, Any]]:
        """The supervisor's picture, by name; empty while there is none."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return {service["name"]: service for service in state["services"]}

    @property
    def well(self) -> bool:
        """Every service is ready."""
        services = self.services()
        return bool(services) and all(service["state"] == "ready" for service in services.values())

    def placeable(self) -> set[str]:
        """Workers that the scheduler would place on now."""
        fresh = [w for w in self._workers() if w.heartbeat_age_ms < HEARD_MS and not w.draining]
        return {w.hello.worker_id for w in fresh if w.heartbeat.progress == fleet_pb2.PROGRESS_OK}

    def used_blocks(self) -> int:
        """KV blocks that live sequences hold, of all workers; as they said last."""
        return sum(int(w.heartbeat.kv_blocks_used) for w in self._workers())

    def _workers(self) -> list[fleet_pb2.WorkerStatus]:
        port = json.loads((self.folder / "state.json").read_text())["plan"]["scheduler_port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            try:
                fleet = stub.DescribeFleet(fleet_pb2.DescribeFleetRequest(), timeout=5)
            except grpc.RpcError:
                return []
        return list(fleet.workers)

    def restarts(self, name: str) -> int:
        """How often the supervisor started a service again."""
        return int(self.services()[name]["restarts"])

    def process(self, name: str) -> psutil.Process:
        """A service's own process."""
        return psutil.Process(self.services()[name]["pid"])

    def engine(self, worker: str) -> psutil.Process:
        """The engine process of a worker."""
        found = [p for p in self.process(worker).children(recursive=True) if "lmesh_worker.engine" in _words(p)]
        return found[-1]

    def gateways(self) -> list[psutil.Process]:
        """The gateway processes that serve, by age."""
        found = [p for p in self.process("gateway").children(recursive=True) if "lmesh_gateway" in _words(p)]
        return sorted(found, key=lambda p: p.create_time())

    def kill(self, name: str) -> None:
        """SIGKILL; returns when the supervisor has seen it."""
        before = self.restarts(name)
        self.process(name).send_signal(signal.SIGKILL)
        until(lambda: self.restarts(name) > before, f"{name} dies")


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def real_mesh(
    folder: Path, model: Path, *, workers: int = 2, gateways: int = 2, settings: Mapping[str, str] | None = None
) -> Iterator[RealMesh]:
    """Starts a mesh whose supervisor never gives up, and stops it whatever happens."""
    http_port, grpc_port = free_ports(2)
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **SETTINGS, **(settings or {}), "LMESH_RUN_DIR": str(folder), "COLUMNS": "200"}
    shape = ["--workers", str(workers), "--gateways", str(gateways), "--model", f"{MODEL}={model}"]
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    command = [sys.executable, "-P", str(Path(__file__).with_name("tireless.py")), *shape, *ports]
    with (folder / "tireless.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    mesh = RealMesh(folder, grpc_port, http_port, env)
    try:
        until(lambda: mesh.well or process.poll() is not None, "the mesh is up")
        assert process.poll() is None, f"{(folder / 'tireless.log').read_text()}\n{logs(folder)}"
        yield mesh
    finally:
        run_cli(env, "down", "--now")
        process.terminate()
        process.wait(60)
