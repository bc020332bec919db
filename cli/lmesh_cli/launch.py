"""`lmesh up` and `lmesh down`: from what a person asks for to a detached supervisor, and back."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmesh_chassis import logs
from lmesh_kernels.text.resolve import ModelNotFoundError, resolve
from rich.console import Console

from lmesh_cli import daemon, log_files, redis_server, services
from lmesh_cli.plan import MeshPlan, ModelChoice, lay_out, parse_models
from lmesh_cli.run_dir import AlreadyRunningError, MeshState, RunDir
from lmesh_cli.supervisor import SUPERVISOR

_POLL_S = 0.1


class LaunchError(RuntimeError):
    """The mesh did not come up or go down; the message says why and where to look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpRequest:
    """What `lmesh up` was asked for."""

    models: Sequence[str]  # id=source, or source
    workers: int  # of each model
    gateways: int
    http_port: int
    grpc_port: int
    timeout_s: float
    trainers: int = 1
    load_format: str = "auto"  # dummy: random weights

    def shape(self) -> dict[str, object]:
        """For comparison with `MeshPlan.shape` of what runs."""
        return {
            "models": parse_models(self.models),
            "workers": self.workers,
            "trainers": self.trainers,
            "gateways": self.gateways,
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "load_format": self.load_format,
        }


def up(request: UpRequest, run_dir: RunDir, console: Console) -> MeshState:
    """Brings the mesh up, detached, and returns its state once every model answers.

    A mesh of the same shape that is up already is left as it is. Raises LaunchError, PlanError, PortTakenError,
    RedisNotFoundError, or ModelNotFoundError.
    """
    if (running := run_dir.live()) is not None:
        return _join(request, running, run_dir, console)
    plan = prepare(request, run_dir, console)
    pid = _spawn(run_dir, plan)
    return _wait_ready(run_dir, pid, request.timeout_s, console)


def prepare(request: UpRequest, run_dir: RunDir, console: Console) -> MeshPlan:
    """Everything that can fail before a process is started: leftovers, models, ports, Redis. Raises as `up` does."""
    try:
        with run_dir.lock():
            if run_dir.clean():
                console.print("cleaned up what an earlier mesh had left")
    except AlreadyRunningError as error:
        raise LaunchError(f"{error}, on its way up or down; try again in a moment") from error
    if services.wants_embedded_redis(os.environ):
        redis_server.find_server()
    asked = parse_models(request.models)
    # The ports before the models: a download is not wanted for a mesh that cannot listen.
    ports = {"http_port": request.http_port, "grpc_port": request.grpc_port}
    counts = {"workers": request.workers, "gateways": request.gateways, "trainers": request.trainers}
    lay_out([], **counts, **ports, load_format=request.load_format)
    text_only = request.load_format == "dummy"
    models = [_find(name, source, console, text_only=text_only) for name, source in asked.items()]
    return lay_out(models, **counts, **ports, load_format=request.load_format)


def foreground(request: UpRequest, run_dir: RunDir, console: Console) -> int:
    """Supervises in this process, its log on the terminal, until Ctrl-C; the exit status."""
    if (running := run_dir.live()) is not None:
        _join(request, running, run_dir, console)
        return 0
    plan = prepare(request, run_dir, console)
    logs.setup(SUPERVISOR)
    return daemon.supervise(run_dir, plan)


def down(run_dir: RunDir, console: Console, *, now: bool = False) -> bool:
    """Stops the mesh in order and returns when no process is left; False when none was up.

    Running requests get the services' drain time to end; with `now` they are cut.
    """
    state = run_dir.live()
    if state is None:
        with run_dir.lock():
            if run_dir.clean():
                console.print("cleaned up what an earlier mesh had left")
        return False
    with console.status("stopping: requests that run are finished first"):
        _signal(state, signal.SIGTERM)
        if now:
            _wait(lambda: _phase(run_dir) == "stopping" or not state.alive, 5.0)
            _signal(state, signal.SIGTERM)
        if not _wait(lambda: not state.alive, 4 * services.STOP_TIMEOUT_S):
            raise LaunchError(f"the supervisor (pid {state.pid}) does not stop; see {run_dir.log(SUPERVISOR)}")
    return True


def _join(request: UpRequest, running: MeshState, run_dir: RunDir, console: Console) -> MeshState:
    have, want = MeshPlan.from_json(running.plan).shape(), request.shape()
    if have != want:
        differing = [name for name in want if have[name] != want[name]]
        words = "; ".join(f"{name}: {have[name]} runs, {want[name]} was asked for" for name in differing)
        raise LaunchError(f"a mesh of another shape is up ({words}); `lmesh down` first")
    console.print("lmesh is already up")
    return _wait_ready(run_dir, running.pid, request.timeout_s, console)


def _find(name: str, source: str, console: Console, *, text_only: bool) -> ModelChoice:
    def say(text: str) -> None:
        console.print(f"{name}: {text}", highlight=False)

    logging.getLogger("lmesh_kernels").setLevel(logging.ERROR)  # what it would warn of is told by `say`
    try:
        files = resolve(source, progress=say, text_only=text_only)
    except ModelNotFoundError as error:
        raise LaunchError(f"model {name}: {error}") from error
    say(f"{files.path}")
    return ModelChoice(id=name, asked=source, source=files.source)


def _spawn(run_dir: RunDir, plan: MeshPlan) -> int:
    with log_files.open_append(run_dir.log(SUPERVISOR)) as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", daemon.__name__, str(run_dir.path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=run_dir.path,
            start_new_session=True,  # no terminal's Ctrl-C or hang-up reaches it; init inherits it when we leave
        )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(plan.to_json()).encode())
    # Reaped here if it dies while we watch; a Popen object that is collected alive would warn.
    _spawned.append(process)
    return process.pid


_spawned: list[subprocess.Popen[bytes]] = []


def _wait_ready(run_dir: RunDir, pid: int, timeout_s: float, console: Console) -> MeshState:
    deadline = time.monotonic() + timeout_s
    try:
        with console.status("starting") as status:
            while time.monotonic() < deadline:
                state = _own_state(run_dir, pid)
                if state is not None and state.phase in ("ready", "degraded"):
                    return state
                if _gone(pid, state) or (state is not None and state.phase != "starting"):
                    why = _why(state, run_dir)
                    _wait(lambda: run_dir.live() is None, 4 * services.STOP_TIMEOUT_S)  # it stops the rest
                    raise LaunchError(why)
                if state is not None:
                    status.update(", ".join(f"{s.name} {s.state}" for s in state.services))
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        down(run_dir, console, now=True)
        raise
    down(run_dir, console, now=True)
    raise LaunchError(f"not ready after {timeout_s:.0f} s (--timeout); logs: {run_dir.logs}")


def _own_state(run_dir: RunDir, pid: int) -> MeshState | None:
    """The state that supervisor `pid` published; None before its first."""
    state = run_dir.read()
    return state if state is not None and state.pid == pid else None


def _gone(pid: int, state: MeshState | None) -> bool:
    if any(process.pid == pid and process.poll() is not None for process in _spawned):
        return True
    return state is not None and not state.alive


def _why(state: MeshState | None, run_dir: RunDir) -> str:
    error = state.error if state is not None else ""
    failed = next((s for s in state.services if s.state == "failed"), None) if state is not None else None
    log = Path(failed.log) if failed is not None else run_dir.log(SUPERVISOR)
    return f"the mesh did not start: {error or 'its supervisor ended'}\nlast lines of {log}:\n{log_files.tail(log)}"


def _signal(state: MeshState, number: signal.Signals) -> None:
    if state.alive:
        os.kill(state.pid, number)


def _phase(run_dir: RunDir) -> str:
    state = run_dir.read()
    return "stopped" if state is None else state.phase


def _wait(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
