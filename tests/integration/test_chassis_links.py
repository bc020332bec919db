"""Links that come back and processes that are kept: against a real server and real children."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from lmesh.worker.v1 import run_pb2, run_pb2_grpc
from lmesh_chassis.backoff import Backoff
from lmesh_chassis.channel import connect
from lmesh_chassis.errors import RemoteError
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.links import Link
from lmesh_chassis.processes import run_processes
from lmesh_chassis.server import GrpcServer


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is watched is another process
            await asyncio.sleep(0.005)


class Peer(run_pb2_grpc.RunServiceServicer):
    """Greets (unless told to be silent), then records what comes until it is told to break."""

    def __init__(self) -> None:
        self.hellos = 0
        self.messages: list[run_pb2.RunRequest] = []
        self.silent = False
        self.hold = asyncio.Event()
        self.hold.set()
        self.break_now = asyncio.Event()

    async def Run(self, request_iterator: Any, context: Any) -> None:
        await context.read()
        self.hellos += 1
        if self.silent:
            await asyncio.Event().wait()
        await context.write(run_pb2.RunResponse(hello=run_pb2.WorkerRunHello(worker_id="p")))
        reader = asyncio.create_task(self._read(context))
        broken = asyncio.create_task(self.break_now.wait())
        await asyncio.wait({reader, broken}, return_when=asyncio.FIRST_COMPLETED)
        reader.cancel()
        if broken.done():
            self.break_now.clear()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")

    async def _read(self, context: Any) -> None:
        while True:
            await self.hold.wait()
            if (message := await context.read()) is grpc.aio.EOF:
                return
            self.messages.append(message)


class Owner:
    """The other end: an outbox of acknowledgements, and a diary."""

    def __init__(self, channel: grpc.aio.Channel, **options: Any) -> None:
        self.outbox: list[int] = []
        self.connects = 0
        self.breaks: list[RemoteError | None] = []
        stub = run_pb2_grpc.RunServiceStub(channel)
        self.link: Link[run_pb2.RunRequest, run_pb2.RunResponse] = Link(
            lambda: stub.Run(),
            name="test",
            hello=lambda: run_pb2.RunRequest(hello=run_pb2.RunHello(gateway_id="g")),
            collect=self._collect,
            on_connected=self._connected,
            on_message=lambda message: None,
            on_broken=self._broken,
            backoff=Backoff(first_s=0.01, most_s=0.05),
            **options,
        )

    def send(self, slot: int) -> None:
        self.outbox.append(slot)
        self.link.wake()

    def _collect(self) -> run_pb2.RunRequest | None:
        if not self.outbox:
            return None
        slots, self.outbox = self.outbox, []
        return run_pb2.RunRequest(aborts=[run_pb2.Abort(slot=slot) for slot in slots])

    def _connected(self, response: run_pb2.RunResponse) -> None:
        assert response.hello.worker_id == "p"
        self.connects += 1

    def _broken(self, error: RemoteError | None) -> bool:
        self.breaks.append(error)
        return True


@asynccontextmanager
async def linked(**options: Any) -> AsyncIterator[tuple[Peer, Owner, asyncio.Task[None]]]:
    peer = Peer()
    server = GrpcServer("127.0.0.1:0", domain="lmesh.test")
    server.add(run_pb2_grpc.add_RunServiceServicer_to_server, peer, "lmesh.worker.v1.RunService")
    port = await server.start()
    async with connect(f"127.0.0.1:{port}", retries=False) as channel:
        owner = Owner(channel, **options)
        task = asyncio.create_task(owner.link.run())
        try:
            yield peer, owner, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await server.drain(0)


async def test_a_link_comes_back_and_goes_on() -> None:
    async with linked() as (peer, owner, _):
        owner.send(1)
        await until(lambda: len(peer.messages) == 1)
        peer.break_now.set()
        await until(lambda: owner.connects == 2)
        owner.send(2)
        await until(lambda: len(peer.messages) == 2)
    error = owner.breaks[0]
    assert error is not None
    assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "broken on purpose")
    assert [abort.slot for message in peer.messages for abort in message.aborts] == [1, 2]


async def test_what_gathers_while_a_link_rests_goes_as_one_message() -> None:
    async with linked(rest_s=lambda: 0.5) as (peer, owner, _):
        await until(lambda: owner.link.connected)
        owner.send(1)  # finds no message before it, so does not wait
        await until(lambda: len(peer.messages) == 1)
        for slot in (2, 3):
            owner.send(slot)
            await asyncio.sleep(0.02)  # each would have been written by then
        await until(lambda: len(peer.messages) == 2)
    assert [[abort.slot for abort in message.aborts] for message in peer.messages] == [[1], [2, 3]]


async def test_closing_sends_what_is_left_and_ends_well() -> None:
    async with linked() as (peer, owner, task):
        await until(lambda: owner.link.connected)
        for slot in range(100):
            owner.send(slot)
        owner.link.close()
        await asyncio.wait_for(task, 30)
    assert [abort.slot for message in peer.messages for abort in message.aborts] == list(range(100))
    assert len(peer.messages) == 1  # gathered into one batch
    assert owner.breaks == [None]


async def test_a_peer_without_a_hello_is_given_up_and_tried_again() -> None:
    async with linked(hello_timeout_s=0.05) as (peer, owner, _):
        peer.silent = True
        peer.break_now.set()
        await until(lambda: any(error is not None and error.reason == "HELLO_TIMEOUT" for error in owner.breaks))
        peer.silent = False
        peer.break_now.clear()
        before = owner.connects
        await until(lambda: owner.connects > before)


CHILD = """
import os, signal, sys, time
folder, index = sys.argv[1], os.environ["INDEX"]
if index == "crash":
    sys.exit(7)
signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))
open(f"{folder}/{index}-{os.getpid()}", "w").close()
while True:
    time.sleep(60)
"""


def pids(folder: Path, index: str = "*") -> set[int]:
    """Children that have got going so far."""
    return {int(path.name.split("-")[1]) for path in folder.glob(f"{index}-*")}


async def test_copies_are_restarted_and_stopped_together(tmp_path: Path) -> None:
    shutdown, died = Shutdown(), []
    argv = (sys.executable, "-c", CHILD, str(tmp_path))
    running = asyncio.create_task(
        run_processes(2, argv, shutdown, environ=lambda index: {"INDEX": str(index)}, on_exit=died.append)
    )
    await until(lambda: len(pids(tmp_path)) == 2)
    (victim,) = pids(tmp_path, "0")
    os.kill(victim, signal.SIGKILL)
    await until(lambda: len(pids(tmp_path, "0")) == 2)
    assert died == [victim]
    shutdown.request()
    assert await asyncio.wait_for(running, 30) == 0
    assert len(died) == 3
    assert set(died) == pids(tmp_path)
    for pid in died:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_copy_that_never_gets_going_ends_the_service(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", CHILD, str(tmp_path))
    status = await asyncio.wait_for(run_processes(1, argv, Shutdown(), environ=lambda index: {"INDEX": "crash"}), 60)
    assert status == 7
