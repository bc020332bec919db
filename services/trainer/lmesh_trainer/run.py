"""One lease of one job on this trainer: its process, what it reports, and what becomes of what it made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import aclosing
from pathlib import Path

from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.folders import put_folder

from lmesh_trainer.errors import JobError, unforeseen
from lmesh_trainer.events import Ended, Outcome, Published, Reported, Stored
from lmesh_trainer.job_folders import note_begun, note_ended
from lmesh_trainer.job_process import JobProcess
from lmesh_trainer.manifest_file import read_manifest
from lmesh_trainer.messages import Wish
from lmesh_trainer.orders import StartOrder
from lmesh_trainer.outbox import Outbox
from lmesh_trainer.sources import Bench
from lmesh_trainer.spans import RunSpan
from lmesh_trainer.spec import JobSpec

_log = logging.getLogger(__name__)


class Run:
    """`run` is its whole life; cancelling it kills the process. The last report is always a job's end, but for runs
    that stop because this trainer leaves: they say nothing, and the scheduler gives the job to another one.
    """

    def __init__(self, order: StartOrder, bench: Bench, outbox: Outbox) -> None:
        self.job_id, self.lease = order.job_id, order.lease
        self.outbox = outbox
        self._order, self._bench = order, bench
        self._process: JobProcess | None = None
        self._wishes: list[Wish] = []
        self._leaving = False
        self._left = asyncio.Event()
        self._span: RunSpan | None = None

    def ask(self, wish: Wish) -> None:
        """Asks the job to stop or to be cancelled, as a client wants it."""
        self._wishes.append(wish)
        if self._process is not None:
            self._process.ask(wish)

    def leave(self) -> None:
        """Asks the job to save a checkpoint and stop, because this trainer leaves; where it does not lead, the run
        ends here at once, and goes on from its last checkpoint.
        """
        self._leaving = True
        self._left.set()
        if self._process is not None:
            self._process.ask(Wish.STOP)

    async def run(self) -> None:
        """Runs the job to its end, and says how that was."""
        if not self._order.leads:
            await self._follow()
            return
        self._span = RunSpan(self.job_id, self.lease)
        try:
            await self._run()
        finally:
            self._span.end()

    async def _run(self) -> None:
        ended = await self._end()
        extra = {"job": self.job_id, "lease": self.lease, "outcome": ended.outcome.value, "reason": ended.reason}
        if ended.outcome is Outcome.STOPPED and self._leaving and not self._wishes:
            _log.info("the run is left to another trainer", extra=extra)
            return
        _log.info("the run ended", extra=extra)
        with contextlib.suppress(JobError):  # a job that cannot have a folder
            note_ended(self._bench.folder(self.job_id), ended)
        self._tell(ended)

    async def _follow(self) -> None:
        """Says a failure; anything else is node 0's to say, and this is held until the scheduler drops it."""
        end, left = asyncio.create_task(self._end()), asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait({end, left}, return_when=asyncio.FIRST_COMPLETED)
            if end.done() and end.result().outcome is Outcome.FAILED:
                self._tell(end.result())
            else:
                await left
        finally:
            end.cancel()
            left.cancel()
            await asyncio.gather(end, left, return_exceptions=True)

    async def _end(self) -> Ended:
        try:
            return await self._work()
        except (JobError, ArtifactError) as error:
            return Ended(outcome=Outcome.FAILED, reason=error.reason, message=error.message)
        except Exception as error:  # noqa: BLE001 - this run's edge: the scheduler is told, whatever it was
            _log.exception("the run failed", extra={"job": self.job_id})
            told = unforeseen(error)
            return Ended(outcome=Outcome.FAILED, reason=told.reason, message=told.message)

    async def _work(self) -> Ended:
        if Wish.CANCEL in self._wishes:
            return Ended(outcome=Outcome.CANCELLED)
        if self._wishes or self._leaving:  # asked before there was a process: its checkpoints are as they were
            return Ended(outcome=Outcome.STOPPED)
        folder = self._bench.folder(self.job_id)
        note_begun(folder)
        if self._order.gang is not None and not self._order.leads:
            folder = folder / "nodes" / str(self._order.gang.node)  # where trainers share the jobs' folder
        spec = await asyncio.to_thread(self._bench.prepare, self._order.told, folder)
        self._process = JobProcess(folder, world=self._bench.world, gang=self._order.gang)
        for wish in [*self._wishes, *([Wish.STOP] if self._leaving else [])]:
            self._process.ask(wish)
        async with aclosing(self._process.events(spec)) as heard:
            async for event in heard:
                if isinstance(event, Ended):
                    return event
                if isinstance(event, Published):
                    self._tell(await asyncio.to_thread(self._store, event, spec))
                else:
                    self._tell(event)
        raise AssertionError("a job's events end with Ended")

    def _store(self, made: Published, spec: JobSpec) -> Stored:
        folder = Path(made.folder)
        artifact = put_folder(self._bench.store, folder)
        digest = made.digest if spec.makes_adapter else ""
        return Stored(artifact=artifact, adapter_digest=digest, manifest=read_manifest(folder))

    def _tell(self, event: Reported) -> None:
        if self._span is not None:
            self._span.take(event)
        self.outbox.add(event)
