"""A service process from its first line to its exit status: event loop, signals, death with its parent."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

_PR_SET_PDEATHSIG = 1
FORCED_EXIT = 130


class Shutdown:
    """Set by SIGTERM or SIGINT; the service then drains and returns."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def request(self) -> None:
        """Asks for the shutdown; a second call by signal ends the process at once."""
        self.event.set()

    @property
    def requested(self) -> bool:
        """Whether the shutdown was asked for."""
        return self.event.is_set()

    async def wait(self) -> None:
        """Returns once the shutdown was asked for."""
        await self.event.wait()


def run(main: Callable[[Shutdown], Awaitable[int | None]]) -> int:
    """Runs `main` on uvloop until it returns; its value (None is 0) is the process's exit status.

    The first SIGTERM or SIGINT sets the Shutdown, the second ends the process on the spot.
    """
    die_with_parent()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_supervised(main))


def settle() -> None:
    """For a service that has just become ready: what lives now lives as long as the process.

    The collector need not look at it again and again: a full collection of a gateway's modules and tokenizers stopped
    all its streams for 40 to 80 ms, now and then.
    """
    if gc.get_freeze_count():
        return  # ready again: what runs meanwhile is not for life
    gc.collect()
    gc.freeze()


async def _supervised(main: Callable[[Shutdown], Awaitable[int | None]]) -> int:
    shutdown = Shutdown()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, shutdown)
    return await main(shutdown) or 0


def _on_signal(shutdown: Shutdown) -> None:
    if shutdown.requested:
        os._exit(FORCED_EXIT)  # asked twice: no cleanup that could hang
    shutdown.request()


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies, if LMESH_DIE_WITH_PARENT is set (Linux only).

    Its value is 1, or the parent's pid, with which a parent that died before this call is noticed too.
    """
    wanted = os.environ.get("LMESH_DIE_WITH_PARENT", "")
    if wanted in ("", "0") or not sys.platform.startswith("linux"):
        return
    arm_parent_death_signal()
    if wanted.isdigit() and int(wanted) > 1 and os.getppid() != int(wanted):
        os._exit(FORCED_EXIT)


def arm_parent_death_signal(number: int = signal.SIGKILL) -> None:
    """PR_SET_PDEATHSIG on the calling process; it fires when the thread that started the process ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
