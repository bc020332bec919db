"""The client end of an internal link: one bidirectional stream of batches, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from lmesh_chassis.backoff import Backoff
from lmesh_chassis.errors import RemoteError, from_rpc_error

_log = logging.getLogger(__name__)

Sent = TypeVar("Sent")
Received = TypeVar("Received")
# The generated stubs' call type differs between their sync and async faces; both have what is used here.
StreamCall = Any


class HelloTimeoutError(Exception):
    """The peer took the stream and did not say hello in time."""


class Link(Generic[Sent, Received]):
    """One stream to one peer.

    The outbox is the owner's: `wake()` says that there is something to send, and `collect()` is then asked for all of
    it as one message (None: nothing after all). So what gathers while a write is out, and for `rest_s()` after it, goes
    as one batch, and the owner bounds it. All callbacks run on the event loop and must not block:

    - `open_stream()` starts the call; `hello()` builds its first message.
    - `on_connected(first)` gets the peer's hello; only then is `collect` called for this stream.
    - `on_message(message)` gets each later one.
    - `on_broken(error)` hears that the stream ended (None: the peer ended it without error) and says whether to go on.
    """

    def __init__(
        self,
        open_stream: Callable[[], StreamCall],
        *,
        name: str,
        hello: Callable[[], Sent],
        collect: Callable[[], Sent | None],
        on_connected: Callable[[Received], None],
        on_message: Callable[[Received], None],
        on_broken: Callable[[RemoteError | None], bool],
        backoff: Backoff | None = None,
        hello_timeout_s: float = 10.0,
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._open_stream = open_stream
        self._name = name
        self._hello = hello
        self._collect = collect
        self._on_connected = on_connected
        self._on_message = on_message
        self._on_broken = on_broken
        self._backoff = backoff or Backoff()
        self._hello_timeout_s = hello_timeout_s
        self._rest_s = rest_s
        self._awake = asyncio.Event()
        self._closing = asyncio.Event()
        self.connected = False

    def wake(self) -> None:
        """There is something to send."""
        self._awake.set()

    def close(self) -> None:
        """Sends what is left, half-closes the stream, and lets `run` return once the peer ends its side."""
        self._closing.set()
        self._awake.set()

    async def run(self) -> None:
        """Keeps the link up until `close`, or until `on_broken` says to stop. Cancelling it drops the stream."""
        while not self._closing.is_set():
            error = await self._session()
            if not self._on_broken(error) or self._closing.is_set():
                return
            delay = self._backoff.next_s()
            _log.info("link down", extra={"link": self._name, "reason": _words(error), "retry_in_s": round(delay, 3)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._closing.wait()

    async def _session(self) -> RemoteError | None:
        call = self._open_stream()
        writer: asyncio.Task[None] | None = None
        try:
            await self._greet(call)
            writer = asyncio.create_task(self._write(call))
            while (message := await call.read()) is not grpc.aio.EOF:
                self._on_message(message)
            return _status(await call.code(), await call.details())
        except grpc.RpcError as error:
            return from_rpc_error(error)
        except HelloTimeoutError:
            return RemoteError(grpc.StatusCode.UNAVAILABLE, "HELLO_TIMEOUT", "the peer did not say hello", "", None)
        finally:
            self.connected = False
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    async def _greet(self, call: StreamCall) -> None:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                await call.write(self._hello())
                first = await call.read()
        except TimeoutError:
            raise HelloTimeoutError from None
        except asyncio.InvalidStateError:  # the call ended while the hello was being written
            first = grpc.aio.EOF
        if first is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        self._backoff.reset()
        self.connected = True
        self._on_connected(first)
        self._awake.set()

    async def _write(self, call: StreamCall) -> None:
        try:
            while True:
                await self._awake.wait()
                self._awake.clear()
                while (message := self._collect()) is not None:
                    await call.write(message)
                    if (rest_s := self._rest_s()) > 0:
                        await asyncio.sleep(rest_s)
                if self._closing.is_set():
                    await call.done_writing()
                    return
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader hears of the end too, with its status


def _status(code: grpc.StatusCode, details: str) -> RemoteError | None:
    return None if code is grpc.StatusCode.OK else RemoteError(code, "", details or "", "", None)


def _words(error: RemoteError | None) -> str:
    return "ended by the peer" if error is None else f"{error.code.name} {error.reason} {error.message}".strip()
