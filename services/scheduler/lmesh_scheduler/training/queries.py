"""Questions that need a trainer's code, asked of any trainer that is there, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from lmesh_scheduler.errors import NoTrainerError
from lmesh_scheduler.training.trainers import Query, Trainer, Trainers


class Queries:
    """Owned by the event loop."""

    def __init__(self, trainers: Trainers) -> None:
        self._trainers = trainers
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Trainer, asyncio.Future[bytes]]] = {}

    async def ask(self, body: Callable[[int], bytes], timeout_s: float) -> bytes:
        """The serialised Answer to a Query that `body` makes for its number. Raises NoTrainerError."""
        trainer = self._some_trainer()
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (trainer, answer)
        try:
            trainer.tell(Query(number, body(number)))
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
