"""A real Redis (or Valkey) for tests: a process of its own on a unix socket, that can be killed and started again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import redis.asyncio
from lmesh_cli import redis_server as embedded
from lmesh_cli import tether

START_S = 20.0


def memory_only(folder: Path) -> list[str]:
    """The launcher's server, but that it writes nothing."""
    command = embedded.command(embedded.find_server(), folder, folder)
    return tether.command([*command, "--appendonly", "no"])


class RedisServer:
    """The server in one folder; it keeps nothing on disk, so a restarted one is empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return embedded.url(self._folder)

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(*memory_only(self._folder), stdout=subprocess.DEVNULL)
        async with asyncio.timeout(START_S):
            while not await embedded.answers(self._folder):
                assert self._process.returncode is None, "the Redis server ended at its start"
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """SIGKILL; its clients find a broken connection."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    def client(self) -> redis.asyncio.Redis:
        """A client of the test's own; use it as `async with`."""
        return redis.asyncio.from_url(self.url, decode_responses=True)


@asynccontextmanager
async def running_redis() -> AsyncIterator[RedisServer]:
    """A started server, gone at the end. Its folder is short: a unix socket's path has little room."""
    folder = Path(tempfile.mkdtemp(prefix="lmr-"))
    server = RedisServer(folder)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
        shutil.rmtree(folder, ignore_errors=True)
