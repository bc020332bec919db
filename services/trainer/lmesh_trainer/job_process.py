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
from lmesh_trainer.spec import JobSpec

_LONGEST_FRAME = 256 << 20  # a preview of long rows is the largest
_MODULE = "lmesh_trainer.process"


class JobProcess:
    """One job in one process, or in `world` of them under torchrun."""

    def __init__(self, folder: Path, *, world: int = 1) -> None:
        self._folder, self._world = folder, world
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
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
        if self._world > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._world)]
            command = [*launcher, *command]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", *command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    async def _hear(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: asyncio.Queue[Event | None]
    ) -> None:
        self._writer = writer
        for wish in self._wishes:
            self._write(wish)
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
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        await heard.put(None)

    def ask(self, wish: Wish) -> None:
        """Asks the job to stop or to be cancelled; heard at its next step."""
        self._wishes.append(wish)
        self._write(wish)

    def _write(self, wish: Wish) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(f"{wish}\n".encode())

    async def kill(self) -> None:
        """Ends the process and all ranks at once; harmless when they are gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
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
