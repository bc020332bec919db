"""The Run link: what a gateway gets, whatever happens to streams, to other gateways and to the engine."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import pytest
from lmesh.worker.v1 import run_pb2
from lmesh_chassis.errors import from_rpc_error

from tests.worker_process import ABORTED, ERROR, LENGTH, Gateway, running_worker, start, until


async def status_of(gateway: Gateway) -> tuple[grpc.StatusCode, str]:
    """Reads to the stream's end and returns its code and reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await gateway.read() is not None:
            pass
    error = from_rpc_error(caught.value)
    return error.code, error.reason


async def refusal(gateway: Gateway, epoch: str, **hello: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.attach(epoch, **hello)
    error = from_rpc_error(caught.value)
    return error.code, error.reason


async def test_sequences_of_two_gateways_get_their_own_ids() -> None:
    async with running_worker() as running:
        one, two = await running.attached("one"), await running.attached("two")
        asked = start(1, ids=[40, 41], max_tokens=3, params={"logprobs": 0})
        await one.start(asked, start(2, ids=[500], max_tokens=40))
        await two.start(start(1, ids=[7, 8], max_tokens=4))  # the same slot on another link is another sequence
        await asyncio.gather(one.read_until_finished((1, 101), (2, 102)), two.read_until_finished((1, 101)))
    first = one.received[1, 101]
    assert (first.ids, first.start_pos, first.finish) == ([42, 43, 44], 2, LENGTH)
    assert one.received[2, 102].ids == list(range(501, 541))
    assert two.received[1, 101].ids == [9, 10, 11, 12]
    assert first.timing.cached_tokens == 4
    assert (first.logprobs, one.received[2, 102].logprobs) == ([-0.5] * 3, [])
    for gateway in (one, two):  # contiguous from 1: one message a step at most
        assert gateway.step_seqs == list(range(1, len(gateway.step_seqs) + 1))
    assert len(two.step_seqs) == 4


async def test_an_abort_ends_its_sequence_only_under_its_own_lease() -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=50), start(2, "count", max_tokens=50))
        await gateway.read_until_finished((2, 102))
        await gateway.abort(1, 999)
        await gateway.start(start(3))
        await gateway.read_until_finished((3, 103))
        assert gateway.received[1, 101].finish == 0
        await gateway.abort(1, 101)
        await gateway.read_until_finished((1, 101))
        assert gateway.received[1, 101].finish == ABORTED
        await until(lambda: running.metric("lmesh:kv_blocks_used") == 0)
        await gateway.start(start(1, lease=7))  # the slot is free again
        await gateway.read_until_finished((1, 7))
    assert gateway.received[1, 7].finish == LENGTH


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (start(2, ids=[1] * 513), "PROMPT_TOO_LONG"),
        (start(2, ids=[1000]), "INVALID_START"),
        (start(2, prompt_len=4), "INVALID_START"),
        (start(2, params={"top_p": 0.0}), "INVALID_START"),
        (start(2, params={"temperature": float("nan")}), "INVALID_START"),
        (start(2, max_tokens=0), "INVALID_START"),
        (start(1, lease=5), "SLOT_IN_USE"),
    ],
)
async def test_a_faulty_start_ends_alone(faulty: run_pb2.Start, reason: str) -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, "count", max_tokens=30), faulty)
        await gateway.read_until_finished((1, 101), (faulty.slot, faulty.lease))
    refused = gateway.received[faulty.slot, faulty.lease]
    assert (refused.finish, refused.reason, refused.ids) == (ERROR, reason, [])
    assert (gateway.received[1, 101].finish, len(gateway.received[1, 101].ids)) == (LENGTH, 30)


async def test_a_broken_stream_resumes_without_a_gap() -> None:
    async with running_worker() as running:
        first = await running.attached()
        await first.start(start(1, max_tokens=400))
        while len(first.step_seqs) < 10:
            await first.read()
        await first.ack(4)
        first.call.cancel()
        second = running.gateway()
        hello = await second.attach(running.epoch, resume_after=8)  # it had processed only eight of them
        assert hello.oldest_step_seq == 9
        await second.read_until_finished((1, 101))
    assert second.step_seqs[0] == 9
    assert second.step_seqs == list(range(9, 401))
    assert first.received[1, 101].ids[:8] + second.received[1, 101].ids == [(4 + i) % 1000 for i in range(400)]


@pytest.mark.parametrize("takes_later", [True, False])
async def test_what_gathered_comes_together_to_a_gateway_that_takes_it_so(takes_later: bool) -> None:
    async with running_worker() as running:
        first = await running.attached()
        # A session without a sequence is not kept when its gateway leaves, which a cancelled call may look like.
        await first.start(start(2, "stall"), start(1, max_tokens=400))
        await first.read_until_finished((1, 101))
        first.call.cancel()
        second = running.gateway()
        await second.attach(running.epoch, resume_after=8, takes_later=takes_later)  # 392 steps wait for it
        await second.read_until_finished((1, 101))
        messages = second.messages
        await second.abort(2, 102)
    assert second.step_seqs[:392] == list(range(9, 401))
    assert second.received[1, 101].ids == first.received[1, 101].ids[8:]
    assert messages == (1 if takes_later else 392)


async def test_a_gateway_that_does_not_come_back_loses_its_sequences() -> None:
    async with running_worker(run_grace_s=0.05) as running:
        gone, other = await running.attached("gone"), await running.attached("other")
        await gone.start(start(1, "hold", max_tokens=50))
        await gone.read()
        assert running.worker.sessions.live == 1
        gone.call.cancel()
        await until(lambda: running.worker.sessions.live == 0)
        await until(lambda: running.metric("lmesh:kv_blocks_used") == 0)
        late = running.gateway()
        assert await refusal(late, running.epoch, gateway_id="gone", resume_after=1) == (
            grpc.StatusCode.OUT_OF_RANGE,
            "REPLAY_GONE",
        )
        anew = running.gateway()
        await anew.attach(running.epoch, "gone")
        await asyncio.gather(anew.start(start(1)), other.start(start(1)))
        await asyncio.gather(anew.read_until_finished((1, 101)), other.read_until_finished((1, 101)))
    assert anew.step_seqs[0] == 1


async def test_what_was_acknowledged_cannot_be_resumed() -> None:
    async with running_worker() as running:
        first = await running.attached()
        await first.start(start(1, max_tokens=20))
        await first.read_until_finished((1, 101))
        await first.ack(15)
        # Once the next step comes, the worker has seen the acknowledgement before it.
        await first.start(start(2, max_tokens=1))
        await first.read_until_finished((2, 102))
        first.call.cancel()
        late = running.gateway()
        assert (await refusal(late, running.epoch, resume_after=3))[1] == "REPLAY_GONE"


async def test_a_newer_stream_of_a_gateway_takes_over() -> None:
    async with running_worker() as running:
        old = await running.attached()
        await old.start(start(1, "hold", max_tokens=50))
        await old.read()
        new = running.gateway()
        await new.attach(running.epoch, resume_after=1)
        assert await status_of(old) == (grpc.StatusCode.ABORTED, "SUPERSEDED")
        await new.abort(1, 101)
        await new.read_until_finished((1, 101))


async def test_hellos_that_are_refused() -> None:
    async with running_worker() as running:
        assert await refusal(running.gateway(), "an-older-boot") == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "STALE_EPOCH",
        )
        silent = running.gateway()
        await silent.start(start(1))
        assert await status_of(silent) == (grpc.StatusCode.INVALID_ARGUMENT, "HELLO_REQUIRED")
        twice = await running.attached()
        await twice.call.write(run_pb2.RunRequest(hello=run_pb2.RunHello(gateway_id="g", epoch=running.epoch)))
        assert await status_of(twice) == (grpc.StatusCode.INVALID_ARGUMENT, "HELLO_REQUIRED")


async def test_a_slow_gateway_is_dropped_and_holds_nobody_up() -> None:
    async with running_worker(max_unacked_bytes=2**20) as running:
        slow, quick = await running.attached("slow"), await running.attached("quick")
        await slow.start(start(1, "flood", max_tokens=2**31))
        await quick.start(start(1, max_tokens=300))
        await quick.read_until_finished((1, 101))
        await until(lambda: running.worker.sessions.slow_consumers == 1)
        await until(lambda: running.metric("lmesh:kv_blocks_used") == 0)  # its sequence was aborted in the engine
        await quick.start(start(2))
        await quick.read_until_finished((2, 102))
        assert await status_of(slow) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        assert running.metric("lmesh:slow_consumers_total") == 1
    assert quick.received[1, 101].ids == [(4 + i) % 1000 for i in range(300)]


async def test_a_gateway_that_acknowledges_may_receive_without_end() -> None:
    async with running_worker(max_unacked_steps=100) as running:
        gateway = await running.attached()
        await gateway.start(start(1, max_tokens=300))
        while not gateway.received[1, 101].finish:
            outputs = await gateway.read()
            assert outputs is not None
            await gateway.ack(outputs.step_seq)
    assert len(gateway.received[1, 101].ids) == 300


async def test_the_engines_death_ends_every_sequence_and_the_worker() -> None:
    async with running_worker() as running:
        one, two = await running.attached("one"), await running.attached("two")
        await one.start(start(1, "hold", max_tokens=50))
        await two.start(start(4, "hold", max_tokens=50), start(5, "hold", max_tokens=50))
        await one.read()
        await two.read()
        os.kill(running.engine.pid, signal.SIGKILL)
        await asyncio.gather(one.read_until_finished((1, 101)), two.read_until_finished((4, 104), (5, 105)))
        ended = [one.received[1, 101], two.received[4, 104], two.received[5, 105]]
        assert {(e.finish, e.reason) for e in ended} == {(ERROR, "ENGINE_DIED")}
        assert await asyncio.wait_for(running.done, 30) == 1
        assert not running.worker.server.serving()
        assert running.scheduler.requests[-1].draining
