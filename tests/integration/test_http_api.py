"""The OpenAI surface over real HTTP, called by the `openai` package; the core behind it is scripted."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from lmesh_gateway.errors import (
    ContextLengthExceededError,
    ModelNotFoundError,
    QueueFullError,
    WorkerLostError,
)
from lmesh_gateway.generation import (
    Accepted,
    ChoiceEnd,
    Delta,
    Event,
    Finish,
    GenerationRequest,
    ServedModel,
    TextPrompt,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from lmesh_gateway.http.app import build_app
from lmesh_gateway.http.unsupported import INERT, NOT_BUILT
from lmesh_kernels.text.generation import GenerationDefaults
from lmesh_kernels.text.tokenizer import TextTokenizer

from tests.tiny_model import byte_tokenizer

LIMIT = 4 << 20
WORDS = ("Hello", " wide", " world")


def scores(text: str) -> TokenLogprobs:
    token = TokenLogprob(id=len(text), logprob=-0.5, text=text, raw=text.encode())
    other = TokenLogprob(id=0, logprob=-1.5, text="?", raw=b"?")
    return TokenLogprobs(token=token, top=(token, other))


class ScriptedCore:
    """Says three words a choice; some model names ask for trouble."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.cancelled = threading.Event()
        self.ready = True

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        try:
            async for event in self._events(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def _events(self, request: GenerationRequest) -> AsyncIterator[Event]:
        if request.model == "full":
            raise QueueFullError("busy", retry_after_ms=1500)
        if request.model == "long":
            raise ContextLengthExceededError("the prompt has 9 tokens", field="text.prompt")
        request_id = request.request_id or "drawn"
        yield Accepted(request_id=request_id, model=request.model, prompt_ids=(1, 2, 3), seed=1, created=12.5)
        if request.model == "endless":
            while True:
                yield Delta(choice=0, text="x", token_ids=(1,))
                await asyncio.sleep(0.01)
        for choice in range(request.sampling.n):
            prompt = (scores("b"), scores("c")) if request.output.prompt_logprobs is not None and choice == 0 else None
            for word in WORDS if request.stops.max_tokens != 0 else ():
                found = None if request.output.logprobs is None else (scores(word),)
                yield Delta(choice=choice, text=word, token_ids=(7,), logprobs=found, prompt_logprobs=prompt)
                prompt = None
            if prompt is not None:
                yield Delta(choice=choice, text="", token_ids=(), prompt_logprobs=prompt)
            if request.model == "lost":
                raise WorkerLostError("the worker is gone")
            yield ChoiceEnd(choice=choice, reason="stop" if choice == 0 else "length")
        count = 3 * request.sampling.n
        yield Finish(choices=(), usage=Usage(prompt_tokens=3, completion_tokens=count, cached_tokens=2))

    def list(self) -> list[ServedModel]:
        return [self.get("m")]

    def get(self, model: str) -> ServedModel:
        if model == "nobody":
            raise ModelNotFoundError("no worker serves 'nobody'", field="model")
        tokenizer = TextTokenizer(
            byte_tokenizer(), special_tokens={"eos_token": "</s>"}, eos_ids=(), chat_template=None, add_bos=False
        )
        return ServedModel(
            id=model,
            digest="d",
            max_model_len=512,
            vocab_size=258,
            created=3.0,
            workers=1,
            tokenizer=tokenizer,
            defaults=GenerationDefaults(),
        )


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, ScriptedCore]]:
    core = ScriptedCore()
    app = build_app(core, core, max_body_bytes=LIMIT, ready=lambda: core.ready)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}", core
    server.should_exit = True
    thread.join()


@pytest.fixture
def core(served: tuple[str, ScriptedCore]) -> ScriptedCore:
    served[1].requests.clear()
    served[1].cancelled.clear()
    return served[1]


@pytest.fixture
def url(served: tuple[str, ScriptedCore]) -> str:
    return served[0]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_chat(client: openai.OpenAI, core: ScriptedCore) -> None:
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, n=2, temperature=0.5, top_p=0.9, seed=4, stop="X", max_completion_tokens=9
    )
    assert [c.message.content for c in answer.choices] == ["Hello wide world"] * 2
    assert [c.finish_reason for c in answer.choices] == ["stop", "length"]
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.id == "chatcmpl-drawn"
    sent = core.requests[0]
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.seed, sent.sampling.n) == (0.5, 0.9, 4, 2)
    assert sent.stops.stop == ("X",)
    assert sent.stops.max_tokens == 9


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wide world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 6


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [c.token for c in content] == list(WORDS)
    assert bytes(content[0].bytes) == b"Hello"
    assert [t.token for t in content[0].top_logprobs] == ["Hello", "?"]


async def test_async_client(url: str, core: ScriptedCore) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = await client.completions.create(model="m", prompt="a")
        assert answer.choices[0].text == "Hello wide world"
        assert core.requests[0].stops.max_tokens == 16


def test_batch_of_prompts(client: openai.OpenAI, core: ScriptedCore) -> None:
    done = client.completions.create(model="m", prompt=["a", "b", "c"], n=2)
    assert [c.index for c in done.choices] == list(range(6))
    assert done.usage.prompt_tokens == 9
    assert {r.prompt for r in core.requests} == {TextPrompt(text=t) for t in "abc"}
    ids = client.completions.create(model="m", prompt=[[1, 2], [3]])
    assert [c.index for c in ids.choices] == [0, 1]
    stream = list(client.completions.create(model="m", prompt=["a", "b"], stream=True))
    texts = {i: "".join(c.choices[0].text for c in stream if c.choices[0].index == i) for i in (0, 1)}
    assert texts == {0: "Hello wide world", 1: "Hello wide world"}


def test_echo(client: openai.OpenAI) -> None:
    done = client.completions.create(model="m", prompt="abc", echo=True, logprobs=2)
    choice = done.choices[0]
    assert choice.text == "abcHello wide world"
    assert choice.logprobs.tokens == ["a", "b", "c", *WORDS]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 8, 13]
    scored = client.completions.create(model="m", prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == "abc"
    assert scored.choices[0].logprobs.tokens == ["a", "b", "c"]
    plain = client.completions.create(model="m", prompt=[97, 98], echo=True)
    assert plain.choices[0].text.endswith("Hello wide world")


def test_models_and_pages(client: openai.OpenAI, url: str, core: ScriptedCore) -> None:
    assert [m.id for m in client.models.list()] == ["m"]
    assert client.models.retrieve("a/b").id == "a/b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    assert httpx.get(f"{url}/health").status_code == 200
    core.ready = False
    assert httpx.get(f"{url}/health").status_code == 503
    core.ready = True
    assert "version" in httpx.get(f"{url}/version").json()
    schema = httpx.get(f"{url}/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert httpx.get(f"{url}/docs").status_code == 200
    assert "python_info" in httpx.get(f"{url}/metrics").text


def test_headers(client: openai.OpenAI, core: ScriptedCore) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"x-request-id": "mine", "x-lmesh-timeout-ms": "1500", "traceparent": trace}
    raw = client.completions.with_raw_response.create(model="m", prompt="a", extra_headers=headers)
    assert raw.headers["x-request-id"] == "mine"
    sent = core.requests[0]
    assert (sent.request_id, sent.deadline_s, sent.traceparent) == ("mine", 1.5, trace)
    with pytest.raises(openai.BadRequestError, match="x-lmesh-timeout-ms"):
        client.completions.create(model="m", prompt="a", extra_headers={"x-lmesh-timeout-ms": "soon"})


def test_errors_have_status_param_and_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="full", prompt="a")
    assert full.value.code == "QUEUE_FULL"
    assert full.value.response.headers["retry-after"] == "2"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="long", prompt="a", stream=True)
    assert (long.value.code, long.value.param) == ("CONTEXT_LENGTH_EXCEEDED", "prompt")
    with pytest.raises(openai.InternalServerError) as lost:
        client.completions.create(model="lost", prompt="a")
    assert lost.value.status_code == 503


def test_error_after_the_stream_began(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="lost", messages=MESSAGES, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the worker is gone"):
        seen.extend(c.choices[0].delta.content for c in stream)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat/completions", {"model": "m"}, "messages"),
        ("chat/completions", {"model": "m", "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("chat/completions", {"model": "m", "messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (
            "chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ("completions", {"model": "m", "prompt": "a", "temperature": "hot"}, "temperature"),
        ("completions", {"model": "m", "prompt": "a", "n": True}, "n"),
        ("completions", {"model": "m", "prompt": "a", "stream": 1}, "stream"),
        ("completions", {"model": "m", "prompt": []}, "prompt"),
        ("completions", {"model": "m", "prompt": [-1]}, "prompt"),
        ("completions", {"model": "m", "prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_malformed_bodies(url: str, path: str, body: dict[str, Any], field: str) -> None:
    response = httpx.post(f"{url}/v1/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(field)
    assert error["code"] == "MALFORMED_BODY"
    assert error["message"].startswith(field)


@pytest.mark.parametrize("content", ["{", "[1", '{"model": "m", "prompt": "a", "top_p": NaN}', "[" * 100_000])
def test_what_is_no_json(url: str, content: str) -> None:
    response = httpx.post(f"{url}/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "MALFORMED_BODY"


@pytest.mark.parametrize("name", sorted(NOT_BUILT))
def test_what_is_not_built_is_refused_by_name(url: str, name: str) -> None:
    body = {"model": "m", "messages": MESSAGES}
    used = httpx.post(f"{url}/v1/chat/completions", json={**body, name: {"something": 1}})
    assert used.status_code == 400
    assert used.json()["error"]["code"] == "UNSUPPORTED_PARAMETER"
    assert used.json()["error"]["param"] == name
    for neutral in (None, *NOT_BUILT[name]):
        assert httpx.post(f"{url}/v1/chat/completions", json={**body, name: neutral}).status_code == 200, neutral


def test_inert_and_unknown_parameters(url: str) -> None:
    body: dict[str, Any] = {"model": "m", "messages": MESSAGES}
    inert = dict.fromkeys(INERT, "x")
    assert httpx.post(f"{url}/v1/chat/completions", json={**body, **inert, "store": False}).status_code == 200
    wrong = httpx.post(f"{url}/v1/chat/completions", json={**body, "temprature": 1})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "UNKNOWN_PARAMETER")


def test_a_body_of_50_mb(url: str, core: ScriptedCore) -> None:
    declared = httpx.post(f"{url}/v1/completions", content=b"x" * 50_000_000, timeout=30)
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "REQUEST_TOO_LARGE"
    chunked = httpx.post(f"{url}/v1/completions", content=iter([b"x" * 1_000_000] * 50), timeout=30)
    assert chunked.status_code == 413
    assert core.requests == []


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_cancels_its_stream(url: str, core: ScriptedCore, path: str) -> None:
    body = {"model": "endless", "messages": MESSAGES, "prompt": "a", "stream": True}
    del body["prompt" if path.startswith("chat") else "messages"]
    with httpx.stream("POST", f"{url}/v1/{path}", json=body) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    assert core.cancelled.wait(10)


def test_a_client_that_leaves_cancels_its_whole_answer(url: str, core: ScriptedCore) -> None:
    body = {"model": "endless", "prompt": "a"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    assert core.cancelled.wait(10)


def test_one_failure_of_a_batch_cancels_the_others(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="full", prompt=["a", "b"])


def test_stream_is_server_sent_events(url: str) -> None:
    body = {"model": "m", "prompt": "a", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(math.isfinite(json.loads(line[6:])["created"]) for line in lines[:-1])
