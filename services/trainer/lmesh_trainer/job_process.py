"""The server's end of a job's process: starts it, hears it, asks it to stop, notices its death. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from lmesh_trainer.events import Ended, Event, Outcome
from lmesh_trainer.messages import LENGTH, Wish, decode
from lmesh_trainer.orders import Gang
from lmesh_trainer.spec import JobSpec

_LONGEST_FRAME = 256 << 20  # a preview of long rows is the largest
_MODULE = "lmesh_trainer.process"


class JobProcess:
    """One job in one process, or in `world` of them under torchrun; with a gang they are part of a larger world."""

    def __init__(self, folder: Path, *, world: int = 1, gang: Gang | None = None) -> None:
        self._folder, self._world, self._gang = folder, world, gang
        self._process: asyncio.subprocess.Process | None = None
        self._writers: list[asyncio.StreamWriter] = []  # one a rank; the one that speaks heeds wishes
        self._wishes: list[Wish] = []

    @property
    def pid(self) -> int:
        """Of the process that was started; 0 before that."""
        return 0 if self._process is None else self._process.pid

    async def events(self, spec: JobSpec) -> AsyncGenerator[Event, None]:
        """Runs the job in its folder and gives what it says; the last is always `Ended`.

        A process that dies without a word ends as FAILED with JOB_DIED: run the folder again and it goes on from its
        last checkpoint. Leaving the iterator kills the process.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "spec.json").write_bytes(msgspec.json.encode(spec))
        # Sockets' paths may be 108 bytes long, and a job's folder may lie deep.
        with tempfile.TemporaryDirectory(prefix="lmesh-job-") as place:
            path = str(Path(place) / "line")
            heard: asyncio.Queue[Event | None] = asyncio.Queue(1024)
            server = await asyncio.start_unix_server(lambda r, w: self._hear(r, w, heard), path)
            async with server:
                await self._start(path)
                watch = asyncio.create_task(self._watch(heard))
                try:
                    async for event in _until_ended(heard):
                        yield event
                finally:
                    watch.cancel()
                    await self.kill()

    async def _start(self, path: str) -> None:
        command = ["-m", _MODULE, "--folder", str(self._folder), "--socket", path]
        if self._world > 1 or self._gang is not None:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self._world), *self._meeting()]
            command = [*launcher, *command]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", *command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    def _meeting(self) -> list[str]:
        if self._gang is None:
            return ["--standalone"]
        host, _, port = self._gang.rendezvous.rpartition(":")
        place = ["--nnodes", str(self._gang.nodes), "--node-rank", str(self._gang.node)]
        return [*place, "--master-addr", host, "--master-port", port]

    async def _hear(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: asyncio.Queue[Event | None]
    ) -> None:
        self._writers.append(writer)
        for wish in self._wishes:
            self._write(wish, writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > _LONGEST_FRAME:
                    break
                await heard.put(decode(await reader.readexactly(length)))
        writer.close()

    async def _watch(self, heard: asyncio.Queue[Event | None]) -> None:
        """Says that the process is gone, after everything that it said."""
        assert self._process is not None
        await self._process.wait()
        for writer in self._writers:
            if self._process.returncode and self._process.returncode < 0:
                writer.transport.abort()  # killed: ranks of a torchrun may have outlived it
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await heard.put(None)

    def ask(self, wish: Wish) -> None:
        """Asks the job to stop or to be cancelled; heard at its next step."""
        self._wishes.append(wish)
        for writer in self._writers:
            self._write(wish, writer)

    @staticmethod
    def _write(wish: Wish, writer: asyncio.StreamWriter) -> None:
        if not writer.is_closing():
            writer.write(f"{wish}\n".encode())

    async def kill(self) -> None:
        """Ends the process and all ranks at once; harmless when they are gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for writer in self._writers:  # torchrun's ranks have sessions of their own; each leaves when its line breaks
            writer.transport.abort()
        await self._process.wait()


async def _until_ended(heard: asyncio.Queue[Event | None]) -> AsyncGenerator[Event, None]:
    while True:
        event = await heard.get()
        if event is None:
            message = "the job's process died without a word"
            event = Ended(outcome=Outcome.FAILED, reason="JOB_DIED", message=message)
        yield event
        if isinstance(event, Ended):
            return
