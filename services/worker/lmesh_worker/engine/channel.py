"""The engine's end of the pipe to its server: frames of a 4-byte little-endian length and msgpack."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

import msgspec

from lmesh_worker.messages import Command, Report

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 20


class PeerGoneError(ConnectionError):
    """The server closed its end or died; the engine has nobody to work for."""


class Channel:
    """One thread polls it between steps; there is no reader thread to share the interpreter with."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()  # takes any descriptor; select refuses those from 1024 on
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)

    def send(self, report: Report) -> None:
        """Writes one report; waits while the server is behind by more than the socket holds."""
        body = self._encoder.encode(report)
        try:
            self._sock.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise PeerGoneError(str(error)) from error

    def receive(self, *, wait: bool, at_most_s: float | None = None) -> Iterator[Command]:
        """Commands that have come; with `wait` at least one, or none after `at_most_s`. Raises PeerGoneError."""
        longest = None if at_most_s is None else max(1, round(at_most_s * 1000))
        while True:
            yield from self._complete()
            if not self._poll.poll(longest if wait and not self._seen else 0):
                self._seen = False
                return
            self._read()

    _seen = False

    def _read(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except OSError as error:
            raise PeerGoneError(str(error)) from error
        if not data:
            raise PeerGoneError("the server closed the pipe")
        self._buffer += data

    def _complete(self) -> Iterator[Command]:
        while (frame := self._frame()) is not None:
            self._seen = True
            yield self._decoder.decode(frame)

    def _frame(self) -> bytes | None:
        """The next whole frame, taken out of the buffer."""
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return body

    def first_frame(self) -> bytes:
        """Waits for one frame and returns it undecoded: the settings."""
        while (frame := self._frame()) is None:
            self._read()
        return frame
