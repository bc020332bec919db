"""The embedded Redis: which server is found, how it is started, and that it goes when told to or when we die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import redis.asyncio
from lmesh_cli import process_table, redis_server, tether
from lmesh_cli.redis_server import RedisNotFoundError, find_server
from lmesh_cli.run_dir import RunDir

WAIT_S = 20.0


async def _rewritten(client: redis.asyncio.Redis) -> bool:
    return not (await client.info("persistence"))["aof_rewrite_in_progress"]


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


class TestFinding:
    def test_explicit_path_wins(self, tmp_path: Path) -> None:
        mine, other = program(tmp_path / "mine"), program(tmp_path / "bin" / "redis-server")
        assert find_server({"LMESH_REDIS_SERVER": str(mine), "PATH": str(other.parent)}) == mine

    def test_explicit_path_must_run(self, tmp_path: Path) -> None:
        with pytest.raises(RedisNotFoundError, match="LMESH_REDIS_SERVER"):
            find_server({"LMESH_REDIS_SERVER": str(tmp_path / "nothing")})

    def test_path_is_searched_redis_first(self, tmp_path: Path) -> None:
        valkey = program(tmp_path / "valkey-server")
        assert find_server({"PATH": str(tmp_path)}) == valkey
        server = program(tmp_path / "redis-server")
        assert find_server({"PATH": str(tmp_path)}) == server

    def test_bundled_server_is_the_last_resort(self, tmp_path: Path) -> None:
        assert find_server({"PATH": str(tmp_path)}).name == "valkey-server"


@asynccontextmanager
async def running(run: Path):
    """A server in a run folder; killed at the end."""
    folder, data = RunDir(run).socket_folder(), RunDir(run).redis_data()
    redis_server.socket_path(folder).unlink(missing_ok=True)
    command = tether.command(redis_server.command(find_server({"PATH": ""}), folder, data))
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(WAIT_S):
            while not await redis_server.answers(folder):
                assert process.returncode is None
                await asyncio.sleep(0.01)
        yield folder, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def server(tmp_path: Path):
    async with running(tmp_path) as found:
        yield found


class TestServer:
    async def test_serves_redis_py_over_its_socket(self, server) -> None:
        folder, _ = server
        async with redis.asyncio.from_url(redis_server.url(folder)) as client:
            script = await client.script_load("return redis.call('SET', KEYS[1], ARGV[1], 'EX', 9)")
            await client.evalsha(script, 1, "lmesh:req:1", "QUEUED")
            assert await client.get("lmesh:req:1") == b"QUEUED"
            config = await client.config_get("maxmemory*", "save", "append*", "aof-use-rdb-preamble")
        assert config["maxmemory"] == str(256 * 2**20)
        assert config["maxmemory-policy"] == "volatile-ttl"
        assert (config["save"], config["appendonly"], config["appendfsync"]) == ("", "yes", "everysec")
        assert config["aof-use-rdb-preamble"] == "no"  # a memory image is its server's own, commands are everybody's

    async def test_tells_its_version(self, server) -> None:
        name, number = (await redis_server.version(server[0])).split()
        assert name in ("Redis", "Valkey")
        assert int(number.split(".")[0]) >= 6

    async def test_nobody_else_can_reach_it(self, server) -> None:
        folder, process = server
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(redis_server.socket_path(folder).stat().st_mode) == 0o700
        families = {c.family for c in psutil.Process(process.pid).net_connections(kind="all") if c.status == "LISTEN"}
        assert families <= {socket.AF_UNIX}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    async def test_what_was_answered_is_there_again(self, tmp_path: Path, number: signal.Signals) -> None:
        async with running(tmp_path) as (folder, process):
            async with redis.asyncio.from_url(redis_server.url(folder)) as client:
                await client.hset("lmesh:adapters", "mine", "1")
                await client.xadd("lmesh:job:1:metrics", {"t": "1.5", "b": b"\xff\x00"}, id="7-1")
                await client.set("brief", "value", px=300)
            process.send_signal(number)
            async with asyncio.timeout(WAIT_S):
                assert await process.wait() == (0 if number == signal.SIGTERM else -number)
        await asyncio.sleep(0.35)
        async with running(tmp_path) as (folder, _), redis.asyncio.from_url(redis_server.url(folder)) as client:
            assert await client.hgetall("lmesh:adapters") == {b"mine": b"1"}
            assert await client.xrange("lmesh:job:1:metrics") == [(b"7-1", {b"t": b"1.5", b"b": b"\xff\x00"})]
            assert await client.get("brief") is None  # what a key had left to live went on while the server was down

    async def test_its_file_does_not_grow_with_what_is_gone(self, server, tmp_path: Path) -> None:
        """Heartbeats and records that lapse are most of what is written: 160 MB here, of a key of 200 KB."""
        folder, _ = server
        data = RunDir(tmp_path).redis_data()
        async with redis.asyncio.from_url(redis_server.url(folder)) as client:
            for _ in range(16):
                for _ in range(50):
                    await client.set("lmesh:worker:1", b"x" * 200_000)
                async with asyncio.timeout(WAIT_S):
                    while not await _rewritten(client):  # noqa: ASYNC110 - another process does it
                        await asyncio.sleep(0.05)
            assert len(await client.get("lmesh:worker:1")) == 200_000
        assert _bytes_in(data) < 80 * 2**20

    async def test_absent_server_answers_nothing(self, tmp_path: Path) -> None:
        assert not await redis_server.answers(tmp_path)
        assert await redis_server.version(tmp_path) == ""


def test_dies_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import subprocess, sys, time
        from pathlib import Path
        from lmesh_cli import redis_server, tether
        folder = Path(sys.argv[1])
        command = redis_server.command(redis_server.find_server(), folder, folder)
        child = subprocess.Popen(tether.command(command), stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
        time.sleep(600)
        """
    )
    folder = RunDir(tmp_path).socket_folder()
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + WAIT_S
        while not asyncio.run(redis_server.answers(folder)):
            assert time.monotonic() < deadline
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while process_table.birth(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_table.birth(pid) is None
