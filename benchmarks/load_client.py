"""One load client: its order as JSON on stdin, `ready`, then the start time on stdin, and what it saw on stdout.

Run by serve_online.py, several at a time, so that the load does not share an interpreter with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import asdict, dataclass, field

import grpc.aio
import uvloop
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from mesh_system import request_of
from process_age import now
from workloads import Ids, Job

# Of a process: each is a connection, as each of so many clients would have one, and lands at one gateway process.
_MOST_CHANNELS = 16
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a client does: `streams` requests at a time, each `rounds` times; or one request at each of `arrivals`."""

    target: str
    seed: int
    vocab: int
    prompt: int
    new: int
    streams: int = 0
    rounds: int = 1
    arrivals: list[float] = field(default_factory=list)  # seconds after the start
    timeline: bool = False  # ask afterwards how long the engine took to the first output


@dataclass(slots=True)
class Seen:
    """One request as its client saw it, in seconds of the machine's clock; `error` when it did not end well."""

    begin: float
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # between one delta and the next
    engine_s: float = 0.0  # the engine's own part of the time to the first token
    error: str = ""


class Client:
    """Carries out an order over its own connections."""

    def __init__(self, order: Order) -> None:
        self._order = order
        count = order.streams or len(order.arrivals)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = range(max(1, min(_MOST_CHANNELS, count)))
        self._channels = [grpc.aio.insecure_channel(order.target, options=options) for _ in channels]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        ids = Ids(random.Random(order.seed), min(100, order.vocab // 2), min(10_000, order.vocab))
        total = order.streams * order.rounds or len(order.arrivals)
        self._requests = [request_of(Job(ids(order.prompt), order.new)) for _ in range(total)]

    async def connect(self) -> None:
        """Returns when every connection is there."""
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def run(self, begin: float) -> list[Seen]:
        """Starts at `begin`; returns when all requests have ended."""
        await asyncio.sleep(max(0.0, begin - now()))
        order = self._order
        if order.arrivals:
            tasks = (self._later(i, begin + at) for i, at in enumerate(order.arrivals))
            return list(await asyncio.gather(*tasks))
        streams = await asyncio.gather(*(self._stream(i) for i in range(order.streams)))
        return [seen for stream in streams for seen in stream]

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _stream(self, index: int) -> list[Seen]:
        return [await self._one(index + turn * self._order.streams) for turn in range(self._order.rounds)]

    async def _later(self, index: int, at: float) -> Seen:
        await asyncio.sleep(max(0.0, at - now()))
        return await self._one(index)

    async def _one(self, index: int) -> Seen:
        stub, request_id = self._stubs[index % len(self._stubs)], ""
        seen = Seen(now())
        last = seen.begin
        try:
            async for event in stub.Generate(self._requests[index], timeout=_TIMEOUT_S):
                if event.HasField("delta"):
                    at = now()
                    if seen.tokens:
                        seen.gaps.append(round(at - last, 6))
                    else:
                        seen.first = at
                    last = at
                    seen.tokens += len(event.delta.token_ids)
                elif event.HasField("accepted"):
                    request_id = event.accepted.request_id
            seen.end = now()
            if seen.tokens != self._order.new:
                seen.error = f"{seen.tokens} tokens came, {self._order.new} were asked for"
            elif self._order.timeline:
                seen.engine_s = await self._engine_seconds(stub, request_id)
        except grpc.aio.AioRpcError as error:
            seen.end, seen.error = now(), f"{error.code().name}: {error.details()}"
        return seen

    @staticmethod
    async def _engine_seconds(stub: inference_pb2_grpc.InferenceServiceAsyncStub, request_id: str) -> float:
        """From the engine's taking of the request to its first output, from the request's timeline."""
        record = await stub.GetRequest(pb.GetRequestRequest(request_id=request_id), timeout=_TIMEOUT_S)
        detail = next(event.detail for event in record.timeline if event.event == "first_token")
        return (int(detail["queue_us"]) + int(detail["prefill_us"])) / 1e6


async def serve() -> None:
    """The process's life."""
    order = Order(**json.loads(await _line()))
    client = Client(order)
    await client.connect()
    print("ready", flush=True)
    found = await client.run(float(await _line()))
    print(json.dumps([asdict(seen) for seen in found]), flush=True)
    await client.close()


async def _line() -> str:
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        raise SystemExit("the parent is gone")
    return line


if __name__ == "__main__":
    uvloop.run(serve())
