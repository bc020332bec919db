"""uvicorn's HTTP protocol with bounds on what comes before a body: its size and its time."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lmesh_gateway.errors import ServiceError
from lmesh_gateway.http.errors import HeadersTooLargeError, HeadersTooLateError, error_body

# A head that is still incomplete after this many bytes is refused. It is looked at once per read of the socket, so one
# read more (asyncio's 256 KiB) is held at most.
MAX_HEAD_BYTES = 64 << 10


def bounded(head_timeout_s: float) -> type[BoundedHttpProtocol]:
    """The protocol for one server: uvicorn makes the instances, and passes nothing of ours."""

    class Protocol(BoundedHttpProtocol):
        pass

    Protocol.head_timeout_s = head_timeout_s
    return Protocol


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose line and headers do not end within MAX_HEAD_BYTES (431) or in time (408), and closes.

    The time runs from the connection's start and, after an answer, from the next byte that comes: a client that only
    holds connections open, byte by byte, holds none for longer. uvicorn itself closes those that are quiet.
    """

    head_timeout_s = 10.0
    _head_bytes: int | None = None  # None: not within a head
    _head_timer: asyncio.TimerHandle | None = None  # None: no head is waited for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client; its TLS, where there is one, is agreed."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._head_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A read of the socket."""
        if not self._answering and self._head_timer is None:
            self._await_head()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    b"431 Request Header Fields Too Large",
                    HeadersTooLargeError(f"line and headers are larger than {MAX_HEAD_BYTES} bytes"),
                )
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins: its head follows."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head has ended: what follows is the body."""
        self._head_bytes = None
        self._head_over()
        super().on_headers_complete()

    @property
    def _answering(self) -> bool:
        """A request is being served: nothing else need come meanwhile."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._too_late)

    def _head_over(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        if self._head_bytes is None:  # not a word: nobody reads an answer
            self.transport.close()
            return
        late = HeadersTooLateError(f"line and headers did not end within {self.head_timeout_s:g} s")
        self._refuse(b"408 Request Timeout", late)

    def _refuse(self, status: bytes, error: ServiceError) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps(error_body(error)).encode()
        self.transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % (status, len(body)) + body
        )
        self.transport.close()
