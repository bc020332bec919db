"""The server's end of the pipe to the engine process: spawns it, talks to it, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from lmesh_worker.errors import ENGINE_DIED, EngineFailedError
from lmesh_worker.messages import (
    AdapterLoaded,
    Command,
    Fatal,
    LoadAdapter,
    ProgressChange,
    Ready,
    Report,
    Shutdown,
    StepReport,
)

ENGINE_COMMAND = (sys.executable, "-P", "-m", "lmesh_worker.engine.process")

# Runs in between and becomes the engine: PR_SET_PDEATHSIG (1) with SIGKILL (9) survives the exec. A preexec_fn would do
# the same in a plain fork of this process, with whatever threads and gRPC's fork handlers it has by then.
_LAUNCHER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
_DIE_WITH_PARENT = (sys.executable, "-I", "-S", "-c", _LAUNCHER)

_LENGTH = struct.Struct("<I")
# Reports that may wait in the pipe before a step waits for this process. The kernel gives as much as its limit allows,
# by default twice what it does unasked: 200 steps of 64 sequences rather than 100.
_REPORTS_BYTES = 4 << 20
_encoder = msgspec.msgpack.Encoder()


def frame(message: object) -> bytes:
    """4-byte little-endian length, then msgpack."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class EngineClient:
    """A running engine process.

    Build it with `spawn` before gRPC starts and from the thread that lives longest: the engine is killed when that
    thread ends. Then `connect` on the event loop, `ready`, and read `reports` until it raises.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self._sock = sock
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._loads: dict[str, asyncio.Future[AdapterLoaded]] = {}

    @classmethod
    def spawn(cls, source: str, config: object, command: Sequence[str] = ENGINE_COMMAND) -> EngineClient:
        """Starts the engine with `--source S --fd N`, N its end of the socketpair; `config` is its first frame."""
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REPORTS_BYTES)
        with theirs:
            process = subprocess.Popen(
                [*_DIE_WITH_PARENT, str(os.getpid()), *command, "--source", source, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # whatever a library prints is no place for our ready line's readers
            )
        with contextlib.suppress(BrokenPipeError):  # died already: `ready` will say so
            ours.sendall(frame(config))
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    async def connect(self) -> None:
        """Hands the socket to the running event loop."""
        self._sock.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._sock)

    def send(self, command: Command) -> None:
        """Queues a command; to a dead engine it goes nowhere, and `reports` says so."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(command))

    @property
    def backlog_bytes(self) -> int:
        """Commands that wait here because the pipe is full: the engine does not read."""
        return 0 if self._writer is None else self._writer.transport.get_write_buffer_size()

    async def ready(self, timeout_s: float, on_progress: Callable[[int], None] = lambda progress: None) -> Ready:
        """Waits until the engine has loaded its model; EngineFailedError when it cannot."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    report = await self._next()
                    if isinstance(report, Ready):
                        return report
                    if isinstance(report, ProgressChange):
                        on_progress(report.progress)
        except TimeoutError:
            raise EngineFailedError("ENGINE_START_TIMEOUT", f"not ready after {timeout_s:g} s") from None

    async def reports(self) -> AsyncIterator[StepReport | ProgressChange]:
        """What the engine says from `Ready` on; ends by EngineFailedError, whatever the cause."""
        try:
            while True:
                report = await self._next()
                if isinstance(report, AdapterLoaded):
                    self._answer(report)
                elif not isinstance(report, Ready):
                    yield report
        finally:
            for load in self._loads.values():
                load.cancel()

    async def load_adapter(self, digest: str, folder: str) -> AdapterLoaded:
        """Has the engine hold an adapter; somebody must be reading `reports`, and is stopped when that one is."""
        load = self._loads.get(digest)
        if load is None or load.done():
            load = self._loads[digest] = asyncio.get_running_loop().create_future()
            self.send(LoadAdapter(digest, folder))
        return await asyncio.shield(load)

    def _answer(self, loaded: AdapterLoaded) -> None:
        load = self._loads.pop(loaded.digest, None)
        if load is not None and not load.done():
            load.set_result(loaded)

    async def _next(self) -> Ready | StepReport | ProgressChange | AdapterLoaded:
        assert self._reader is not None, "connect() first"
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            report: Report = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            raise EngineFailedError(ENGINE_DIED, await self._cause()) from None
        if isinstance(report, Fatal):
            raise EngineFailedError(report.reason, report.message)
        return report

    async def _cause(self) -> str:
        status = await self._wait(5.0)
        if status is None:
            return "the engine closed its pipe"
        return f"the engine was ended by signal {-status}" if status < 0 else f"the engine exited with status {status}"

    async def stop(self, timeout_s: float) -> None:
        """Asks the engine to leave, kills it if it does not, and reaps it."""
        self.send(Shutdown())
        if await self._wait(timeout_s) is None:
            self.kill()
        if self._writer is not None:
            self._writer.close()

    def kill(self) -> None:
        """Ends the engine at once and reaps it; harmless when it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._sock.close()

    async def _wait(self, timeout_s: float) -> int | None:
        try:
            return await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return None
