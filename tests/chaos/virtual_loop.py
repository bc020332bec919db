"""An event loop on a clock of its own: nothing waits, time jumps to the next timer, processes can be stopped.

Every callback belongs to the process in whose context it was scheduled (`asyncio` carries contexts from callback to
task to timer by itself). A paused process's callbacks are put aside until it goes on; a killed one's never run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

WALL_AT_START = 1_700_000_000.0  # Unix seconds when the virtual clock reads 0


class Process:
    """What is killed, paused and resumed as one. `name` is for people, `boot` tells its boots apart."""

    def __init__(self, name: str, boot: int) -> None:
        self.name, self.boot = name, boot
        self.alive, self.paused = True, False
        self.held: list[asyncio.Handle] = []  # callbacks that came due while it was paused
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return f"{self.name}#{self.boot}"


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in order of time, then of scheduling. Threads run their function at once, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self.disposing = False
        self.failures: list[str] = []  # exceptions that nobody took
        self._tasks_made: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self.now

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
        task._log_destroy_pending = False  # a killed process's tasks stay pending
        self._tasks_made.append(task)
        return task

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """A thread that takes no time."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task that belongs to a process."""
        return self.create_task(coro, context=process.context)

    def resume(self, process: Process) -> None:
        """A paused process goes on with all that came due meanwhile."""
        process.paused = False
        held, process.held = process.held, []
        self._ready.extend(held)

    def run_until(self, end: float, check: Callable[[], None]) -> None:
        """Runs up to a time, with `check` after every instant in which something happened."""
        while True:
            if self._ready:
                self._run_ready()
                check()
            elif self._scheduled and self._scheduled[0]._when <= end:
                self._advance()
            else:
                self.now = max(self.now, end)
                return

    def _advance(self) -> None:
        self.now = max(self.now, self._scheduled[0]._when)
        while self._scheduled and self._scheduled[0]._when <= self.now:
            handle = heapq.heappop(self._scheduled)
            handle._scheduled = False
            self._ready.append(handle)

    def _run_ready(self) -> None:
        batch: deque[asyncio.Handle] = self._ready
        for _ in range(len(batch)):
            handle = batch.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is not None:
                if process.paused:
                    process.held.append(handle)
                    continue
                if not process.alive:
                    continue
            self.steps += 1
            handle._run()

    def dispose(self) -> None:
        """Ends every task on the spot, without a trace."""
        self.disposing = True
        for task in self._tasks_made:
            if not task.done():
                with suppress(BaseException):
                    task.get_coro().close()
        self._ready.clear()
        self._scheduled.clear()
        self.close()

    def _process_events(self, event_list: object) -> None:
        raise AssertionError("nothing waits here")

    def _write_to_self(self) -> None:
        pass


@contextmanager
def virtual_time(seed: int) -> Iterator[VirtualLoop]:
    """A running loop that is also the process's clock, and its source of randomness and of ids."""
    loop = VirtualLoop()
    ids = random.Random(seed)
    before = random.getstate()
    random.seed(seed)
    with (
        mock.patch.object(time, "monotonic", loop.time),
        mock.patch.object(time, "time", lambda: WALL_AT_START + loop.now),
        mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128), version=4)),
    ):
        asyncio.events._set_running_loop(loop)
        try:
            yield loop
        finally:
            loop.dispose()
            asyncio.events._set_running_loop(None)
            random.setstate(before)
