"""The whole mesh from the outside: the promises that clients rely on, on real processes, sockets and a real model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lmesh.inference.v1 import inference_pb2 as pb

from tests.mesh import MODEL, SOURCE, Mesh, running_mesh
from tests.tiny_model import LOOPING_TEMPLATE, save_tiny_llama

WAIT_S = 30.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two models in one mesh: the real small one, and a tiny one whose chat template never ends."""
    tiny = save_tiny_llama(tmp_path_factory.mktemp("tiny"), chat_template=LOOPING_TEMPLATE)
    models = ["--model", f"{MODEL}={SOURCE}", "--model", f"looper={tiny}"]
    with running_mesh(tmp_path_factory.mktemp("run"), *models) as running:
        yield running


@pytest.fixture
def client(mesh: Mesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=120)


def eventually(check: Callable[[], bool], what: str) -> None:
    """Polls until `check` holds; the bound is generous because only order matters, not time."""
    deadline = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def reason_of(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None, error
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    raise AssertionError(f"no ErrorInfo in {status}")


def generate_request(prompt: str, max_tokens: int, **sampling: float) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        text=pb.TextInput(prompt=prompt),
        sampling=pb.SamplingParams(**({"temperature": 0.0} | sampling)),
        stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=True),
        request_id=str(uuid.uuid4()),
    )


def collect(mesh: Mesh, request: pb.GenerateRequest, timeout: float = 120) -> dict[int, list[int]]:
    """Ids of every choice of one call."""
    ids: dict[int, list[int]] = {}
    with mesh.stub() as stub:
        for event in stub.Generate(request, timeout=timeout):
            if event.WhichOneof("event") == "delta":
                ids.setdefault(event.delta.choice, []).extend(event.delta.token_ids)
    return ids


def blocks_used(mesh: Mesh) -> float:
    """KV blocks held by live sequences, over all workers, by their own gauges."""
    status = json.loads(mesh.cli("status", "--json").stdout)
    return sum(worker["kv_blocks_used"] for worker in status["workers"])


class TestOpenAI:
    def test_chat_answers(self, client: openai.OpenAI) -> None:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=24)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    def test_streamed_chat_equals_whole(self, client: openai.OpenAI) -> None:
        args = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Name three colours and an emoji."}],
            "temperature": 0,
            "max_tokens": 32,
        }
        whole = client.chat.completions.create(**args)
        stream = list(client.chat.completions.create(**args, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert text == whole.choices[0].message.content
        assert stream[-1].usage is not None
        assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == whole.choices[0].finish_reason

    def test_completions_batch_and_echo(self, client: openai.OpenAI) -> None:
        prompts = ["The sky is", "Two plus two is"]
        both = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6, echo=True)
        assert [c.index for c in both.choices] == [0, 1]
        for choice, prompt in zip(both.choices, prompts, strict=True):
            alone = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6)
            assert choice.text == prompt + alone.choices[0].text

    def test_logprobs(self, client: openai.OpenAI) -> None:
        done = client.completions.create(model=MODEL, prompt="One two three", temperature=0, max_tokens=4, logprobs=3)
        logprobs = done.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert chosen == pytest.approx(max(top.values()))  # greedy takes the best
            assert sum(map(math.exp, top.values())) <= 1.0 + 1e-5
        scored = client.completions.create(
            model=MODEL, prompt="One two three", temperature=0, max_tokens=0, logprobs=0, echo=True
        )
        assert scored.choices[0].text == "One two three"
        assert scored.choices[0].logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in scored.choices[0].logprobs.token_logprobs[1:])

    def test_stop_string_is_cut(self, client: openai.OpenAI) -> None:
        args = {"model": MODEL, "prompt": "Count: 1, 2, 3, 4, 5,", "temperature": 0, "max_tokens": 24}
        free = client.completions.create(**args).choices[0].text
        stop = free[6:9]
        stopped = client.completions.create(**args, stop=[stop]).choices[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == free[: free.index(stop)]

    def test_cached_tokens_are_told(self, client: openai.OpenAI) -> None:
        prompt = f"{uuid.uuid4()} " * 12
        args = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 2}
        cold, warm = client.completions.create(**args), client.completions.create(**args)
        assert cold.usage.prompt_tokens_details.cached_tokens == 0
        assert warm.usage.prompt_tokens_details.cached_tokens > warm.usage.prompt_tokens // 2
        assert cold.choices[0].text == warm.choices[0].text

    def test_models(self, client: openai.OpenAI) -> None:
        assert {m.id for m in client.models.list()} == {MODEL, "looper"}


class TestDeterminism:
    def test_seed_alone_and_among_31_others(self, mesh: Mesh) -> None:
        def request(seed: int) -> pb.GenerateRequest:
            return generate_request("Write a line about rain:", 24, temperature=0.9, seed=seed)

        alone = collect(mesh, request(7))
        with ThreadPoolExecutor(32) as pool:
            crowd = list(pool.map(lambda seed: collect(mesh, request(seed)), range(32)))
        assert crowd[7] == alone
        assert len({tuple(ids[0]) for ids in crowd}) > 16

    def test_four_choices_differ(self, client: openai.OpenAI) -> None:
        done = client.completions.create(model=MODEL, prompt="A short poem:", temperature=1, n=4, max_tokens=16, seed=3)
        assert len({c.text for c in done.choices}) == 4
        again = client.completions.create(
            model=MODEL, prompt="A short poem:", temperature=1, n=4, max_tokens=16, seed=3
        )
        assert [c.text for c in again.choices] == [c.text for c in done.choices]


class TestEndings:
    def test_disconnect_frees_blocks(self, mesh: Mesh) -> None:
        eventually(lambda: blocks_used(mesh) == 0, "the mesh is idle")
        with mesh.stub() as stub:
            call = stub.Generate(generate_request("A very long story:", 2_000))
            assert next(call).WhichOneof("event") == "accepted"
            assert next(call).WhichOneof("event") == "delta"
            # What `status` shows comes with the heartbeats, so it may be a moment behind.
            eventually(lambda: blocks_used(mesh) > 0, "its blocks are held")
            call.cancel()
        eventually(lambda: blocks_used(mesh) == 0, "blocks of a disconnected client are freed")

    def test_http_disconnect_frees_blocks(self, mesh: Mesh) -> None:
        body = {"model": MODEL, "prompt": "A tale:", "max_tokens": 2_000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{mesh.url}/v1/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            next(response.iter_lines())
        eventually(lambda: blocks_used(mesh) == 0, "blocks of a disconnected client are freed")

    def test_running_deadline_expires(self, mesh: Mesh) -> None:
        request = generate_request("On and on and on", 4_000)
        with pytest.raises(grpc.RpcError) as caught:
            collect(mesh, request, timeout=2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with mesh.stub() as stub:
            record = pb.GetRequestRequest(request_id=request.request_id)
            eventually(
                lambda: stub.GetRequest(record).state in (pb.REQUEST_STATE_EXPIRED, pb.REQUEST_STATE_CANCELLED),
                "the record ends",
            )
        eventually(lambda: blocks_used(mesh) == 0, "its blocks are freed")

    def test_cancel_by_id_from_another_client(self, mesh: Mesh) -> None:
        request = generate_request("Cancel me", 4_000)
        with mesh.stub() as stub:
            call = stub.Generate(request)
            next(call), next(call)
            with mesh.stub() as other:
                other.Cancel(pb.CancelRequest(request_id=request.request_id))
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            with pytest.raises(grpc.RpcError) as again:
                stub.Cancel(pb.CancelRequest(request_id=request.request_id))
            assert again.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    def test_timeline(self, mesh: Mesh) -> None:
        request = generate_request("A timeline", 4)
        collect(mesh, request)
        with mesh.stub() as stub:
            record = pb.GetRequestRequest(request_id=request.request_id)
            eventually(lambda: stub.GetRequest(record).state == pb.REQUEST_STATE_FINISHED, "finished")
            eventually(lambda: stub.GetRequest(record).durable, "journaled")
            told = stub.GetRequest(record)
        events = [e.event for e in told.timeline]
        assert [e for e in events if e in ("queued", "placed", "running", "finished")] == [
            "queued",
            "placed",
            "running",
            "finished",
        ]
        assert told.usage.completion_tokens == 4


class TestBadInput:
    """Every case: a clear error, and a neighbour's ids as if nothing had happened."""

    @pytest.fixture(scope="class")
    def quiet_ids(self, mesh: Mesh) -> dict[int, list[int]]:
        return collect(mesh, generate_request("The neighbour counts: one, two,", 48))

    @pytest.fixture
    def neighbour(self, mesh: Mesh, quiet_ids: dict[int, list[int]]) -> Iterator[None]:
        """A stream that runs while the test misbehaves; compared with the undisturbed one at the end."""
        ids: dict[int, list[int]] = {}
        request = generate_request("The neighbour counts: one, two,", 48)
        thread = threading.Thread(target=lambda: ids.update(collect(mesh, request)))
        thread.start()
        yield
        thread.join()
        assert ids == quiet_ids

    @pytest.mark.usefixtures("neighbour")
    def test_over_long_prompt(self, mesh: Mesh, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match=r"8192") as caught:
            client.completions.create(model=MODEL, prompt=[100] * 9_000, max_tokens=1)
        assert caught.value.code == "CONTEXT_LENGTH_EXCEEDED"
        request = pb.GenerateRequest(model=MODEL, tokens=pb.TokenInput(ids=[100] * 9_000))
        with pytest.raises(grpc.RpcError) as refused:
            collect(mesh, request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(refused.value) == "CONTEXT_LENGTH_EXCEEDED"

    @pytest.mark.usefixtures("neighbour")
    def test_unknown_model(self, mesh: Mesh, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="nobody", prompt="x")
        assert caught.value.code == "MODEL_NOT_FOUND"
        with pytest.raises(grpc.RpcError) as refused:
            collect(mesh, pb.GenerateRequest(model="nobody", text=pb.TextInput(prompt="x")))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert reason_of(refused.value) == "MODEL_NOT_FOUND"

    @pytest.mark.usefixtures("neighbour")
    def test_nan_parameter(self, mesh: Mesh) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            collect(mesh, generate_request("x", 1, temperature=math.nan))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "temperature" in (refused.value.details() or "")
        body = f'{{"model": "{MODEL}", "prompt": "x", "temperature": NaN}}'
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{mesh.url}/v1/completions", content=body, headers=headers)
        assert response.status_code == 400
        assert "NaN" in response.text or "temperature" in response.text

    @pytest.mark.usefixtures("neighbour")
    def test_body_of_50_mb(self, mesh: Mesh) -> None:
        body = {"model": MODEL, "prompt": "x" * 50_000_000}
        try:
            response = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=60)
        except httpx.WriteError:
            pytest.fail("the refusal must be readable, not a broken connection")
        assert response.status_code == 413
        request = pb.GenerateRequest(model=MODEL, text=pb.TextInput(prompt="x" * 50_000_000))
        with pytest.raises(grpc.RpcError) as refused:
            collect(mesh, request)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.usefixtures("neighbour")
    def test_template_that_loops(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="looper", messages=[{"role": "user", "content": "hi"}])
        assert caught.value.code == "TEMPLATE_TIMEOUT"
        done = client.completions.create(model="looper", prompt="abc", max_tokens=4, extra_body={"ignore_eos": True})
        assert done.usage.completion_tokens == 4

    @pytest.mark.usefixtures("neighbour")
    def test_unbuilt_feature_is_refused_by_name(self, client: openai.OpenAI) -> None:
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], tools=[tool])


class TestTools:
    @pytest.mark.skipif(
        shutil.which("buf", path=str(Path(sys.executable).parent)) is None, reason="buf-bin is a dev tool"
    )
    def test_buf_curl_with_reflection(self, mesh: Mesh) -> None:
        buf = Path(sys.executable).parent / "buf"
        body = {
            "model": MODEL,
            "text": {"prompt": "The capital of France is"},
            "sampling": {"temperature": 0},
            "stop": {"maxTokens": 4},
        }
        url = f"http://{mesh.target}/lmesh.inference.v1.InferenceService/Generate"
        command = [str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(body), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
        assert done.stdout.count('"finish"') == 1

    def test_pages(self, mesh: Mesh) -> None:
        assert httpx.get(f"{mesh.url}/health").status_code == 200
        assert httpx.get(f"{mesh.url}/docs").status_code == 200
        page = httpx.get(f"{mesh.url}/metrics").text
        assert "vllm:time_to_first_token_seconds" in page or "time_to_first_token_seconds" in page


def test_drain_on_sigterm(tmp_path: Path) -> None:
    """`lmesh down` sends SIGTERM in order; a running stream is finished, not cut."""
    with running_mesh(tmp_path, "--model", f"{MODEL}={SOURCE}") as mesh:
        request = generate_request("The drained stream", 24)
        with mesh.stub() as stub:
            call = stub.Generate(request, timeout=120)
            next(call), next(call)
            down = threading.Thread(target=lambda: mesh.cli("down", timeout=120))
            down.start()
            finish = None
            for event in call:
                if event.WhichOneof("event") == "finish":
                    finish = event.finish
            down.join()
        assert finish is not None
        assert finish.usage.completion_tokens == 24
