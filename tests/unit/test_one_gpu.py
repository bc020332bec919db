"""one-gpu: replicas on one host take different GPUs, and a GPU is free again when its replica is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "services/worker/one-gpu.sh"
GPUS = ("GPU-aaaa", "GPU-bbbb")
pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")


class Host:
    """A folder of locks, an nvidia-smi that knows two GPUs, and the replicas started so far."""

    def __init__(self, folder: Path) -> None:
        self._replicas: list[subprocess.Popen[str]] = []
        tool = folder / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(GPUS) + "\n")
        tool.chmod(0o755)
        locks = folder / "locks"
        locks.mkdir()
        self._env = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}", "LMESH_GPU_LOCKS": str(locks)}

    def start(self) -> tuple[subprocess.Popen[str], str]:
        """A replica that says which GPU it has, then waits for its input to end."""
        program = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exec cat"]
        replica = subprocess.Popen(
            [str(SCRIPT), *program],
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._replicas.append(replica)
        assert replica.stdout is not None
        return replica, replica.stdout.readline().strip()

    def stop(self) -> None:
        for replica in self._replicas:
            replica.kill()
            replica.communicate()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    running = Host(tmp_path)
    yield running
    running.stop()


def test_each_replica_has_its_own(host: Host) -> None:
    assert {host.start()[1], host.start()[1]} == set(GPUS)


def test_one_too_many_is_refused(host: Host) -> None:
    host.start()
    host.start()
    replica, said = host.start()
    assert replica.wait(10) == 1
    assert "every GPU of this host has a replica already: GPU-aaaa GPU-bbbb" in said


def test_a_killed_replicas_gpu_is_free(host: Host) -> None:
    first, gpu = host.start()
    host.start()
    first.kill()
    first.wait()
    assert host.start()[1] == gpu
