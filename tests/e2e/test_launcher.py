"""The launcher from outside: up, again, chat, status, a worker's death, down; and kill -9 of the supervisor."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.mesh import MODEL, SOURCE, free_ports, run_cli

WAIT_S = 60.0


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "LMESH_RUN_DIR": str(folder), "COLUMNS": "200", "LMESH_WORKER_KV_CACHE_BYTES": "128MiB"}


def of_mesh(folder: Path) -> list[psutil.Process]:
    """All processes of a mesh, the engines and helpers included, by what they inherited from its supervisor."""
    return [process for process in psutil.process_iter() if _inherited(process, folder)]


def _inherited(process: psutil.Process, folder: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        # Redis writes its title over its environment, but it works in the folder.
        return f"LMESH_RUN_DIR={folder}".encode() in environ or Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False


def eventually(check: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def folder(tmp_path: Path):
    path = tmp_path / "run"
    yield path
    run_cli(environment(path), "down", "--now")
    for process in of_mesh(path):
        process.kill()


def up_args(http_port: int, grpc_port: int) -> list[str]:
    return ["up", "--http-port", str(http_port), "--grpc-port", str(grpc_port), "--model", f"{MODEL}={SOURCE}"]


def test_life_of_a_local_mesh(folder: Path) -> None:
    env, args = environment(folder), up_args(*free_ports(2))
    assert run_cli(env, "status").returncode == 1

    up = run_cli(env, *args, timeout=240)
    assert up.returncode == 0, up.stderr
    assert f"gRPC        127.0.0.1:{args[4]}" in up.stdout

    again = run_cli(env, *args)
    assert (again.returncode, "already up" in again.stdout) == (0, True)
    other = run_cli(env, *args, "--workers", "2")
    assert other.returncode == 1
    assert "workers: 1 runs, 2 was asked for" in other.stderr

    question = ["chat", "-m", "What is the capital of France?", "--temperature", "0", "--max-tokens", "32"]
    answer = run_cli(env, *question)
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout
    refused = run_cli(env, "chat", "nobody", "-m", "hi")
    assert (refused.returncode, "MODEL_NOT_FOUND" in refused.stderr) == (1, True)

    told = json.loads(run_cli(env, "status", "--json").stdout)
    assert told["up"] and told["journal_ok"]
    assert told["redis"]["version"].split()[0] in ("Redis", "Valkey")
    assert [(w["id"], w["model"], w["state"]) for w in told["workers"]] == [("worker-0", MODEL, "ok")]
    shown = run_cli(env, "status")
    assert shown.returncode == 0
    assert "worker-0" in shown.stdout

    worker = next(service for service in told["services"] if service["name"] == "worker-0")
    os.kill(worker["pid"], signal.SIGKILL)
    assert eventually(lambda: any(s["restarts"] == 1 and s["state"] == "ready" for s in services(env)))
    assert eventually(lambda: "Paris" in run_cli(env, *question).stdout)

    down = run_cli(env, "down")
    assert (down.returncode, down.stdout.strip()) == (0, "lmesh is down")
    assert of_mesh(folder) == []
    assert run_cli(env, "down").stdout.strip() == "lmesh was not up"


def services(env: dict[str, str]) -> list[dict[str, object]]:
    return json.loads(run_cli(env, "status", "--json").stdout)["services"]


def test_killed_supervisor_leaves_nothing(folder: Path) -> None:
    env, args = environment(folder), up_args(*free_ports(2))
    up = run_cli(env, *args, timeout=240)
    assert up.returncode == 0, up.stderr
    pid = json.loads((folder / "state.json").read_text())["pid"]
    names = {p.name() for p in of_mesh(folder)}
    assert len(of_mesh(folder)) >= 6, names  # supervisor, redis, scheduler, worker, its engine, gateway

    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: of_mesh(folder) == [], timeout_s=5), of_mesh(folder)
    assert run_cli(env, "status").returncode == 1
    assert "cleaned up" in run_cli(env, "down").stdout
    assert not (folder / "state.json").exists()


def test_taken_port_and_unknown_model_are_told_at_once(folder: Path) -> None:
    env = environment(folder)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        refused = run_cli(env, *up_args(taken, *free_ports(1)))
    assert refused.returncode == 1
    assert f"port {taken}" in refused.stderr and "--http-port" in refused.stderr
    http, grpc = (str(port) for port in free_ports(2))
    nowhere = run_cli(env, "up", "--http-port", http, "--grpc-port", grpc, "--model", "x=./nowhere-at-all")
    assert nowhere.returncode == 1
    assert "model x" in nowhere.stderr
    assert of_mesh(folder) == []


def test_a_service_that_cannot_start_ends_the_start_with_its_reason(folder: Path) -> None:
    env = environment(folder) | {"LMESH_SCHEDULER_MAX_QUEUE": "many"}
    failed = run_cli(env, *up_args(*free_ports(2)), timeout=240)
    assert failed.returncode == 1
    assert "LMESH_SCHEDULER_MAX_QUEUE" in failed.stderr
    assert eventually(lambda: of_mesh(folder) == [])
