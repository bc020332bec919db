"""The OpenAI surface over real HTTP, called by the `openai` package; the core behind it is scripted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from lmesh_gateway.generation import TextPrompt

from tests.scripted_core import WORDS, ScriptedCore, served


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, ScriptedCore]]:
    with served() as running:
        yield running


@pytest.fixture
def core(server: tuple[str, ScriptedCore]) -> ScriptedCore:
    server[1].requests.clear()
    server[1].cancelled.clear()
    return server[1]


@pytest.fixture
def url(server: tuple[str, ScriptedCore]) -> str:
    return server[0]


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
    sent = core.requests[0]
    assert answer.id == f"chatcmpl-{sent.request_id}"
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.seed, sent.sampling.n) == (0.5, 0.9, 4, 2)
    assert sent.stops.stop == ("X",)
    assert sent.stops.max_tokens == 9


def test_penalties_and_biases(client: openai.OpenAI, core: ScriptedCore) -> None:
    more = {"min_p": 0.1, "repetition_penalty": 1.2}
    client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        presence_penalty=0.5,
        frequency_penalty=-2,
        logit_bias={"7": -100},
        extra_body=more,
    )
    client.completions.create(model="m", prompt="a", frequency_penalty=0.25, extra_body={"logit_bias": {}})
    chat, completion = core.requests[0].sampling, core.requests[1].sampling
    assert (chat.min_p, chat.repetition_penalty) == (0.1, 1.2)
    assert (chat.presence_penalty, chat.frequency_penalty, chat.logit_bias) == (0.5, -2, ((7, -100),))
    assert (completion.presence_penalty, completion.frequency_penalty, completion.logit_bias) == (None, 0.25, ())


@pytest.mark.parametrize("name", ["x", "-1", " 7", "1_0", "²", "12345678901"])
def test_biases_of_what_is_no_id(url: str, name: str) -> None:
    body = {"model": "m", "prompt": "a", "logit_bias": {name: 1}}
    error = httpx.post(f"{url}/v1/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("MALFORMED_BODY", "logit_bias")


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
    data = [line for line in lines[:-1] if line.startswith("data: ")]
    assert all(math.isfinite(json.loads(line[6:])["created"]) for line in data)
    # Three words of one id each, and the choice's end.
    request_id = response.headers["x-request-id"]
    assert [line for line in lines if line.startswith("id: ")] == [f"id: {request_id}/{n}" for n in (1, 2, 3, 3)]


def test_a_batch_has_no_event_ids(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "m", "prompt": ["a", "b"], "stream": True}) as r:
        assert not [line for line in r.iter_lines() if line.startswith("id:")]


@pytest.mark.parametrize(
    ("header", "value", "detach_ttl_s", "sync"),
    [
        ("x-lmesh-on-disconnect", "cancel", None, False),
        ("x-lmesh-on-disconnect", "detach", 60.0, False),
        ("x-lmesh-on-disconnect", "Detach; ttl=2.5", 2.5, False),
        ("x-lmesh-durability", "sync", None, True),
        ("x-lmesh-durability", "async", None, False),
    ],
)
def test_headers_of_survival(
    url: str, core: ScriptedCore, header: str, value: str, detach_ttl_s: float | None, sync: bool
) -> None:
    for path, body in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": ["a", "b"]})):
        answer = httpx.post(f"{url}/v1/{path}", json={"model": "m", **body}, headers={header: value})
        assert answer.status_code == 200
    assert len(core.requests) == 3
    assert {(r.detach_ttl_s, r.sync) for r in core.requests} == {(detach_ttl_s, sync)}


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-lmesh-on-disconnect", "stay"),
        ("x-lmesh-on-disconnect", "detach; ttl=-1"),
        ("x-lmesh-on-disconnect", "detach; ttl=1e9"),
        ("x-lmesh-on-disconnect", "detach; ttl=" + "9" * 5000),
        ("x-lmesh-durability", "always"),
    ],
)
def test_headers_that_are_none(url: str, core: ScriptedCore, header: str, value: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "a"}, headers={header: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "INVALID_ARGUMENT", header)
    assert not core.requests
