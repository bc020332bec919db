"""The supervisor over small scripted processes: restarts, giving up, order of stopping, and dying without leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from lmesh_cli import process_table
from lmesh_cli.restart import RestartPolicy
from lmesh_cli.run_dir import AlreadyRunningError, MeshState, RunDir, ServiceState
from lmesh_cli.services import ServiceSpec
from lmesh_cli.supervisor import Supervisor

# Says that it is ready by making a file; appends its name to a list when it is asked to stop.
POLITE = """
import pathlib, signal, sys
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def stop(*_):
    with (folder / "stopped").open("a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / name).touch()
while True:
    signal.pause()
"""
# Dies the first time it is started, and serves the second time.
FALTERING = (
    'import pathlib, sys\np = pathlib.Path(sys.argv[2], "fell")\nif not p.exists():\n    p.touch(); sys.exit(7)\n'
)
# Starts a process of its own and is deaf to SIGTERM.
DEAF = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
path = pathlib.Path(sys.argv[2], sys.argv[1])
path.with_suffix(".tmp").write_text(str(own.pid))
path.with_suffix(".tmp").rename(path)
while True:
    signal.pause()
"""
WAIT_S = 20.0


def spec(name: str, script: str, folder: Path, **changes: object) -> ServiceSpec:
    async def probe() -> bool:
        return (folder / name).exists()

    argv = (sys.executable, "-c", script, name, str(folder))
    return ServiceSpec(
        name=name, argv=argv, probe=probe, prepare=lambda: (folder / name).unlink(missing_ok=True), **changes
    )


def quick_policy() -> RestartPolicy:
    return RestartPolicy(first_s=0.01, most_s=0.02, limit=3, first_limit=2)


async def eventually(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not check():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.02)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@contextlib.asynccontextmanager
async def supervised(run_dir: RunDir, *specs: ServiceSpec) -> AsyncIterator[tuple[Supervisor, asyncio.Task[int]]]:
    supervisor = Supervisor(run_dir, specs, policy=quick_policy)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running
    finally:
        supervisor.request_stop()
        await asyncio.wait_for(running, WAIT_S)


class TestSupervisor:
    async def test_stops_in_order(self, run_dir: RunDir, tmp_path: Path) -> None:
        names = ["redis", "scheduler", "worker", "gateway"]
        specs = [spec(name, POLITE, tmp_path, stop_stage=3 - index) for index, name in enumerate(names)]
        async with supervised(run_dir, *specs) as (supervisor, running):
            await eventually(lambda: supervisor.state.phase == "ready")
            pids = [service.pid for service in supervisor.state.services]
            assert run_dir.read() == supervisor.state
            supervisor.request_stop()
            assert await running == 0
        assert (tmp_path / "stopped").read_text().split() == names[::-1]
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert run_dir.read().phase == "stopped"

    async def test_second_stage_waits_for_the_first(self, run_dir: RunDir, tmp_path: Path) -> None:
        first = spec("first", "import signal; signal.pause()", tmp_path)
        second = spec("second", POLITE, tmp_path, start_stage=1)
        async with supervised(run_dir, first, second) as (supervisor, _):
            await eventually(lambda: supervisor.state.services[0].pid > 0)
            assert supervisor.state.services[1].pid == 0
            (tmp_path / "first").touch()
            await eventually(lambda: supervisor.state.phase == "ready")

    async def test_restarts_what_dies(self, run_dir: RunDir, tmp_path: Path) -> None:
        async with supervised(run_dir, spec("a", POLITE, tmp_path), spec("b", POLITE, tmp_path)) as (supervisor, _):
            await eventually(lambda: supervisor.state.phase == "ready")
            a, b = supervisor.state.services
            pids = a.pid, b.pid
            os.kill(a.pid, signal.SIGKILL)
            await eventually(lambda: a.restarts == 1 and supervisor.state.phase == "ready")
            assert a.pid != pids[0]
            assert (b.pid, b.restarts) == (pids[1], 0)

    async def test_a_first_fall_is_forgiven(self, run_dir: RunDir, tmp_path: Path) -> None:
        async with supervised(run_dir, spec("a", FALTERING + POLITE, tmp_path)) as (supervisor, _):
            await eventually(lambda: supervisor.state.phase == "ready")
            assert supervisor.state.services[0].restarts == 1

    async def test_gives_up_a_crash_loop(self, run_dir: RunDir, tmp_path: Path) -> None:
        specs = [spec("fine", POLITE, tmp_path), spec("broken", 'print("why"); raise SystemExit(7)', tmp_path)]
        async with supervised(run_dir, *specs) as (supervisor, running):
            assert await asyncio.wait_for(running, WAIT_S) == 1
        state = run_dir.read()
        assert state.phase == "failed"
        assert "broken exited with status 7; given up after 3 deaths in a row" in state.error
        assert run_dir.log("broken").read_text() == "why\n" * 3
        assert [service.state for service in supervisor.state.services] == ["stopped", "failed"]

    async def test_bad_settings_are_not_tried_again(self, run_dir: RunDir, tmp_path: Path) -> None:
        async with supervised(run_dir, spec("broken", "raise SystemExit(2)", tmp_path)) as (supervisor, running):
            assert await asyncio.wait_for(running, WAIT_S) == 1
            assert supervisor.state.services[0].restarts == 0

    async def test_one_lost_service_does_not_take_the_rest(self, run_dir: RunDir, tmp_path: Path) -> None:
        specs = [spec("fine", POLITE, tmp_path), spec("dying", POLITE + "\n", tmp_path)]
        async with supervised(run_dir, *specs) as (supervisor, running):
            await eventually(lambda: supervisor.state.phase == "ready")
            dying = supervisor.state.services[1]
            while dying.state != "failed":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(dying.pid, signal.SIGKILL)
                await asyncio.sleep(0.01)
            assert supervisor.state.phase == "degraded"
            assert supervisor.state.services[0].state == "ready"
            assert not running.done()

    async def test_kills_the_deaf_with_all_that_is_theirs(self, run_dir: RunDir, tmp_path: Path) -> None:
        async with supervised(run_dir, spec("deaf", DEAF, tmp_path, stop_timeout_s=0.1)) as (supervisor, running):
            await eventually(lambda: supervisor.state.phase == "ready")
            own = int((tmp_path / "deaf").read_text())
            supervisor.request_stop()
            assert await running == 0
        await eventually(lambda: process_table.birth(own) is None)

    async def test_second_request_cuts_the_drain(self, run_dir: RunDir, tmp_path: Path) -> None:
        async with supervised(run_dir, spec("deaf", DEAF, tmp_path, stop_timeout_s=3600)) as (supervisor, running):
            await eventually(lambda: supervisor.state.phase == "ready")
            supervisor.request_stop()
            supervisor.request_stop()
            assert await asyncio.wait_for(running, WAIT_S) == 0


class TestKilledSupervisor:
    PROGRAM = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_supervisor import POLITE, spec
        from lmesh_cli.run_dir import RunDir
        from lmesh_cli.supervisor import Supervisor
        folder, run_dir = Path(sys.argv[2]), RunDir(Path(sys.argv[2]) / "run")
        with run_dir.lock():
            specs = [spec(name, POLITE, folder) for name in ("a", "b")]
            asyncio.run(Supervisor(run_dir, specs).run())
        """
    )

    def test_leaves_no_process(self, run_dir: RunDir, tmp_path: Path) -> None:
        command = [sys.executable, "-c", self.PROGRAM, str(Path(__file__).parent), str(tmp_path)]
        with subprocess.Popen(command) as supervisor:
            deadline = time.monotonic() + WAIT_S
            while (state := run_dir.read()) is None or state.phase != "ready":
                assert time.monotonic() < deadline and supervisor.poll() is None
                time.sleep(0.02)
            assert run_dir.live() == state
            with pytest.raises(AlreadyRunningError), run_dir.lock():
                pass
            supervisor.kill()
        processes = [(service.pid, service.born) for service in state.services]
        deadline = time.monotonic() + 5
        while any(process_table.is_alive(*process) for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(process_table.is_alive(*process) for process in processes)
        assert run_dir.live() is None
        with run_dir.lock():
            assert run_dir.clean()
        assert run_dir.read() is None


class TestRunDir:
    def test_clean_kills_what_outlived_its_supervisor(self, run_dir: RunDir) -> None:
        left = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
        service = ServiceState(name="a", log="", pid=left.pid, born=process_table.birth(left.pid) or "")
        run_dir.write(MeshState(pid=1, born="another", services=[service]))
        assert run_dir.clean()
        assert left.wait(WAIT_S) == -signal.SIGKILL

    def test_clean_spares_a_recycled_pid(self, run_dir: RunDir) -> None:
        service = ServiceState(name="a", log="", pid=os.getpid(), born="an earlier process")
        run_dir.write(MeshState(pid=os.getpid(), born="an earlier process", services=[service]))
        assert run_dir.live() is None
        assert run_dir.clean()  # and this process still runs

    def test_is_for_its_owner_only(self, run_dir: RunDir) -> None:
        assert run_dir.path.stat().st_mode & 0o777 == 0o700
        assert run_dir.socket_folder().stat().st_mode & 0o777 == 0o700

    def test_long_paths_put_the_socket_elsewhere(self, tmp_path: Path) -> None:
        deep = RunDir(tmp_path / ("d" * 100))
        deep.create()
        folder = deep.socket_folder()
        try:
            assert len(str(folder / "redis.sock")) < 100
            assert folder.stat().st_mode & 0o777 == 0o700
        finally:
            folder.rmdir()


class TestRestartPolicy:
    def test_delays_double_up_to_the_most(self) -> None:
        policy = RestartPolicy(first_s=1, most_s=5, limit=4)
        delays = [policy.after_death(status=1, lived_s=1, ready=True) for _ in range(5)]
        assert delays == [1, 2, 4, 5, None]

    def test_a_steady_life_wipes_the_slate(self) -> None:
        policy = RestartPolicy(first_s=1, limit=1, steady_s=60)
        assert policy.after_death(status=1, lived_s=1, ready=True) == 1
        assert policy.after_death(status=1, lived_s=61, ready=True) == 1
        assert policy.after_death(status=1, lived_s=1, ready=True) is None

    def test_never_ready_is_given_up_sooner(self) -> None:
        policy = RestartPolicy(limit=9, first_limit=1)
        assert policy.after_death(status=1, lived_s=500, ready=False) is not None
        assert policy.after_death(status=1, lived_s=500, ready=False) is None
