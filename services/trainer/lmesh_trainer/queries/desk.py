"""The scheduler's questions: a few at once, each in a process and a folder of its own and within its time."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.folders import fetch_folder, put_folder

from lmesh_trainer.errors import JobError
from lmesh_trainer.orders import ExportOrder, InspectOrder, QueryOrder, ValidateOrder
from lmesh_trainer.queries.inquiry import inquire
from lmesh_trainer.queries.questions import (
    EXPORT_KINDS,
    Export,
    Exported,
    Inspect,
    Inspected,
    Question,
    Refused,
    Reply,
    Validate,
)
from lmesh_trainer.sources import Bench

_log = logging.getLogger(__name__)

AT_ONCE = 2
MOST_WAITING = 16  # beyond, TRAINER_BUSY
_FOLDER = ".queries"  # no job's id begins with a dot


class QueryDesk:
    """Answers queries. They belong to the stream that asked: when it breaks they end, and the asker asks again."""

    def __init__(self, bench: Bench, *, timeout_s: float) -> None:
        self._bench, self._timeout_s = bench, timeout_s
        self._free = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: deque[tuple[int, Reply]] = deque()
        self.on_answer: Callable[[], None] = lambda: None

    def ask(self, query_id: int, order: QueryOrder) -> None:
        """Takes a question; its answer comes by `next`."""
        if len(self._tasks) >= AT_ONCE + MOST_WAITING:
            self.answer_at_once(query_id, Refused(reason="TRAINER_BUSY", message="too many questions wait already"))
            return
        task = asyncio.create_task(self._answer(query_id, order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def next(self) -> tuple[int, Reply] | None:
        """An answer that is to be sent."""
        return self._answers.popleft() if self._answers else None

    def forget(self) -> None:
        """Nobody waits for answers any more."""
        self._answers.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Ends everything; returns when the processes are gone."""
        self.forget()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def sweep(self) -> None:
        """Removes what boots that were killed left behind: folders older than any question may be. Blocks."""
        place = self._bench.jobs / _FOLDER
        for folder in place.iterdir() if place.is_dir() else ():
            if time.time() - folder.stat().st_mtime > 2 * self._timeout_s:
                shutil.rmtree(folder, ignore_errors=True)

    def answer_at_once(self, query_id: int, reply: Reply) -> None:
        """Has an answer sent."""
        self._answers.append((query_id, reply))
        self.on_answer()

    async def _answer(self, query_id: int, order: QueryOrder) -> None:
        async with self._free:
            begin = time.perf_counter()
            try:
                reply = await self._reply(order)
            except (JobError, ArtifactError) as error:
                reply = Refused(reason=error.reason, message=error.message)
            except Exception as error:  # noqa: BLE001 - this query's edge: the asker is told, whatever it was
                _log.exception("the query failed")
                reply = Refused(reason="QUERY_FAILED", message=f"{type(error).__name__}: {error}")
        seconds = round(time.perf_counter() - begin, 3)
        _log.info("query answered", extra={"query": type(order).__name__, "reply": type(reply).__name__, "s": seconds})
        self.answer_at_once(query_id, reply)

    async def _reply(self, order: QueryOrder) -> Reply:
        if isinstance(order, ExportOrder) and order.format == "peft":
            return _as_it_is(order)
        place = self._bench.jobs / _FOLDER
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            question = await asyncio.to_thread(self._question, order, folder)
            reply = await inquire(question, folder, timeout_s=self._timeout_s)
            return await asyncio.to_thread(self._stored, order, folder, reply)
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))

    def _question(self, order: QueryOrder, folder: Path) -> Question:
        store = self._bench.store
        match order:
            case ValidateOrder():
                return Validate(spec=self._bench.prepare(order.told, folder))
            case InspectOrder():
                return Inspect(folder=str(fetch_folder(store, order.artifact, folder / "adapter")))
            case ExportOrder():
                return self._export(order, folder)

    def _export(self, order: ExportOrder, folder: Path) -> Question:
        """The adapter is merged into the base's weights as they are stored, also where it was trained on their NF4
        form (`quantisation`): that is what other programs load.
        """
        kind = EXPORT_KINDS.get((order.format, order.dtype))
        if kind is None:
            known = ", ".join(sorted(" ".join(key).strip() for key in EXPORT_KINDS))
            raise JobError("BAD_EXPORT", f"format and dtype must be peft or one of: {known}")
        store, source, adapter = self._bench.store, order.model, ""
        if order.model_artifact:
            source = str(fetch_folder(store, order.model_artifact, folder / "model"))
        if order.adapter_artifact:
            adapter = str(fetch_folder(store, order.adapter_artifact, folder / "adapter"))
        out = folder / "out"
        if order.format == "gguf":
            out.mkdir()
        target = out / "model.gguf" if order.format == "gguf" else out
        return Export(source=source, adapter=adapter, kind=kind, target=str(target), nf4=order.quantisation == "nf4")

    def _stored(self, order: QueryOrder, folder: Path, reply: Reply) -> Reply:
        """The answer with the artifact that belongs to it."""
        if isinstance(reply, Exported):
            return msgspec.structs.replace(reply, artifact=put_folder(self._bench.store, folder / "out"))
        if isinstance(reply, Inspected) and isinstance(order, InspectOrder):
            return msgspec.structs.replace(reply, artifact=order.artifact)
        return reply


def _as_it_is(order: ExportOrder) -> Reply:
    """An adapter's folder is in PEFT's layout already."""
    if not order.adapter_artifact:
        return Refused(reason="BAD_EXPORT", message="a full model has no adapter: take merged or gguf")
    return Exported(survival=1.0, artifact=order.adapter_artifact)
