"""The gateway between real sockets: what a client is streamed, told and refused; the real tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import TextTokenizer, load_tokenizer

from tests.gateway_scene import MODEL, SOURCE, Scene, collect, failure, opened, served_text
from tests.scripted_peers import ServedText

STOP, LENGTH = rp.SEQUENCE_FINISH_STOP, rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def served() -> ServedText:
    return served_text()


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(resolve(SOURCE))


@pytest.fixture
async def scene(served: ServedText) -> AsyncIterator[Scene]:
    async with opened(served) as scene:
        yield scene


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
        # What the model's authors recommend, and all candidates where they say nothing.
        assert (params.temperature, params.top_p, params.top_k) == (pytest.approx(0.2), pytest.approx(0.9), 0)
        assert params.max_tokens == 8192 - len(running.start.ids)
        assert tuple(params.stop_token_ids) == tokenizer.eos_ids
        assert (params.logprobs, params.prompt_logprobs) == (-1, -1)
        assert (params.min_p, params.repetition_penalty, list(params.logit_bias)) == (0.0, 1.0, [])
        assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
        running.give([5], LENGTH)
        got = await call
        assert got.accepted.seed == params.seed  # drawn, and told
        submit = (await scene.scheduler.record()).submit
        assert 590_000 < submit.deadline_ms <= 600_000 and 0 < submit.queue_timeout_ms <= 60_000

    async def test_penalties_and_biases_reach_the_worker(self, scene: Scene) -> None:
        sampling = pb.SamplingParams(
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=2.0,
            logit_bias={9: 1.5, 3: -100.0},
        )
        call = asyncio.create_task(collect(scene.generate(sampling=sampling)))
        running = await scene.worker.sequence(0)
        params = running.start.params
        assert (params.min_p, params.repetition_penalty) == (0.25, 1.5)
        assert (params.presence_penalty, params.frequency_penalty) == (-0.5, 2.0)
        assert [(entry.id, entry.bias) for entry in params.logit_bias] == [(3, -100.0), (9, 1.5)]
        running.give([1], LENGTH)
        await call

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


class TestRefusals:
    async def test_bad_fields(self, scene: Scene) -> None:
        cases = {
            "sampling.temperature": {"sampling": pb.SamplingParams(temperature=float("nan"))},
            "sampling.n": {"sampling": pb.SamplingParams(n=0)},
            "sampling.min_p": {"sampling": pb.SamplingParams(min_p=1.5)},
            "sampling.repetition_penalty": {"sampling": pb.SamplingParams(repetition_penalty=0.0)},
            "sampling.logit_bias[999999]": {"sampling": pb.SamplingParams(logit_bias={999999: 1.0})},
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
