"""Questions that need a trainer's code, asked of any trainer that is there, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2 as pb

from lmesh_scheduler.adapters.publishing import base_digest_of
from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.errors import NoTrainerError, refused
from lmesh_scheduler.training.jobs import Job
from lmesh_scheduler.training.trainers import Query, Trainer, Trainers

VALIDATE_S = 600.0
EXPORT_S = 3600.0
INSPECT_S = 120.0


class Queries:
    """Owned by the event loop. `source_of` says where a served model's files are.

    All questions raise NoTrainerError, or JobRefusedError with the trainer's reason.
    """

    def __init__(self, trainers: Trainers, *, source_of: Callable[[str], str]) -> None:
        self._trainers, self._source_of = trainers, source_of
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Trainer, asyncio.Future[bytes]]] = {}

    async def validate(self, spec: pb.JobSpec) -> pb.ValidateJobResponse:
        """A dry run of a spec that is placed."""
        return (await self._ask(trainers_pb2.Query(validate=spec), VALIDATE_S)).validated

    async def inspect(self, artifact: str) -> pb.Made:
        """What an uploaded adapter is."""
        return (await self._ask(trainers_pb2.Query(inspect_artifact=artifact), INSPECT_S)).inspected

    async def export_job(self, job: Job, form: str, dtype: str) -> pb.ExportResponse:
        """What a job made, in another form."""
        order = _order(job.source, base_digest_of(job.manifest), form, dtype)
        if job.adapter_digest:
            order.adapter_artifact = job.artifact
        else:
            order.model_artifact = job.artifact
        return (await self._ask(trainers_pb2.Query(export=order), EXPORT_S)).exported

    async def export_adapter(self, entry: Published, form: str, dtype: str) -> pb.ExportResponse:
        """A published adapter, in another form."""
        order = _order(self._source_of(entry.model), entry.base_digest, form, dtype)
        order.adapter_artifact = entry.artifact
        return (await self._ask(trainers_pb2.Query(export=order), EXPORT_S)).exported

    async def _ask(self, query: trainers_pb2.Query, timeout_s: float) -> trainers_pb2.Answer:
        query.query_id = next(self._numbers)
        answer = trainers_pb2.Answer.FromString(await self._answer(query, timeout_s))
        if answer.HasField("failure"):
            raise refused(answer.failure.reason, answer.failure.message)
        return answer

    async def _answer(self, query: trainers_pb2.Query, timeout_s: float) -> bytes:
        trainer, number = self._some_trainer(), query.query_id
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (trainer, answer)
        try:
            trainer.tell(Query(number, query.SerializeToString()))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise NoTrainerError(f"trainer {trainer.hello.trainer_id} did not answer in {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def _some_trainer(self) -> Trainer:
        """An idle one first: a dry run beside a training run takes its memory and its time."""
        there = [trainer for trainer in self._trainers.all() if trainer.linked and not trainer.draining]
        if not there:
            raise NoTrainerError("no trainer has joined; start one and try again", retry_after_ms=2000)
        return min(there, key=lambda trainer: (len(trainer.runs), trainer.hello.trainer_id))

    def answered(self, number: int, answer: bytes) -> None:
        """A trainer's answer; one to a question that nobody waits for is dropped."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(answer)

    def lost(self, trainer: Trainer) -> None:
        """A link has ended: what was asked over it is not answered any more."""
        for asked, answer in list(self._waiting.values()):
            if asked is trainer and not answer.done():
                answer.set_exception(NoTrainerError(f"trainer {trainer.hello.trainer_id} left while it was asked"))


def _order(source: str, base_digest: str, form: str, dtype: str) -> trainers_pb2.ExportOrder:
    quantisation = base_digest.partition("+")[2]
    return trainers_pb2.ExportOrder(model=source, quantisation=quantisation, format=form, dtype=dtype)
