"""The runs of this trainer: one a job, each under its lease, held until the scheduler knows how it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from lmesh_trainer.events import Reported
from lmesh_trainer.metrics import Held
from lmesh_trainer.orders import Ask, StartOrder
from lmesh_trainer.outbox import Outbox
from lmesh_trainer.run import Run
from lmesh_trainer.sources import Bench

_log = logging.getLogger(__name__)


class _TellingOutbox(Outbox):
    """Tells of what there is to send."""

    def __init__(self, most_waiting: int, tell: Callable[[Reported], None]) -> None:
        super().__init__(most_waiting)
        self._tell = tell

    def add(self, event: Reported) -> None:
        super().add(event)
        self._tell(event)


class Runs:
    """Starts, asks and drops runs. Of more than `slots` the later ones wait for their turn."""

    def __init__(self, bench: Bench, *, slots: int = 1, most_waiting: int = 100_000) -> None:
        self._bench, self._most_waiting = bench, most_waiting
        self._slots = asyncio.Semaphore(slots)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of a job, the latest
        self._leaving = False
        self._working = 0  # runs that have a slot
        self.on_report: Callable[[], None] = lambda: None
        self.on_event: Callable[[str, Reported], None] = lambda job_id, event: None
        self.on_gone: Callable[[str], None] = lambda job_id: None  # a job's process is there no more

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    @property
    def live(self) -> int:
        """Runs that have not ended."""
        return sum(not task.done() for task in self._tasks.values())

    def in_hand(self) -> Held:
        """All of it, in numbers."""
        return Held(
            running=self._working,
            waiting=self.live - self._working,
            reports=sum(run.outbox.pending for run in self),
            left_out=sum(run.outbox.left_out for run in self),
        )

    def held(self) -> dict[str, int]:
        """Leases by job: of what runs, and of what ended and the scheduler has not heard all of."""
        return {run.job_id: run.lease for run in self if self._is_held(run)}

    def _is_held(self, run: Run) -> bool:
        return not self._tasks[run.job_id].done() or not run.outbox.empty

    def start(self, order: StartOrder) -> None:
        """Takes a job up. What it runs under an older lease is killed first; the same one twice is one."""
        extra = {"job": order.job_id, "lease": order.lease}
        if self._leaving:
            _log.info("this trainer leaves: the job is left to another one", extra=extra)
            return
        before = self._runs.get(order.job_id)
        if before is not None and before.lease >= order.lease:
            _log.info("a job that is here already", extra=extra)
            return
        self._forget(order.job_id)
        _log.info("a job begins", extra=extra)
        run = Run(order, self._bench, _TellingOutbox(self._most_waiting, lambda event: self._heard(order, event)))
        self._runs[order.job_id] = run
        earlier = self._tasks.get(order.job_id)
        self._tasks[order.job_id] = asyncio.create_task(self._live(run, earlier))

    def _heard(self, order: StartOrder, event: Reported) -> None:
        self.on_event(order.job_id, event)
        self.on_report()

    async def _live(self, run: Run, earlier: asyncio.Task[None] | None) -> None:
        try:
            await _gone(earlier)
            async with self._slots:
                await self._work(run)
        finally:
            self.on_report()  # a run that says nothing at its end is no longer held

    async def _work(self, run: Run) -> None:
        self._working += 1
        try:
            await run.run()
        finally:
            self._working -= 1
            self.on_gone(run.job_id)

    def ask(self, ask: Ask) -> None:
        """Passes a wish on; one for another lease is of the past."""
        run = self._runs.get(ask.job_id)
        if run is None or run.lease != ask.lease:
            return
        if ask.wish is None:
            _log.info("the run is dropped", extra={"job": ask.job_id, "lease": ask.lease})
            self._forget(ask.job_id)
        else:
            run.ask(ask.wish)

    def _forget(self, job_id: str) -> None:
        if self._runs.pop(job_id, None) is not None:
            self._tasks[job_id].cancel()

    def acked(self, job_id: str, lease: int, seq: int) -> None:
        """The scheduler has a run's reports up to `seq`."""
        run = self._runs.get(job_id)
        if run is None or run.lease != lease:
            return
        run.outbox.acked(seq)
        self.tidy()

    def tidy(self) -> None:
        """Forgets what has ended and is known to have."""
        for run in self:
            if not self._is_held(run):
                del self._runs[run.job_id]
        for job_id, task in list(self._tasks.items()):
            if task.done() and job_id not in self._runs:
                del self._tasks[job_id]

    def restart(self) -> None:
        """A new stream to the scheduler: what it has not acknowledged is sent again."""
        for run in self:
            run.outbox.restart()

    async def leave(self, timeout_s: float) -> None:
        """Stops every run with a checkpoint, to be gone on with elsewhere; those that take longer are killed."""
        self._leaving = True
        for run in self:
            run.leave()
        tasks = set(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Ends what still runs, at once."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reported(self) -> None:
        """Returns once the scheduler has every report; `timeout` it."""
        while any(not run.outbox.empty for run in self):  # noqa: ASYNC110 - acknowledgements come from outside
            await asyncio.sleep(0.01)


async def _gone(earlier: asyncio.Task[None] | None) -> None:
    """Waits until a run and its process are gone, also when the one that waits is dropped meanwhile: a third one may
    be waiting for it.
    """
    try:
        if earlier is not None:
            await asyncio.wait({earlier})
    except asyncio.CancelledError:
        if earlier is not None:
            await asyncio.wait({earlier})
        raise
