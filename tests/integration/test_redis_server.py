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
from pathlib import Path

import psutil
import pytest
import redis.asyncio
from lmesh_cli import process_table, redis_server, tether
from lmesh_cli.redis_server import RedisNotFoundError, find_server
from lmesh_cli.run_dir import RunDir

WAIT_S = 20.0


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


@pytest.fixture
async def server(tmp_path: Path):
    folder = RunDir(tmp_path).socket_folder()
    command = tether.command(redis_server.command(find_server({"PATH": ""}), folder))
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


class TestServer:
    async def test_serves_redis_py_over_its_socket(self, server) -> None:
        folder, _ = server
        async with redis.asyncio.from_url(redis_server.url(folder)) as client:
            script = await client.script_load("return redis.call('SET', KEYS[1], ARGV[1], 'EX', 9)")
            await client.evalsha(script, 1, "lmesh:req:1", "QUEUED")
            assert await client.get("lmesh:req:1") == b"QUEUED"
            config = await client.config_get("maxmemory*", "save", "appendonly")
        assert config["maxmemory"] == str(256 * 2**20)
        assert config["maxmemory-policy"] == "volatile-ttl"
        assert (config["save"], config["appendonly"]) == ("", "no")

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

    async def test_ends_on_sigterm_and_writes_nothing(self, server) -> None:
        folder, process = server
        async with redis.asyncio.from_url(redis_server.url(folder)) as client:
            await client.set("key", "value")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0
        assert [path.name for path in folder.iterdir() if path.suffix != ".sock"] == []

    async def test_absent_server_answers_nothing(self, tmp_path: Path) -> None:
        assert not await redis_server.answers(tmp_path)
        assert await redis_server.version(tmp_path) == ""


def test_dies_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import subprocess, sys, time
        from pathlib import Path
        from lmesh_cli import redis_server, tether
        command = redis_server.command(redis_server.find_server(), Path(sys.argv[1]))
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
