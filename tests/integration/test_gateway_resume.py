"""One gateway between real sockets and a real Redis: clients that leave and come back, and what they are shown when."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.api_keys import digest_of, draw_key

from tests.gateway_scene import Scene, collect, failure, first_delta, opened, served_text
from tests.redis_server import RedisServer, running_redis
from tests.scripted_peers import ServedText

DETACH = {"on_disconnect": pb.ON_DISCONNECT_DETACH}
SYNC = {"durability": pb.DURABILITY_SYNC}
LENGTH = rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def served() -> ServedText:
    return served_text()


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with running_redis() as running:
        yield running


@pytest.fixture
async def scene(served: ServedText, redis: RedisServer) -> AsyncIterator[Scene]:
    async with opened(served, redis_url=redis.url, redis_timeout_s=0.5) as scene:
        yield scene


def resume(scene: Scene, request_id: str, cursor: Sequence[int] = (), **options: Any) -> Any:
    return scene.stub.Resume(pb.ResumeRequest(request_id=request_id, cursor=cursor), timeout=30, **options)


async def read_on(call: Any) -> list[pb.GenerateResponse]:
    """What is left of a call that `read` was used on."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


class TestDetached:
    async def test_it_runs_on_and_is_taken_up_at_the_cursor(self, scene: Scene) -> None:
        whole = collect(scene.generate(request_id="undisturbed"))
        task = asyncio.create_task(whole)
        (await scene.worker.sequence(0)).give([5, 6, 7, 8, 9], LENGTH)
        due = await task
        call = scene.generate(request_id="r", **DETACH)
        running = await scene.worker.sequence(1)
        running.give([5, 6])
        assert list((await first_delta(call)).token_ids) == [5, 6]
        call.cancel()
        running.give([7])
        again = resume(scene, "r", [1])
        rest = asyncio.create_task(collect(again))
        running.give([8, 9], LENGTH)
        got = await rest
        assert got.ids == {0: [6, 7, 8, 9]}
        assert due.texts[0].endswith(got.texts[0]) and got.finish.usage.completion_tokens == 5
        assert got.accepted.request_id == "r" and not scene.worker.aborts

    async def test_nobody_comes_back(self, scene: Scene) -> None:
        ttl = Duration(nanos=200_000_000)
        call = scene.generate(request_id="r", detach_ttl=ttl, **DETACH)
        running = await scene.worker.sequence(0)
        running.give([5])
        await first_delta(call)
        call.cancel()
        await scene.worker.changes.until(lambda: scene.worker.aborts == [(running.start.slot, running.start.lease)])
        assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
        error, seen = await failure(resume(scene, "r"))
        assert error.reason == "CANCELLED" and error.metadata["ended"] == "true"
        assert [list(e.delta.token_ids) for e in seen if e.HasField("delta")] == [[5]]

    async def test_without_being_asked_for_it_ends_with_its_client(self, scene: Scene) -> None:
        call = scene.generate(request_id="r")
        running = await scene.worker.sequence(0)
        running.give([5])
        await first_delta(call)
        call.cancel()
        await scene.worker.changes.until(lambda: scene.worker.aborts == [(running.start.slot, running.start.lease)])

    async def test_the_earlier_client_is_told(self, scene: Scene) -> None:
        earlier = asyncio.create_task(failure(scene.generate(request_id="r")))
        running = await scene.worker.sequence(0)
        running.give([5])
        await scene.scheduler.begun()
        later = asyncio.create_task(collect(resume(scene, "r")))
        error, _ = await earlier
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "RESUMED_ELSEWHERE")
        running.give([6], LENGTH)
        assert (await later).ids == {0: [5, 6]}
        assert not scene.worker.aborts  # the one that was ended is not the one that left

    async def test_a_ttl_is_for_detached_ones(self, scene: Scene) -> None:
        error, _ = await failure(scene.generate(detach_ttl=Duration(seconds=5)))
        assert (error.reason, error.field) == ("INVALID_ARGUMENT", "detach_ttl")
        for seconds in (0, -1, 3601):
            error, _ = await failure(scene.generate(detach_ttl=Duration(seconds=seconds), **DETACH))
            assert (error.reason, error.field) == ("INVALID_ARGUMENT", "detach_ttl")

    async def test_a_gateway_that_leaves_leaves_it_to_others(self, served: ServedText, redis: RedisServer) -> None:
        async with opened(served, redis_url=redis.url, drain_timeout_s=0.5) as scene:
            call = asyncio.create_task(failure(scene.generate(request_id="r")))
            running = await scene.worker.sequence(0)
            running.give([5, 6])
            record = await scene.scheduler.begun()
            await scene.gateway.drain()
            error, seen = await call
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert [list(e.delta.token_ids) for e in seen if e.HasField("delta")] == [[5, 6]]
            assert not record.finished  # it is nobody's now, and not ended
        async with opened(served, redis_url=redis.url) as scene:
            rest = asyncio.create_task(collect(resume(scene, "r", [1])))
            running = await scene.worker.sequence(0)
            assert list(running.start.ids)[-2:] == [5, 6] and len(running.start.ids) == running.start.prompt_len + 2
            running.give([7], LENGTH)
            assert (await rest).ids == {0: [6, 7]}
            takeover = scene.scheduler.takeovers[0]
            assert (takeover.submit.request_id, takeover.owner_epoch) == ("r", 2)


class TestEnded:
    async def test_all_of_it_again_from_any_cursor(self, scene: Scene) -> None:
        task = asyncio.create_task(collect(scene.generate(request_id="r", sampling=pb.SamplingParams(n=2))))
        first, second = await scene.worker.sequence(0), await scene.worker.sequence(1)
        first.give([5, 6, 7], LENGTH)
        second.give([8], LENGTH)
        due = await task
        assert due.finish.durable
        for cursor, ids in (((), [[5, 6, 7], [8]]), ((2,), [[7], [8]]), ((3, 1), [[], []]), ((0, 1), [[5, 6, 7], []])):
            got = await collect(resume(scene, "r", cursor))
            assert [got.ids.get(0, []), got.ids.get(1, [])] == ids
            assert got.finish == due.finish
            assert all(due.texts[choice].endswith(text) for choice, text in got.texts.items())

    async def test_a_cursor_that_is_ahead(self, scene: Scene) -> None:
        task = asyncio.create_task(collect(scene.generate(request_id="r")))
        (await scene.worker.sequence(0)).give([5, 6], LENGTH)
        await task
        for cursor in ([3], [1, 1], [2**32 - 1]):
            error, seen = await failure(resume(scene, "r", cursor))
            assert (error.code, error.reason, seen) == (grpc.StatusCode.ABORTED, "LEDGER_BEHIND", [])
            assert error.metadata["have"] == "2"

    async def test_nobody_knows_it(self, scene: Scene) -> None:
        error, _ = await failure(resume(scene, "nobody"))
        assert (error.code, error.reason, error.field) == (
            grpc.StatusCode.NOT_FOUND,
            "REQUEST_NOT_FOUND",
            "request_id",
        )
        for none, reason in (("", "INVALID_ARGUMENT"), ("a{b", "REQUEST_NOT_FOUND"), ("x" * 300, "REQUEST_NOT_FOUND")):
            error, _ = await failure(resume(scene, none))
            assert (error.reason, error.field) == (reason, "request_id")


class TestDurability:
    async def test_sync_shows_what_the_ledger_has(self, scene: Scene, redis: RedisServer) -> None:
        call = scene.generate(request_id="r", **SYNC)
        running = await scene.worker.sequence(0)
        running.give([5])
        assert list((await first_delta(call)).token_ids) == [5]
        other = scene.generate(request_id="other")
        beside = await scene.worker.sequence(1)
        redis.signal(signal.SIGSTOP)
        try:
            running.give([6])
            reading = asyncio.create_task(first_delta(call))
            beside.give([9], LENGTH)
            await first_delta(other)  # it came by the same link, later
            assert not (await asyncio.wait({reading}, timeout=0.3))[0]
        finally:
            redis.signal(signal.SIGCONT)
        assert list((await reading).token_ids) == [6]
        running.give([7], LENGTH)
        events = await read_on(call)
        assert events[-1].finish.durable

    async def test_async_waits_for_nobody_and_says_so(self, scene: Scene, redis: RedisServer) -> None:
        call = scene.generate(request_id="r")
        running = await scene.worker.sequence(0)
        running.give([5])
        assert list((await first_delta(call)).token_ids) == [5]
        redis.signal(signal.SIGSTOP)
        try:
            running.give([6], LENGTH)
            events = await read_on(call)
            assert list(events[0].delta.token_ids) == [6]
            assert not events[-1].finish.durable
        finally:
            redis.signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while True:
                try:
                    got = await collect(resume(scene, "r"))
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)  # not written yet
        assert got.ids == {0: [5, 6]} and got.finish.durable

    async def test_without_a_ledger(self, served: ServedText) -> None:
        async with opened(served) as scene:
            error, _ = await failure(scene.generate(**SYNC))
            assert (error.code, error.reason, error.field) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "LEDGER_DISABLED",
                "durability",
            )
            error, _ = await failure(resume(scene, "r"))
            assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEDGER_DISABLED")
            call = scene.generate(request_id="r", **DETACH)  # within one gateway it needs none
            running = await scene.worker.sequence(0)
            running.give([5])
            await first_delta(call)
            call.cancel()
            again = resume(scene, "r", [1])
            assert (await again.read()).WhichOneof("event") == "accepted"  # it is taken up while it lives
            running.give([6], LENGTH)
            events = await read_on(again)
            assert [list(e.delta.token_ids) for e in events[:-1]] == [[6]] and not events[-1].finish.durable


async def test_tenants_resume_their_own(served: ServedText, redis: RedisServer, tmp_path: Path) -> None:
    keys = {"acme": draw_key(), "beta": draw_key()}
    tables = "".join(f'[tenants.{name}]\nkey_digests = ["{digest_of(key)}"]\n' for name, key in keys.items())
    (tmp_path / "tenants.toml").write_text(tables)
    acme, beta = ((("x-api-key", key),) for key in keys.values())
    async with opened(served, redis_url=redis.url, tenants_file=str(tmp_path / "tenants.toml")) as scene:
        asked = pb.GenerateRequest(model=served.id, text=pb.TextInput(prompt="Hi"), request_id="r")
        task = asyncio.create_task(collect(scene.stub.Generate(asked, metadata=acme)))
        running = await scene.worker.sequence(0)
        running.give([5])
        await scene.scheduler.begun()
        for finish in ([], [LENGTH]):  # while it lives, and from the ledger
            error, _ = await failure(resume(scene, "r", metadata=beta))
            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
            if not finish:
                running.give([6], LENGTH)
                await task
        assert (await collect(resume(scene, "r", [1], metadata=acme))).ids == {0: [6]}
