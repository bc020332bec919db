"""uvicorn's HTTP protocol with a bound on what comes before a body, which it does not have itself."""

from __future__ import annotations

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lmesh_gateway.http.errors import HeadersTooLargeError, error_body

# A head that is still incomplete after this many bytes is refused. It is looked at once per read of the socket, so one
# read more (asyncio's 256 KiB) is held at most.
MAX_HEAD_BYTES = 64 << 10


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose line and headers do not end within MAX_HEAD_BYTES with a 431, and closes."""

    _head_bytes: int | None = None  # None: not within a head

    def data_received(self, data: bytes) -> None:
        """A read of the socket."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins: its head follows."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head has ended: what follows is the body."""
        self._head_bytes = None
        super().on_headers_complete()

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        told = error_body(HeadersTooLargeError(f"line and headers are larger than {MAX_HEAD_BYTES} bytes"))
        body = json.dumps(told).encode()
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
        )
        self.transport.close()
