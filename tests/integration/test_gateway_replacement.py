"""Requests that lose their placement: the client sees one stream, whatever happens behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp

from tests.gateway_scene import Scene, collect, failure, opened, served_text
from tests.scripted_peers import Record, Running, ScriptedWorker, ServedText
from tests.worker_process import until

LENGTH = rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def served() -> ServedText:
    return served_text()


@pytest.fixture
async def scene(served: ServedText) -> AsyncIterator[Scene]:
    async with opened(served) as scene:
        yield scene


@pytest.fixture
async def other() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("worker-2", "epoch-2")
    await worker.open()
    yield worker
    await worker.close()


async def lost(scene: Scene, count: int = 1) -> dp.LegLost:
    await scene.scheduler.changes.until(lambda: len(scene.scheduler.legs_lost) >= count)
    return scene.scheduler.legs_lost[count - 1]


async def begun(scene: Scene, ids: list[int], **fields: Any) -> tuple[Any, Record, Running]:
    """A request that runs on the first worker, with `ids` delivered."""
    call = asyncio.create_task(collect(scene.generate(**fields)))
    running = await scene.worker.sequence(0)
    running.give(ids)
    return call, await scene.scheduler.begun(), running


class TestRevoked:
    async def test_goes_on_where_it_was(self, scene: Scene, other: ScriptedWorker) -> None:
        call, record, running = await begun(scene, [5, 6], sampling=pb.SamplingParams(seed=9, temperature=0.5))
        first = running.start
        scene.scheduler.requeue(record)
        await scene.worker.changes.until(lambda: scene.worker.aborts == [(first.slot, first.lease)])
        scene.scheduler.worker = other
        scene.scheduler.place(record)
        again = await other.sequence(0)
        assert list(again.start.ids) == [*first.ids, 5, 6] and again.start.prompt_len == first.prompt_len
        assert again.start.params == first.params and again.start.lease > first.lease
        again.give([7])
        await scene.scheduler.begun()
        again.give([8], LENGTH)
        got = await call
        assert got.ids[0] == [5, 6, 7, 8] and got.finish.usage.completion_tokens == 4
        finished = await scene.scheduler.ended()
        assert (finished.lease, finished.outcome) == (again.start.lease, dp.OUTCOME_FINISHED)
        assert finished.completion_tokens == 4 and not scene.scheduler.legs_lost

    async def test_outputs_under_the_old_lease_are_dropped(self, scene: Scene, other: ScriptedWorker) -> None:
        call, record, running = await begun(scene, [5])
        scene.scheduler.worker = other
        record.lease = 0
        scene.scheduler.place(record)  # the revocation itself was lost in a break
        again = await other.sequence(0)
        running.give([66])
        again.give([6], LENGTH)
        assert (await call).ids[0] == [5, 6]

    async def test_choices_that_ended_stay_ended(self, scene: Scene, other: ScriptedWorker) -> None:
        call = asyncio.create_task(collect(scene.generate(sampling=pb.SamplingParams(n=3, temperature=0.0))))
        sequences = [await scene.worker.sequence(i) for i in range(3)]
        sequences[1].give([1, 2], LENGTH)
        sequences[2].give([3])
        record = await scene.scheduler.begun()
        await scene.worker.changes.until(lambda: sequences[1].ended)
        scene.scheduler.requeue(record)
        scene.scheduler.worker = other
        scene.scheduler.place(record)
        starts = {s.start.choice: s for s in [await other.sequence(0), await other.sequence(1)]}
        assert set(starts) == {0, 2} and list(starts[2].start.ids)[-1] == 3
        starts[0].give([4], LENGTH)
        starts[2].give([5], LENGTH)
        got = await call
        assert got.ids == {0: [4], 1: [1, 2], 2: [3, 5]}
        assert len(other.sequences) == 2

    async def test_prompt_scores_are_not_asked_for_again(self, scene: Scene, other: ScriptedWorker) -> None:
        call = asyncio.create_task(
            collect(scene.generate(tokens=pb.TokenInput(ids=[1, 2, 3]), output=pb.OutputOptions(prompt_logprobs=0)))
        )
        running = await scene.worker.sequence(0)
        scores = rp.SlotLogprobs(entry=0, prompt=True, chosen=[-1.0, -2.0])
        running.give([5], logprobs=[scores])
        record = await scene.scheduler.begun()
        scene.scheduler.requeue(record)
        scene.scheduler.worker = other
        scene.scheduler.place(record)
        again = await other.sequence(0)
        assert (running.start.params.prompt_logprobs, again.start.params.prompt_logprobs) == (0, -1)
        again.give([6], LENGTH)
        got = await call
        assert got.ids[0] == [5, 6]
        assert [len(delta.prompt_logprobs) for delta in got.deltas] == [2, 0]

    async def test_cancelled_while_it_waits(self, scene: Scene) -> None:
        call = scene.generate(request_id="waits")
        (await scene.worker.sequence(0)).give([5])
        record = await scene.scheduler.begun()
        scene.scheduler.requeue(record)
        await scene.worker.changes.until(lambda: scene.worker.aborts)
        call.cancel()
        await scene.scheduler.changes.until(lambda: scene.scheduler.withdrawals == ["waits"])

    async def test_for_good(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate()))
        (await scene.worker.sequence(0)).give([5])
        record = await scene.scheduler.begun()
        lease, request_id = record.lease, record.submit.request_id
        scene.scheduler.requeue(record)
        gone = dp.Revoked(request_id=request_id, lease=lease, reason="WORKER_LOST")
        scene.scheduler.tell(revoked=[gone])
        error, seen = await call
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert list(seen[1].delta.token_ids) == [5]


class TestLegsLost:
    async def test_worker_that_cannot_be_reached(self, served: ServedText, other: ScriptedWorker) -> None:
        async with opened(served, run_resume_grace_s=0.3) as scene:
            call, record, _running = await begun(scene, [5], sampling=pb.SamplingParams(n=1))
            lease = record.lease
            await scene.worker.close()
            told = await lost(scene)
            assert (told.request_id, told.lease, told.reason) == (record.submit.request_id, lease, "WORKER_LOST")
            await scene.scheduler.changes.until(lambda: scene.scheduler.workers_lost == ["worker-1"])
            scene.scheduler.worker = other
            scene.scheduler.place(record)
            again = await other.sequence(0)
            again.give([6], LENGTH)
            assert (await call).ids[0] == [5, 6]
            assert len(scene.scheduler.legs_lost) == 1

    async def test_one_report_for_all_choices(self, served: ServedText) -> None:
        async with opened(served) as scene:
            call = asyncio.create_task(collect(scene.generate(sampling=pb.SamplingParams(n=3, temperature=0.0))))
            sequences = [await scene.worker.sequence(i) for i in range(3)]
            died = [rp.SlotError(entry=i, reason="ENGINE_DIED") for i in range(3)]
            scene.worker.step([(s, [], rp.SEQUENCE_FINISH_ERROR) for s in sequences], errors=died)
            told = await lost(scene)
            assert told.reason == "ENGINE_DIED"
            scene.scheduler.place(await scene.scheduler.record())
            for index in range(3, 6):
                (await scene.worker.sequence(index)).give([index], LENGTH)
            assert (await call).ids == {0: [3], 1: [4], 2: [5]}
            assert len(scene.scheduler.legs_lost) == 1

    async def test_worker_of_another_boot(self, scene: Scene) -> None:
        scene.worker.refuse = grpc.StatusCode.FAILED_PRECONDITION
        call = asyncio.create_task(collect(scene.generate()))
        await lost(scene)
        scene.worker.refuse = None
        scene.scheduler.place(await scene.scheduler.record())
        (await scene.worker.sequence(0)).give([1], LENGTH)
        assert (await call).ids[0] == [1]

    async def test_session_that_the_worker_dropped(self, scene: Scene) -> None:
        call, record, _ = await begun(scene, [1])
        scene.worker.refuse = grpc.StatusCode.OUT_OF_RANGE
        await scene.worker.break_stream()
        await lost(scene)
        assert not scene.scheduler.workers_lost  # it lives
        scene.worker.refuse = None
        scene.worker.forget_steps()
        scene.scheduler.place(record)
        again = await scene.worker.sequence(1)
        assert list(again.start.ids)[-1] == 1
        again.give([2], LENGTH)
        assert (await call).ids[0] == [1, 2]
        assert scene.worker.hellos[-1].resume_after_step_seq == 0

    async def test_told_again_when_the_link_swallowed_it(self, scene: Scene) -> None:
        call, record, running = await begun(scene, [1])
        lease = record.lease
        died = rp.SlotError(entry=0, reason="ENGINE_DIED")
        scene.worker.step([(running, [], rp.SEQUENCE_FINISH_ERROR)], errors=[died])
        await lost(scene)
        record.lease, record.state = lease, "PLACED"  # as if it had not heard
        scene.scheduler.break_stream()
        assert (await lost(scene, 2)).lease == lease
        scene.scheduler.place(record)
        (await scene.worker.sequence(1)).give([2], LENGTH)
        assert (await call).ids[0] == [1, 2]


class TestNewScheduler:
    async def test_it_is_told_of_what_runs(self, scene: Scene) -> None:
        call, record, running = await begun(scene, [1, 2], request_id="runs")
        prompt = list(record.submit.prompt_ids)
        scene.scheduler.react = scene.scheduler.queue
        waits = asyncio.create_task(collect(scene.generate(request_id="waits")))
        await scene.scheduler.record(1)
        scene.scheduler.restart()
        await scene.scheduler.changes.until(lambda: set(scene.scheduler.records) == {"runs", "waits"})
        (announce,) = scene.scheduler.announces
        assert announce.submit.request_id == "runs" and list(announce.submit.prompt_ids) == prompt
        assert (announce.leg.lease, announce.leg.worker_id) == (running.start.lease, "worker-1")
        assert announce.started and announce.submit.delivered_tokens == 2
        # gRPC rounds a timeout of 30 s up to tenths of a second on its way.
        assert 0 < announce.submit.deadline_ms <= 30_100 and not announce.submit.queue_timeout_ms
        running.give([3], LENGTH)
        assert (await call).ids[0] == [1, 2, 3]
        scene.scheduler.place(scene.scheduler.records["waits"])
        (await scene.worker.sequence(1)).give([4], LENGTH)
        assert (await waits).ids[0] == [4]
        assert (await scene.scheduler.ended(0)).outcome == dp.OUTCOME_FINISHED

    async def test_what_ended_meanwhile_is_told_with_its_end(self, scene: Scene) -> None:
        call, _, running = await begun(scene, [1], request_id="runs")
        scene.scheduler.restart()
        # What is written on the old stream still is for a scheduler with a journal to ask about; this one has none.
        await until(lambda: not scene.gateway.ready)
        running.give([2], LENGTH)
        assert (await call).ids[0] == [1, 2]
        finished = await scene.scheduler.ended()
        assert (finished.request_id, finished.lease) == ("runs", running.start.lease)

    async def test_what_waits_for_its_next_placement(self, scene: Scene) -> None:
        call, record, running = await begun(scene, [1], request_id="runs")
        scene.scheduler.requeue(record)
        await scene.worker.changes.until(lambda: scene.worker.aborts)
        scene.scheduler.restart()
        assert (await lost(scene)).lease == running.start.lease
        assert [a.submit.request_id for a in scene.scheduler.announces] == ["runs"]
        scene.scheduler.place(await scene.scheduler.record())
        (await scene.worker.sequence(1)).give([2], LENGTH)
        assert (await call).ids[0] == [1, 2]
