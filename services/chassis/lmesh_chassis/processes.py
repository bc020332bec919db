"""N copies of a service process on one port: started, restarted when they die, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence

from lmesh_chassis.backoff import Backoff
from lmesh_chassis.lifecycle import Shutdown

_log = logging.getLogger(__name__)

# A process that dies sooner than this after its start did not get going.
_STARTED_S = 5.0
_MOST_FALSE_STARTS = 5


async def run_processes(
    count: int,
    argv: Sequence[str],
    shutdown: Shutdown,
    *,
    environ: Callable[[int], Mapping[str, str]] = lambda index: {},
    stop_timeout_s: float = 35.0,
    on_exit: Callable[[int], None] = lambda pid: None,
) -> int:
    """Keeps `count` processes of `argv` running until `shutdown`; returns the exit status for the caller.

    Process i gets the caller's environment plus `environ(i)`, and dies with the caller. A dead one is started again
    after a backoff; one that keeps dying at its start ends them all with its status. On shutdown all get SIGTERM,
    and SIGKILL after `stop_timeout_s`. `on_exit(pid)` is called after each death.
    """
    watches = [
        asyncio.create_task(_keep_running(index, argv, environ(index), shutdown, stop_timeout_s, on_exit))
        for index in range(count)
    ]
    statuses = await asyncio.gather(*watches)
    return next((status for status in statuses if status != 0), 0)


async def _keep_running(
    index: int,
    argv: Sequence[str],
    extra: Mapping[str, str],
    shutdown: Shutdown,
    stop_timeout_s: float,
    on_exit: Callable[[int], None],
) -> int:
    backoff, false_starts = Backoff(first_s=0.2, most_s=5.0), 0
    loop = asyncio.get_running_loop()
    while not shutdown.requested:
        started = loop.time()
        status, pid = await _run_once(argv, extra, shutdown, stop_timeout_s)
        on_exit(pid)
        if shutdown.requested:
            return 0 if status == 0 else 1
        false_starts = false_starts + 1 if loop.time() - started < _STARTED_S else 0
        _log.error("process died", extra={"index": index, "child": pid, "status": status})
        if false_starts >= _MOST_FALSE_STARTS:
            shutdown.request()
            return status if status > 0 else 1
        if false_starts == 0:
            backoff.reset()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backoff.next_s()):
                await shutdown.wait()
    return 0


async def _run_once(
    argv: Sequence[str], extra: Mapping[str, str], shutdown: Shutdown, stop_timeout_s: float
) -> tuple[int, int]:
    environment = {**os.environ, **extra, "LMESH_DIE_WITH_PARENT": str(os.getpid())}
    process = await asyncio.create_subprocess_exec(*argv, env=environment)
    exited = asyncio.create_task(process.wait())
    asked = asyncio.create_task(shutdown.wait())
    try:
        await asyncio.wait({exited, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            _signal(process, signal.SIGTERM)
            await asyncio.wait({exited}, timeout=stop_timeout_s)
        if not exited.done():
            _log.error("process did not stop in time", extra={"child": process.pid})
    finally:
        asked.cancel()
        if process.returncode is None:
            _signal(process, signal.SIGKILL)
    return await exited, process.pid


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
