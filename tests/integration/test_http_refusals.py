"""What the OpenAI surface refuses, over real HTTP: each with its status, its reason and the parameter at fault."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from lmesh_gateway.http.unsupported import INERT, NOT_BUILT
from lmesh_gateway.http_protocol import MAX_HEAD_BYTES

from tests.scripted_core import ScriptedCore, served

MESSAGES: Any = [{"role": "user", "content": "hi"}]


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


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat/completions", {"model": "m"}, "messages"),
        ("chat/completions", {"model": "m", "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("chat/completions", {"model": "m", "messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (
            "chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "x"}]}]},
            "messages[0].c",
        ),
        (
            "chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].c",
        ),
        ("completions", {"model": "m", "prompt": ["a"] * 2049}, "prompt"),
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


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[1",
        b"[]",
        b"",
        b"\xff",
        b'{"model": "m", "prompt": "a", "top_p": NaN}',
        b"[" * 100_000,
        b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
    ],
)
def test_what_is_no_json(url: str, content: bytes) -> None:
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"model": "m", "prompt": "a\ud800"}', "prompt"),
        (rb'{"model": "m", "prompt": ["a", "\udc00\ud800"]}', "prompt[1]"),
        (rb'{"model": "\uD83d", "prompt": "a"}', "model"),
        (rb'{"model": "m", "prompt": "a", "\ud800": 1}', None),
    ],
)
def test_half_a_surrogate_pair(url: str, body: bytes, param: str | None) -> None:
    """A prompt cut within an emoji by a careless client: refused, while whole pairs are text."""
    response = httpx.post(f"{url}/v1/completions", content=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "MALFORMED_BODY", param)
    whole = rb'{"model": "m", "prompt": "\ud83d\ude00"}'
    assert httpx.post(f"{url}/v1/completions", content=whole).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0]"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ({"content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
    ],
)
def test_unsupported_parts_of_messages(url: str, message: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", **message}]}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "UNSUPPORTED_PARAMETER", param)


def test_values_that_ask_for_nothing(url: str, core: ScriptedCore) -> None:
    body: dict[str, Any] = {"model": "m", "prompt": "a", "n": 2, "best_of": 2, "ignore_eos": None}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json=body | {"best_of": 3}).status_code == 400
    message = {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None}
    options = {"include_usage": None, "continuous_usage_stats": False}
    chat = {"model": "m", "messages": [message], "stream": True, "stream_options": options}
    assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
    chat["stream_options"] = {"continuous_usage_stats": True}
    refused = httpx.post(f"{url}/v1/chat/completions", json=chat).json()["error"]
    assert (refused["code"], refused["param"]) == ("UNSUPPORTED_PARAMETER", "stream_options.continuous_usage_stats")


def test_paths_and_methods_that_are_none(url: str) -> None:
    nowhere = httpx.get(f"{url}/v1/nope", headers={"x-request-id": "mine"})
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "ROUTE_NOT_FOUND")
    assert nowhere.headers["x-request-id"] == "mine"
    method = httpx.get(f"{url}/v1/completions")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert method.headers["allow"] == "POST"


def test_a_refusal_names_its_request(url: str) -> None:
    body = {"model": "m", "prompt": "a", "n": "x"}
    mine = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert mine.headers["x-request-id"] == "mine"
    assert httpx.post(f"{url}/v1/completions", json=body).headers["x-request-id"]
    odd = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "no id <script>"})
    assert "x-request-id" not in odd.headers


@pytest.mark.parametrize("timeout", ["\xb2", "9" * 5000, "-1", "0", "1.5", ""])
def test_timeouts_that_are_none(url: str, timeout: str) -> None:
    headers = {"x-lmesh-timeout-ms": timeout.encode("latin-1")}
    response = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "a"}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-lmesh-timeout-ms"


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


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


@pytest.mark.parametrize("line", [b"x-a: " + b"y" * 1000 + b"\r\n", b"y" * 100_000])
def test_headers_that_never_end(url: str, line: bytes) -> None:
    """Many headers, or one: the connection is cut once the limit is passed, and nobody else's."""
    with socket.create_connection(address(url), timeout=10) as sock, pytest.raises(ConnectionError):
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-b: ")
        for _ in range(64 * MAX_HEAD_BYTES // len(line)):
            sock.sendall(line)
    assert httpx.get(f"{url}/health").status_code == 200


def test_headers_over_the_limit_are_told(url: str) -> None:
    """A client that reads before it writes on is told why."""
    with socket.create_connection(address(url), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        for _ in range(3 * MAX_HEAD_BYTES // 4096):
            sock.sendall(b"x-a: " + b"y" * 4089 + b"\r\n")
            if answer := _said(sock):
                break
        assert answer.startswith(b"HTTP/1.1 431")
        assert b"HEADERS_TOO_LARGE" in answer


def _said(sock: socket.socket) -> bytes:
    sock.settimeout(0.05)
    try:
        return sock.recv(4096)
    except TimeoutError:
        return b""


def test_two_requests_of_one_connection_have_a_head_each(url: str) -> None:
    """The bound is on a head, not on a connection: a long body and many requests pass."""
    with httpx.Client() as client:
        for _ in range(4):
            headers = {"x-filler": "y" * 30_000}
            body = {"model": "m", "prompt": "a" * 100_000}
            assert client.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
