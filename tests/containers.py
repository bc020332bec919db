"""A mesh in containers for tests: docker-compose.yml under its own project name, on free ports, removed at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.mesh import Mesh, free_ports

ROOT = Path(__file__).parents[1]
PROJECT = "lmesh-test"


@cache
def no_docker() -> str:
    """Why containers cannot be had here; empty where an engine and compose answer."""
    if shutil.which("docker") is None:
        return "no docker on this machine"
    for words in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        if done.returncode:
            return f"`{' '.join(words)}` failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return ""


def docker(*words: str, timeout: float = 120, env: dict[str, str] | None = None) -> str:
    """What a docker command prints; a failed one fails the test with all it said."""
    done = subprocess.run(["docker", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"docker {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def logged(container: str) -> list[dict[str, Any]]:
    """The container's log records; services log to stderr, and what is no record comes from others."""
    command = ["docker", "logs", container]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@dataclass(frozen=True)
class ComposeMesh:
    """A mesh that runs in containers."""

    mesh: Mesh
    env: dict[str, str]

    def compose(self, *words: str, timeout: float = 300) -> str:
        return docker("compose", "-p", PROJECT, *words, timeout=timeout, env=self.env)

    def containers(self, service: str) -> list[str]:
        """Ids of the service's running containers."""
        return self.compose("ps", "-q", service).split()

    def workers(self) -> dict[str, str]:
        """Containers by the address that each told the scheduler, running ones only."""
        found = {}
        for container in self.containers("worker"):
            ready = [record for record in logged(container) if record["message"] == "ready"]
            found[ready[-1]["address"]] = container
        return found


@contextmanager
def running_containers() -> Iterator[ComposeMesh]:
    """Builds what is not built, `up --wait`, and `down` with the volumes at the end."""
    http_port, grpc_port = free_ports(2)
    env = {**os.environ, "LMESH_HTTP_PORT": str(http_port), "LMESH_GRPC_PORT": str(grpc_port)}
    running = ComposeMesh(Mesh(http_port, grpc_port, env), env)
    try:
        running.compose("build", "--quiet", timeout=1500)
        running.compose("up", "--detach", "--wait")
        yield running
    finally:
        running.compose("down", "--volumes", "--timeout", "5")
