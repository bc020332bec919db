"""The gateway between real sockets: how requests end, what broken links cost, slow clients, the drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.errors import from_rpc_error

from tests.gateway_scene import Scene, collect, failure, first_delta, opened, request, served_text
from tests.scripted_peers import Record, ServedText

LENGTH = rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def served() -> ServedText:
    return served_text()


@pytest.fixture
async def scene(served: ServedText) -> AsyncIterator[Scene]:
    async with opened(served) as scene:
        yield scene


class TestEndings:
    async def test_cancel_by_id(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate(request_id="to-cancel")))
        running = await scene.worker.sequence(0)
        running.give([5])
        await scene.scheduler.changes.until(lambda: scene.scheduler.records["to-cancel"].started)
        await scene.stub.Cancel(pb.CancelRequest(request_id="to-cancel"))
        error, seen = await call
        assert (error.code, error.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
        assert [e.WhichOneof("event") for e in seen] == ["accepted", "delta"]  # what came before stays valid
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
        await scene.worker.changes.until(lambda: scene.worker.aborts)
        with pytest.raises(grpc.aio.AioRpcError) as again:
            await scene.stub.Cancel(pb.CancelRequest(request_id="to-cancel"))
        assert again.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await scene.stub.Cancel(pb.CancelRequest(request_id="nobody"))
        assert from_rpc_error(unknown.value).reason == "REQUEST_NOT_FOUND"

    async def test_cancel_of_another_gateways_request_goes_up(self, scene: Scene) -> None:
        scene.scheduler.records["elsewhere"] = Record(dp.Submit(request_id="elsewhere"))
        await scene.stub.Cancel(pb.CancelRequest(request_id="elsewhere"))
        await scene.scheduler.changes.until(lambda: scene.scheduler.cancels == ["elsewhere"])

    async def test_revoked_by_another_gateways_cancel(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate()))
        running = await scene.worker.sequence(0)
        record = await scene.scheduler.record()
        revoked = dp.Revoked(request_id=record.submit.request_id, lease=record.lease, reason="CANCELLED")
        scene.scheduler.tell(revoked=[revoked])
        assert (await call)[0].code is grpc.StatusCode.CANCELLED
        await scene.worker.changes.until(lambda: scene.worker.aborts == [(running.start.slot, running.start.lease)])
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED

    async def test_a_client_that_goes_away_aborts_its_slots(self, scene: Scene) -> None:
        call = scene.generate(sampling=pb.SamplingParams(n=2))
        running = [await scene.worker.sequence(i) for i in range(2)]
        running[0].give([5])
        await first_delta(call)
        call.cancel()
        await scene.worker.changes.until(lambda: len(scene.worker.aborts) == 2)
        assert {slot for slot, _ in scene.worker.aborts} == {r.start.slot for r in running}
        finished = await scene.scheduler.ended()
        assert (finished.outcome, finished.completion_tokens) == (dp.OUTCOME_CANCELLED, 1)

    async def test_a_client_that_goes_away_while_queued(self, scene: Scene) -> None:
        scene.scheduler.react = scene.scheduler.queue
        call = scene.generate()
        assert (await call.read()).WhichOneof("event") == "accepted"
        record = await scene.scheduler.record()
        call.cancel()
        await scene.scheduler.changes.until(lambda: scene.scheduler.withdrawals == [record.submit.request_id])
        scene.scheduler.place(record)  # the placement crosses the withdrawal
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
        assert not scene.worker.sequences

    async def test_expired_while_running(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate()))
        await scene.worker.sequence(0)
        record = await scene.scheduler.record()
        scene.scheduler.tell(expired=[dp.Expired(request_id=record.submit.request_id, queued=False)])
        error, _ = await call
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        await scene.worker.changes.until(lambda: scene.worker.aborts)
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_EXPIRED

    async def test_expired_in_the_queue(self, scene: Scene) -> None:
        scene.scheduler.react = scene.scheduler.queue
        call = asyncio.create_task(failure(scene.generate(queue_timeout=Duration(seconds=3))))
        record = await scene.scheduler.record()
        assert 2000 < record.submit.queue_timeout_ms <= 3000
        scene.scheduler.tell(expired=[dp.Expired(request_id=record.submit.request_id, queued=True)])
        error, _ = await call
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT")
        assert not record.finished  # it never was placed

    async def test_the_clients_deadline_is_the_requests(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate(timeout=0.6)))
        await scene.worker.sequence(0)
        assert (await scene.scheduler.record()).submit.deadline_ms <= 600
        assert (await call)[0].code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_EXPIRED
        await scene.worker.changes.until(lambda: scene.worker.aborts)

    async def test_refused(self, scene: Scene) -> None:
        def refuse(record: Any) -> None:
            refused = dp.Refused(
                request_id=record.submit.request_id, reason="QUEUE_FULL", message="full", retry_after_ms=1500
            )
            scene.scheduler.tell(refused=[refused])

        scene.scheduler.react = refuse
        error, seen = await failure(scene.generate())
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert error.retry_after_ms == 1500 and seen == []

    async def test_worker_error_is_the_requests_alone(self, scene: Scene) -> None:
        bad = asyncio.create_task(failure(scene.generate()))
        first = await scene.worker.sequence(0)
        good = asyncio.create_task(collect(scene.generate()))
        second = await scene.worker.sequence(1)
        error = rp.SlotError(entry=0, reason="NON_FINITE_LOGITS", message="the model gave NaN")
        scene.worker.step([(first, [], rp.SEQUENCE_FINISH_ERROR), (second, [5], 0)], errors=[error])
        second.give([6], LENGTH)
        failed, _ = await bad
        assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "WORKER_FAILED")
        assert (await good).ids[0] == [5, 6]
        finished = await scene.scheduler.ended()
        assert (finished.outcome, finished.reason) == (dp.OUTCOME_FAILED, "WORKER_FAILED")


class TestLinks:
    async def test_resumed_without_lost_or_doubled_ids(self, scene: Scene) -> None:
        call = asyncio.create_task(collect(scene.generate()))
        running = await scene.worker.sequence(0)
        running.give([1, 2])
        await scene.scheduler.begun()
        await scene.worker.break_stream()
        running.give([3])  # while nobody is attached
        await scene.worker.changes.until(lambda: len(scene.worker.hellos) == 2)
        running.give([4])
        await scene.worker.break_stream()
        running.give([5], LENGTH)
        got = await call
        assert got.ids[0] == [1, 2, 3, 4, 5]
        resumed = [hello.resume_after_step_seq for hello in scene.worker.hellos]
        assert resumed[0] == 0 and resumed[1] == 1 and resumed == sorted(resumed)
        assert len(scene.worker.sequences) == 1
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_FINISHED
        assert len((await scene.scheduler.record()).finished) == 1

    async def test_a_start_that_the_break_swallowed_is_said_again(self, scene: Scene) -> None:
        warm = asyncio.create_task(collect(scene.generate()))
        (await scene.worker.sequence(0)).give([1], LENGTH)
        await warm
        scene.worker.deaf = True
        call = asyncio.create_task(collect(scene.generate()))
        await scene.scheduler.record(1)
        await scene.worker.changes.until(lambda: scene.worker.lost)
        scene.worker.deaf = False
        await scene.worker.break_stream()
        again = await scene.worker.sequence(1)
        again.give([7, 8], LENGTH)
        assert (await call).ids[0] == [7, 8]

    async def test_outputs_under_another_lease_are_dropped(self, scene: Scene) -> None:
        call = asyncio.create_task(collect(scene.generate()))
        running = await scene.worker.sequence(0)
        scene.worker.step([(running, [66, 67], 0)], lease=running.start.lease + 1)
        running.give([1], LENGTH)
        assert (await call).ids[0] == [1]

    async def test_dispatch_broken_while_running_and_queued(self, scene: Scene) -> None:
        runs = asyncio.create_task(collect(scene.generate(request_id="runs")))
        running = await scene.worker.sequence(0)
        scene.scheduler.react = scene.scheduler.queue
        waits = asyncio.create_task(collect(scene.generate(request_id="waits")))
        waiting = await scene.scheduler.record(1)
        scene.scheduler.break_stream()
        running.give([1], LENGTH)
        assert (await runs).ids[0] == [1]
        assert (await scene.scheduler.ended(0)).outcome == dp.OUTCOME_FINISHED  # told once the link is back
        scene.scheduler.place(waiting)
        (await scene.worker.sequence(1)).give([2], LENGTH)
        assert (await waits).ids[0] == [2]
        assert (await scene.scheduler.ended(1)).outcome == dp.OUTCOME_FINISHED
        assert [len(r.finished) for r in scene.scheduler.records.values()] == [1, 1]

    async def test_no_scheduler(self, scene: Scene) -> None:
        await scene.scheduler.close()
        async with asyncio.timeout(10):
            while scene.gateway.ready:  # noqa: ASYNC110 - a property, to be asked
                await asyncio.sleep(0.01)
        error, _ = await failure(scene.generate())
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SCHEDULER_UNAVAILABLE")
        assert error.retry_after_ms

    async def test_steps_are_acknowledged(self, scene: Scene) -> None:
        call = asyncio.create_task(collect(scene.generate()))
        running = await scene.worker.sequence(0)
        for token in range(40):
            running.give([token])
        await scene.worker.changes.until(lambda: scene.worker.acked >= 32)
        running.give([1], LENGTH)
        await call
        await scene.worker.changes.until(lambda: scene.worker.acked == 41)


class TestSlowReader:
    async def test_it_gets_fewer_larger_deltas_and_holds_up_nobody(self, scene: Scene) -> None:
        steps, burst = 400, 64
        # A small window makes the client's slowness felt at once; its neighbour has a connection of its own.
        options = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{scene.gateway.ports[0]}", options=options) as slow_channel:
            slow = inference_pb2_grpc.InferenceServiceStub(slow_channel).Generate(
                request(sampling=pb.SamplingParams(temperature=0.0), output=pb.OutputOptions(logprobs=0))
            )
            assert (await slow.read()).WhichOneof("event") == "accepted"
            slow_running = await scene.worker.sequence(0)
            fast = asyncio.create_task(collect(scene.generate()))
            fast_running = await scene.worker.sequence(1)
            sent: list[int] = []
            for step in range(steps):
                ids = [(step * burst + i) % 40_000 for i in range(burst)]
                sent += ids
                finish = LENGTH if step == steps - 1 else 0
                logprobs = rp.SlotLogprobs(entry=0, chosen=[-1.0] * burst)
                scene.worker.step([(slow_running, ids, finish), (fast_running, [step], finish)], logprobs=[logprobs])
            neighbour = await fast  # while the slow one has read nothing
            assert neighbour.ids[0] == list(range(steps))
            assert (await scene.scheduler.ended(0)).outcome == dp.OUTCOME_FINISHED
            got: list[int] = []
            deltas = 0
            while (event := await slow.read()) is not grpc.aio.EOF:
                if event.WhichOneof("event") == "delta":
                    deltas += 1
                    got += event.delta.token_ids
                    assert len(event.delta.logprobs) == len(event.delta.token_ids)
            assert got == sent
            assert deltas < steps


class TestDrain:
    async def test_live_streams_end_and_nothing_new_is_taken(self, served: ServedText) -> None:
        async with opened(served, drain_timeout_s=20.0, drain_linger_s=2.0) as scene:
            call = asyncio.create_task(collect(scene.generate()))
            running = await scene.worker.sequence(0)
            drained = asyncio.create_task(scene.gateway.drain())
            await asyncio.sleep(0)
            assert not scene.gateway.ready
            error, _ = await failure(scene.generate())
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            running.give([1, 2], LENGTH)
            assert (await call).ids[0] == [1, 2]
            assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_FINISHED
            await drained

    async def test_what_does_not_end_in_time_is_cancelled_where_nobody_can_resume_it(self, served: ServedText) -> None:
        async with opened(served, drain_timeout_s=0.3) as scene:
            call = asyncio.create_task(failure(scene.generate()))
            await scene.worker.sequence(0)
            await scene.gateway.drain()
            error, _ = await call
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
            assert scene.worker.aborts
