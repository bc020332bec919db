"""Streams over HTTP that break and go on: two gateway processes behind one port, one Redis, a tiny float32 model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.chaos.real_mesh import MODEL, RealMesh, real_mesh
from tests.tiny_model import save_tiny_llama

TIMEOUT_S = 60.0
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me"}], "n": 2}
# The model speaks in bytes, most of which are half a character: much of the text is held back for a while.
PLAIN: dict[str, Any] = {"prompt": "Once upon a time", "stop": "\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd"}
KINDS = {"chat/completions": CHAT, "completions": PLAIN}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    with real_mesh(tmp_path_factory.mktemp("run"), model, workers=1) as mesh:
        yield _url(mesh)


def _url(mesh: RealMesh) -> str:
    return f"http://127.0.0.1:{mesh.http_port}/v1"


def body(path: str, **more: Any) -> dict[str, Any]:
    fixed = {"model": MODEL, "stream": True, "seed": 7, "max_tokens": 200, "ignore_eos": True, "temperature": 1.0}
    return {**fixed, **KINDS[path], **more}


class Stream:
    """What came of one or more connections: text by choice, and each event's id with the text before it."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.marks: list[tuple[str, dict[int, str]]] = [("", {})]
        self.last_id = ""
        self.done = False
        self.error: dict[str, Any] | None = None

    def read(self, lines: Iterator[str], most: int = 10**9) -> None:
        """Takes so many events, then leaves."""
        named = ""
        for line in lines:
            if line.startswith("id: "):
                named = line[4:]
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self._take(json.loads(line[6:]), named)
                most -= 1
            if self.done or self.error or most <= 0:
                return

    def _take(self, chunk: dict[str, Any], named: str) -> None:
        if "error" in chunk:
            self.error = chunk["error"]
            return
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text
            if choice["finish_reason"]:
                self.reasons[choice["index"]] = choice["finish_reason"]
        self.last_id = named
        self.marks.append((named, dict(self.texts)))


def whole(url: str, path: str, **headers: str) -> Stream:
    stream = Stream()
    with httpx.stream("POST", f"{url}/{path}", json=body(path), headers=headers, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200
        stream.read(response.iter_lines())
    assert stream.done
    return stream


def go_on(url: str, path: str, request_id: str, stream: Stream, most: int = 10**9) -> None:
    """One more connection, to whichever gateway process takes it."""
    headers = {"last-event-id": stream.last_id} if stream.last_id else {}
    place = f"{url}/{path}/{request_id}/stream"
    with httpx.stream("GET", place, headers=headers, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["x-request-id"] == request_id
        stream.read(response.iter_lines(), most)


@pytest.mark.parametrize("path", KINDS)
def test_a_stream_that_breaks_again_and_again(url: str, path: str) -> None:
    undisturbed = whole(url, path)
    name = f"breaks-{path.replace('/', '-')}"
    headers = {"x-request-id": name, "x-lmesh-on-disconnect": "detach; ttl=30"}
    stream = Stream()
    with httpx.stream("POST", f"{url}/{path}", json=body(path), headers=headers, timeout=TIMEOUT_S) as response:
        stream.read(response.iter_lines(), 3)
    for events in (1, 2, 5, 9):
        go_on(url, path, name, stream, events)
    go_on(url, path, name, stream)
    assert stream.done and (stream.texts, stream.reasons) == (undisturbed.texts, undisturbed.reasons)


@pytest.mark.parametrize("path", KINDS)
def test_an_ended_one_is_given_again_from_any_event(url: str, path: str) -> None:
    name = f"again-{path.replace('/', '-')}"
    first = whole(url, path, **{"x-request-id": name, "x-lmesh-durability": "sync"})
    assert all(mark.startswith(f"{name}/") for mark, _ in first.marks[1:])
    for mark, before in first.marks[:: max(1, len(first.marks) // 12)]:
        rest = Stream()
        rest.last_id = mark
        go_on(url, path, name, rest)
        joined = {choice: before.get(choice, "") + text for choice, text in rest.texts.items()}
        assert rest.done and (joined, rest.reasons) == (first.texts, first.reasons)


def test_the_older_stream_is_told(url: str) -> None:
    path, older = "completions", Stream()
    headers = {"x-request-id": "older", "x-lmesh-on-disconnect": "detach"}
    with httpx.stream("POST", f"{url}/{path}", json=body(path), headers=headers, timeout=TIMEOUT_S) as response:
        lines = response.iter_lines()
        older.read(lines, 2)
        newer = Stream()
        newer.last_id = older.last_id
        go_on(url, path, "older", newer)
        older.read(lines)
    assert newer.done
    # It may have had its end before the newer one came: then both have all of it.
    assert older.done or (older.error or {}).get("code") == "RESUMED_ELSEWHERE"


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        ("nonsense", 400, "INVALID_ARGUMENT"),
        ("known/", 400, "INVALID_ARGUMENT"),
        ("known/-1", 400, "INVALID_ARGUMENT"),
        ("known/1.x", 400, "INVALID_ARGUMENT"),
        ("known/" + "9" * 4000, 400, "INVALID_ARGUMENT"),
        ("known/" + "1." * 3000 + "1", 400, "INVALID_ARGUMENT"),
        ("other/1", 400, "INVALID_ARGUMENT"),
        ("known/999999", 409, "LEDGER_BEHIND"),
        ("known/1.1.1", 409, "LEDGER_BEHIND"),
    ],
)
def test_event_ids_that_are_none(url: str, last: str, status: int, code: str) -> None:
    headers = {"x-request-id": "known", "x-lmesh-durability": "sync"}
    answer = httpx.post(
        f"{url}/completions", json=body("completions", stream=False), headers=headers, timeout=TIMEOUT_S
    )
    assert answer.status_code in (200, 409)  # the first of these tests makes it
    again = httpx.get(f"{url}/completions/known/stream", headers={"last-event-id": last}, timeout=TIMEOUT_S)
    error = again.json()["error"]
    assert (again.status_code, error["code"]) == (status, code), error


def test_requests_that_nobody_knows(url: str) -> None:
    answer = httpx.get(f"{url}/completions/nobody/stream", timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "REQUEST_NOT_FOUND")
    answer = httpx.get(f"{url}/completions/{'x' * 300}/stream", timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_ARGUMENT")
    answer = httpx.get(f"{url}/completions/nobody/stream", params={"include_usage": "perhaps"}, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "include_usage")
