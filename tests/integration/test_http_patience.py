"""Clients that are slow on purpose: connections without a whole head end in time, and nothing else does."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from lmesh_gateway.http import body
from lmesh_gateway.http_server import HttpServer, bind

from tests.scripted_core import served

HEAD_TIMEOUT_S = 0.4
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """Answers after twice as long as a head may take; on /early before the body has come."""
    if scope["path"] != "/early":
        await asyncio.sleep(2 * HEAD_TIMEOUT_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    sock: socket.socket = bind("127.0.0.1:0", reuse_port=False)
    server = HttpServer(answering, sock, drain_timeout_s=1, head_timeout_s=HEAD_TIMEOUT_S)
    await server.start()
    yield server.port
    await server.drain()


async def opened(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All until the server closes."""
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def trickle(writer: asyncio.StreamWriter, drop: bytes) -> None:
    while True:
        writer.write(drop)
        await asyncio.sleep(HEAD_TIMEOUT_S / 8)


@pytest.mark.parametrize(
    ("said", "drop", "answer"),
    [
        (b"", b"", b""),
        (b"", b"\r\n", b""),  # what may come before a request line is no request
        (GET, b"", b"HTTP/1.1 408"),
        (b"G", b"x-a: b\r\n", b"HTTP/1.1 4"),  # 408, or 400 for what the drops make of the request line
        (GET, b"x-a: b\r\n", b"HTTP/1.1 408"),
    ],
)
async def test_a_head_ends_in_time_or_the_connection_does(port: int, said: bytes, drop: bytes, answer: bytes) -> None:
    reader, writer = await opened(port)
    writer.write(said)
    dropping = asyncio.create_task(trickle(writer, drop)) if drop else None
    try:
        told = await rest(reader)
    finally:
        if dropping is not None:
            dropping.cancel()
        writer.close()
    assert told.startswith(answer)
    assert (b"HEADERS_TOO_LATE" in told) == (b" 408" in told)


async def test_a_slow_answer_is_not_cut(port: int) -> None:
    reader, writer = await opened(port)
    for _ in range(2):  # of the same connection
        writer.write(GET + b"\r\n")
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and await reader.readexactly(2) == b"ok"
    writer.write(GET)
    assert (await rest(reader)).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_half_a_head_behind_a_request_does_not_cut_its_answer(port: int) -> None:
    reader, writer = await opened(port)
    writer.write(GET + b"\r\n" + GET)
    assert (await rest(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_a_body_that_nobody_waits_for_holds_nothing(port: int) -> None:
    reader, writer = await opened(port)
    began = time.monotonic()
    writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    dropping = asyncio.create_task(trickle(writer, b"y"))
    try:
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    finally:
        dropping.cancel()
        writer.close()
    assert time.monotonic() - began < 20


async def test_a_body_ends_in_time_or_its_request_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_READ_TIMEOUT_S", HEAD_TIMEOUT_S)
    with served() as (url, core):
        reader, writer = await opened(int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        dropping = asyncio.create_task(trickle(writer, b"y"))
        try:
            told = await rest(reader)
        finally:
            dropping.cancel()
            writer.close()
        assert told.startswith(b"HTTP/1.1 408") and b"BODY_TOO_LATE" in told
        assert not core.requests
