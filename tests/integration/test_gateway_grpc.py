"""The gateway between real sockets: a scripted scheduler and worker, a real gRPC client, the real tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.errors import RemoteError, from_rpc_error
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway
from lmesh_gateway.http.app import build_app
from lmesh_kernels.text.digests import text_digest
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import TextTokenizer, load_tokenizer

from tests.scripted_peers import Record, ScriptedScheduler, ScriptedWorker, ServedText

MODEL = "smollm2-135m-instruct"
SOURCE = f"packaged:{MODEL}"
STOP, LENGTH = rp.SEQUENCE_FINISH_STOP, rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def served() -> ServedText:
    return ServedText(MODEL, SOURCE, text_digest(resolve(SOURCE)))


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(resolve(SOURCE))


@dataclass
class Scene:
    """All parts of one test."""

    gateway: Gateway
    scheduler: ScriptedScheduler
    worker: ScriptedWorker
    channel: grpc.aio.Channel
    stub: Any

    def generate(self, text: str = "Hello", *, timeout: float | None = 30, **fields: Any) -> Any:
        return self.stub.Generate(request(text, **fields), timeout=timeout)


def request(text: str = "Hello", **fields: Any) -> pb.GenerateRequest:
    fields = {"sampling": pb.SamplingParams(temperature=0.0)} | fields
    if "tokens" not in fields and "chat" not in fields:
        fields["text"] = pb.TextInput(prompt=text)
    return pb.GenerateRequest(**{"model": MODEL} | fields)


def app(gateway_settings: GatewaySettings) -> Any:
    return lambda generator, directory, ready: build_app(
        generator, directory, max_body_bytes=gateway_settings.max_body_bytes, ready=ready
    )


@asynccontextmanager
async def opened(served: ServedText, **settings: Any) -> AsyncIterator[Scene]:
    worker = ScriptedWorker()
    scheduler = ScriptedScheduler(served, worker)
    await worker.open()
    await scheduler.open()
    chosen = GatewaySettings(
        **{
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "scheduler": f"127.0.0.1:{scheduler.port}",
            "drain_timeout_s": 1.0,
            "run_resume_grace_s": 5.0,
        }
        | settings
    )
    gateway = Gateway(chosen, app(chosen))
    await gateway.start()
    try:
        async with asyncio.timeout(30):
            while not gateway.ready:  # noqa: ASYNC110 - a property, to be asked
                await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.ports[0]}") as channel:
            yield Scene(gateway, scheduler, worker, channel, inference_pb2_grpc.InferenceServiceStub(channel))
    finally:
        await gateway.drain()
        await scheduler.close()
        await worker.close()


@pytest.fixture
async def scene(served: ServedText) -> AsyncIterator[Scene]:
    async with opened(served) as scene:
        yield scene


@dataclass
class Collected:
    """What a client got."""

    accepted: pb.Accepted
    texts: dict[int, str]
    ids: dict[int, list[int]]
    finish: pb.Finish
    deltas: list[pb.Delta]


async def collect(call: Any) -> Collected:
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted" and kinds[-1] == "finish"
    assert set(kinds[1:-1]) <= {"delta"}
    deltas = [event.delta for event in events[1:-1]]
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        ids.setdefault(delta.choice, []).extend(delta.token_ids)
    return Collected(events[0].accepted, texts, ids, events[-1].finish, deltas)


async def failure(call: Any) -> tuple[RemoteError, list[Any]]:
    """The call's failure, and what came before it."""
    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for event in call:
            seen.append(event)  # noqa: PERF401 - a comprehension would lose what came before the failure
    return from_rpc_error(caught.value), seen


async def first_delta(call: Any) -> pb.Delta:
    while True:
        event = await call.read()
        assert event is not grpc.aio.EOF
        if event.WhichOneof("event") == "delta":
            return event.delta


class TestStreaming:
    async def test_text_ids_and_counts(self, scene: Scene, tokenizer: TextTokenizer) -> None:
        answer = tokenizer.encode(" the café is 日本 🎉 open", add_special_tokens=False)
        eos = tokenizer.eos_ids[0]
        call = asyncio.create_task(collect(scene.generate("Hello there", request_id="req-1")))
        running = await scene.worker.sequence(0)
        timing = rp.SlotTiming(entry=0, cached_tokens=2, queue_us=10, prefill_us=20)
        running.give(answer[:1], timings=[timing])
        for token in answer[1:]:
            running.give([token])
        running.give([eos], STOP)
        got = await call
        prompt = tokenizer.encode("Hello there", add_special_tokens=True)
        assert list(running.start.ids) == prompt and running.start.prompt_len == len(prompt)
        assert got.accepted.request_id == "req-1" and got.accepted.prompt_tokens == len(prompt)
        assert got.texts[0] == " the café is 日本 🎉 open"
        assert got.ids[0] == [*answer, eos]
        assert all("\ufffd" not in delta.text for delta in got.deltas)
        (end,) = got.finish.choices
        assert (end.reason, end.stop_token_id, end.stop_string) == (pb.FINISH_REASON_STOP, eos, "")
        usage = got.finish.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (len(prompt), len(answer) + 1, 2)
        finished = await scene.scheduler.ended()
        assert (finished.outcome, finished.completion_tokens) == (dp.OUTCOME_FINISHED, len(answer) + 1)
        assert [event.event for event in finished.events] == ["first_token"]
        assert (await scene.scheduler.record()).started == 1

    async def test_defaults_are_resolved(self, scene: Scene, tokenizer: TextTokenizer) -> None:
        plain = pb.GenerateRequest(model=MODEL, text=pb.TextInput(prompt="x"))
        call = asyncio.create_task(collect(scene.stub.Generate(plain)))
        running = await scene.worker.sequence(0)
        params = running.start.params
        assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
        assert params.max_tokens == 8192 - len(running.start.ids)
        assert tuple(params.stop_token_ids) == tokenizer.eos_ids
        assert (params.logprobs, params.prompt_logprobs) == (-1, -1)
        running.give([5], LENGTH)
        got = await call
        assert got.accepted.seed == params.seed  # drawn, and told
        submit = (await scene.scheduler.record()).submit
        assert 590_000 < submit.deadline_ms <= 600_000 and 0 < submit.queue_timeout_ms <= 60_000

    async def test_ignore_eos_and_context_end(self, scene: Scene) -> None:
        stop = pb.StopParams(max_tokens=100_000, ignore_eos=True, stop_token_ids=[7])
        call = asyncio.create_task(collect(scene.generate(stop=stop)))
        running = await scene.worker.sequence(0)
        assert list(running.start.params.stop_token_ids) == [7]
        assert running.start.params.max_tokens == 8192 - len(running.start.ids)
        running.give([1], LENGTH)
        assert (await call).finish.choices[0].reason == pb.FINISH_REASON_LENGTH

    async def test_chat_is_rendered_once_with_its_special_tokens(self, scene: Scene, tokenizer: TextTokenizer) -> None:
        chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Hi")])
        call = asyncio.create_task(collect(scene.generate(chat=chat)))
        running = await scene.worker.sequence(0)
        text = tokenizer.decode(list(running.start.ids), skip_special_tokens=False)
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == 3  # the template's own system turn, the user's, the assistant's
        running.give([1], LENGTH)
        await call

    async def test_three_choices(self, scene: Scene, tokenizer: TextTokenizer) -> None:
        sampling = pb.SamplingParams(temperature=1.0, seed=11, n=3)
        call = asyncio.create_task(collect(scene.generate(sampling=sampling)))
        running = [await scene.worker.sequence(i) for i in range(3)]
        assert [r.start.choice for r in running] == [0, 1, 2]
        assert {r.start.params.seed for r in running} == {11}
        assert len({r.start.slot for r in running}) == 3 and len({r.start.lease for r in running}) == 1
        words = [tokenizer.encode(word, add_special_tokens=False) for word in (" red", " green grass", " blue")]
        # Choice 1 goes on after the others have ended.
        scene.worker.step(
            [(running[0], words[0], LENGTH), (running[1], words[1][:1], 0), (running[2], words[2], LENGTH)]
        )
        scene.worker.step([(running[1], words[1][1:], LENGTH)])
        got = await call
        assert got.texts == {0: " red", 1: " green grass", 2: " blue"}
        assert [c.choice for c in got.finish.choices] == [0, 1, 2]
        assert got.finish.usage.completion_tokens == sum(map(len, words))
        await scene.scheduler.ended()
        assert len((await scene.scheduler.record()).finished) == 1

    async def test_stop_string_over_token_borders_aborts_the_slot(self, scene: Scene, tokenizer: TextTokenizer) -> None:
        ids = tokenizer.encode("one two three four", add_special_tokens=False)
        call = asyncio.create_task(collect(scene.generate(stop=pb.StopParams(stop=["o thr"]))))
        running = await scene.worker.sequence(0)
        for token in ids:
            running.give([token])
        got = await call
        assert got.texts[0] == "one tw"
        (end,) = got.finish.choices
        assert (end.reason, end.stop_string) == (pb.FINISH_REASON_STOP, "o thr")
        assert not end.HasField("stop_token_id")
        completing = next(n for n in range(len(ids)) if "o thr" in tokenizer.decode(ids[:n], skip_special_tokens=True))
        assert got.ids[0] == ids[:completing]
        assert got.finish.usage.completion_tokens == completing
        await scene.worker.changes.until(lambda: scene.worker.aborts == [(running.start.slot, running.start.lease)])

    async def test_logprobs_stay_with_their_ids(self, scene: Scene) -> None:
        output = pb.OutputOptions(logprobs=2, prompt_logprobs=1)
        call = asyncio.create_task(collect(scene.generate(tokens=pb.TokenInput(ids=[10, 11, 12]), output=output)))
        running = await scene.worker.sequence(0)
        assert (running.start.params.logprobs, running.start.params.prompt_logprobs) == (2, 1)
        first = rp.SlotLogprobs(entry=0, prompt=True, chosen=[-1.5], k=1, top_ids=[9], top_logprobs=[-0.5])
        running.give([], logprobs=[first])  # a prompt computed in two chunks
        second = rp.SlotLogprobs(entry=0, prompt=True, chosen=[-2.5], k=1, top_ids=[8], top_logprobs=[-0.25])
        new = rp.SlotLogprobs(entry=0, chosen=[-0.125], k=2, top_ids=[20, 21], top_logprobs=[-0.125, -3.0])
        running.give([20], logprobs=[second, new])
        new = rp.SlotLogprobs(entry=0, chosen=[-4.0], k=2, top_ids=[30, 31], top_logprobs=[-1.0, -2.0])
        running.give([22], LENGTH, logprobs=[new])
        got = await call
        assert got.accepted.prompt_logprobs_follow
        prompt = [row for delta in got.deltas for row in delta.prompt_logprobs]
        assert [(row.token.id, row.token.logprob, row.top[0].id) for row in prompt] == [(11, -1.5, 9), (12, -2.5, 8)]
        rows = [row for delta in got.deltas for row in delta.logprobs]
        assert [(row.token.id, row.token.logprob) for row in rows] == [(20, -0.125), (22, -4.0)]
        assert [[t.id for t in row.top] for row in rows] == [[20, 21], [30, 31]]
        assert got.ids[0] == [20, 22]

    async def test_scoring_without_new_tokens(self, scene: Scene) -> None:
        options = {"stop": pb.StopParams(max_tokens=0), "output": pb.OutputOptions(prompt_logprobs=0)}
        call = asyncio.create_task(collect(scene.generate(tokens=pb.TokenInput(ids=[10, 11]), **options)))
        running = await scene.worker.sequence(0)
        running.give([], LENGTH, logprobs=[rp.SlotLogprobs(entry=0, prompt=True, chosen=[-1.0])])
        got = await call
        assert [row.token.id for delta in got.deltas for row in delta.prompt_logprobs] == [11]
        assert got.finish.usage.completion_tokens == 0


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
        await scene.scheduler.changes.until(lambda: scene.scheduler.cancels == [record.submit.request_id])
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

    async def test_worker_lost_by_the_scheduler(self, scene: Scene) -> None:
        call = asyncio.create_task(failure(scene.generate()))
        (await scene.worker.sequence(0)).give([5])
        record = await scene.scheduler.record()
        await scene.scheduler.changes.until(lambda: record.started)
        revoked = dp.Revoked(request_id=record.submit.request_id, lease=record.lease, reason="WORKER_LOST")
        scene.scheduler.tell(revoked=[revoked])
        error, seen = await call
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert list(seen[1].delta.token_ids) == [5]

    async def test_worker_lost_on_its_link(self, served: ServedText) -> None:
        async with opened(served, run_resume_grace_s=0.3) as scene:
            call = asyncio.create_task(failure(scene.generate()))
            (await scene.worker.sequence(0)).give([5])
            record = await scene.scheduler.record()
            await scene.scheduler.changes.until(lambda: record.started)
            await scene.worker.close()
            error, seen = await call
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
            assert list(seen[1].delta.token_ids) == [5]
            finished = await scene.scheduler.ended()
            assert (finished.outcome, finished.reason) == (dp.OUTCOME_FAILED, "WORKER_LOST")
            await scene.scheduler.changes.until(lambda: scene.scheduler.workers_lost == ["worker-1"])

    async def test_worker_of_another_boot(self, scene: Scene) -> None:
        scene.worker.refuse = grpc.StatusCode.FAILED_PRECONDITION
        error, _ = await failure(scene.generate())
        assert error.reason == "WORKER_LOST"
        scene.worker.refuse = None
        call = asyncio.create_task(collect(scene.generate()))
        (await scene.worker.sequence(0)).give([1], LENGTH)
        assert (await call).ids[0] == [1]

    async def test_session_that_the_worker_dropped(self, scene: Scene) -> None:
        begun = asyncio.create_task(failure(scene.generate()))
        (await scene.worker.sequence(0)).give([1])
        await scene.scheduler.begun()
        scene.worker.refuse = grpc.StatusCode.OUT_OF_RANGE
        await scene.worker.break_stream()
        error, _ = await begun
        assert error.reason == "WORKER_LOST"
        assert not scene.scheduler.workers_lost  # it lives
        scene.worker.refuse = None
        scene.worker.steps.clear()
        call = asyncio.create_task(collect(scene.generate()))
        (await scene.worker.sequence(1)).give([2], LENGTH)
        assert (await call).ids[0] == [2]
        assert scene.worker.hellos[-1].resume_after_step_seq == 0

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


class TestRefusals:
    async def test_bad_fields(self, scene: Scene) -> None:
        cases = {
            "sampling.temperature": {"sampling": pb.SamplingParams(temperature=float("nan"))},
            "sampling.n": {"sampling": pb.SamplingParams(n=0)},
            "stop.stop[0]": {"stop": pb.StopParams(stop=[""])},
            "tokens.ids[1]": {"tokens": pb.TokenInput(ids=[1, 60_000])},
            "output.logprobs": {"output": pb.OutputOptions(logprobs=21)},
            "queue_timeout": {"queue_timeout": Duration(seconds=-1)},
        }
        for field, options in cases.items():
            error, _ = await failure(scene.generate(**options))
            assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        error, _ = await failure(scene.stub.Generate(pb.GenerateRequest(model=MODEL)))
        assert error.field == "input"
        assert not scene.scheduler.records

    async def test_over_long_prompt_tells_the_numbers(self, scene: Scene) -> None:
        error, _ = await failure(scene.generate(tokens=pb.TokenInput(ids=[1] * 9000)))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")
        assert "9000" in error.message and "8192" in error.message

    async def test_unknown_model(self, scene: Scene) -> None:
        error, _ = await failure(scene.generate(model="nobody"))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert MODEL in error.message

    async def test_request_id_in_use(self, scene: Scene) -> None:
        call = asyncio.create_task(collect(scene.generate(request_id="same")))
        running = await scene.worker.sequence(0)
        error, _ = await failure(scene.generate(request_id="same"))
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID")
        running.give([1], LENGTH)
        assert (await call).ids[0] == [1]

    async def test_oversized_message(self, scene: Scene) -> None:
        error, _ = await failure(scene.generate("x" * (9 * 2**20)))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.message

    async def test_tokenizer_that_is_not_the_workers(self, served: ServedText) -> None:
        async with opened(replace(served, text_digest="0" * 64)) as scene:
            error, _ = await failure(scene.generate())
            assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
            assert list((await scene.stub.ListModels(pb.ListModelsRequest())).models) == []


class TestRecords:
    async def test_list_models(self, scene: Scene) -> None:
        (model,) = (await scene.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.max_model_len, model.workers) == (MODEL, 8192, 1)
        assert model.created.seconds == 1_700_000_000

    async def test_get_request(self, scene: Scene) -> None:
        call = asyncio.create_task(collect(scene.generate(request_id="told")))
        running = await scene.worker.sequence(0)
        live = await scene.stub.GetRequest(pb.GetRequestRequest(request_id="told"))
        assert live.state == pb.REQUEST_STATE_PLACED and not live.HasField("usage")
        running.give([1], LENGTH, timings=[rp.SlotTiming(entry=0, cached_tokens=1)])
        await call
        await scene.scheduler.ended()
        ended = await scene.stub.GetRequest(pb.GetRequestRequest(request_id="told"))
        assert ended.state == pb.REQUEST_STATE_FINISHED and ended.durable
        assert ended.usage.completion_tokens == 1
        assert ended.timeline[0].event == "first_token" and ended.timeline[0].detail["cached_tokens"] == "1"


class TestDrain:
    async def test_live_streams_end_and_nothing_new_is_taken(self, served: ServedText) -> None:
        async with opened(served, drain_timeout_s=20.0) as scene:
            call = asyncio.create_task(collect(scene.generate()))
            running = await scene.worker.sequence(0)
            drained = asyncio.create_task(scene.gateway.drain())
            await asyncio.sleep(0)
            assert not scene.gateway.ready
            error, _ = await failure(scene.generate())
            assert error.code is grpc.StatusCode.UNAVAILABLE
            running.give([1, 2], LENGTH)
            assert (await call).ids[0] == [1, 2]
            assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_FINISHED
            await drained

    async def test_what_does_not_end_in_time_is_cancelled(self, served: ServedText) -> None:
        async with opened(served, drain_timeout_s=0.3) as scene:
            call = asyncio.create_task(failure(scene.generate()))
            await scene.worker.sequence(0)
            await scene.gateway.drain()
            assert (await call)[0].code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert (await scene.scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
            assert scene.worker.aborts
