"""Many streams on a real mesh at once, each gone on with by Resume when its connection breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis.errors import from_rpc_error

from tests.chaos.real_mesh import MODEL

RETRY_S = 0.2
_OWN = [("grpc.use_local_subchannel_pool", 1)]
TIMEOUT_S = 120.0
# Nothing was decided by these: the connection or the process behind it has gone.
BROKEN = frozenset({grpc.StatusCode.UNAVAILABLE})
# A gateway that has just begun says one of these, or one whose Redis has just gone.
TRY_AGAIN = frozenset(
    {"LEDGER_UNAVAILABLE", "LEDGER_BEHIND", "SCHEDULER_UNAVAILABLE", "MODEL_NOT_FOUND", "MODEL_LOADING"}
)


def request(name: str, *, greedy: bool, n: int = 1, max_tokens: int = 300) -> pb.GenerateRequest:
    """A request whose output follows from its name."""
    return pb.GenerateRequest(
        model=MODEL,
        text=pb.TextInput(prompt=f"Once upon a time, {name}"),
        sampling=pb.SamplingParams(temperature=0.0 if greedy else 1.0, seed=sum(name.encode()), n=n),
        stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=True),
        on_disconnect=pb.ON_DISCONNECT_DETACH,
    )


def crowd(prefix: str, count: int, *, max_tokens: int = 300) -> list[pb.GenerateRequest]:
    """Half greedy, half sampled, the last one with three choices; ids are unique by `prefix`."""
    found = []
    for i in range(count):
        made = request(f"s{i}", greedy=i % 2 == 0, n=3 if i == count - 1 else 1, max_tokens=max_tokens)
        made.request_id = f"{prefix}-{i}"
        made.durability = pb.DURABILITY_SYNC if i % 4 < 2 else pb.DURABILITY_ASYNC  # of both halves
        found.append(made)
    return found


@dataclass
class Received:
    """What one client got."""

    request: pb.GenerateRequest
    ids: list[list[int]] = field(default_factory=list)
    accepted: bool = False
    finished: bool = False
    durable: bool = False
    error: str = ""  # reason; "" is none
    resumes: int = 0
    behind: int = 0  # times that the ledger had less than it, so that it took all of it again
    first_s: float = 0.0  # from the call to the first id
    gap_s: float = 0.0  # longest between two deltas

    def __post_init__(self) -> None:
        n = max(1, self.request.sampling.n)
        self.ids = [[] for _ in range(n)]

    def keep(self, have: list[int]) -> None:
        """The ledger has so many ids of each choice; what an ASYNC stream was shown beyond them comes again."""
        if self.request.durability != pb.DURABILITY_SYNC and any(
            h < len(i) for h, i in zip(have, self.ids, strict=True)
        ):
            self.behind += 1
            self.ids = [ids[:count] for ids, count in zip(self.ids, have, strict=True)]

    @property
    def count(self) -> int:
        """Ids so far, over all choices."""
        return sum(map(len, self.ids))


class Crowd:
    """Streams that run together. With `replay` they ran before, and are asked for again from the ledger."""

    def __init__(self, target: str, requests: list[pb.GenerateRequest], *, replay: bool = False) -> None:
        self._target = target
        self.received = [Received(r, accepted=replay, resumes=int(replay)) for r in requests]

    async def run(self, on_flow: Callable[[], None] | None = None, *, flow: int = 8) -> list[Received]:
        """All of them to their ends; `on_flow` is called in a thread once each stream has given `flow` ids."""
        tasks = [asyncio.create_task(self._one(received)) for received in self.received]
        if on_flow is not None:
            while any(r.count < flow and not t.done() for r, t in zip(self.received, tasks, strict=True)):  # noqa: ASYNC110
                await asyncio.sleep(0.002)  # streams have no event for their n-th id
            await asyncio.to_thread(on_flow)
        await asyncio.gather(*tasks)
        return self.received

    async def _one(self, received: Received) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        began = last = time.monotonic()
        while not received.finished and not received.error:
            try:
                # A channel of its own: a connection to one of the gateway's processes, as a client would have.
                async with grpc.aio.insecure_channel(
                    self._target, options=[("grpc.use_local_subchannel_pool", 1)]
                ) as c:
                    stub = inference_pb2_grpc.InferenceServiceStub(c)
                    async for event in self._call(stub, received):
                        now = time.monotonic()
                        if event.WhichOneof("event") == "delta":
                            received.first_s = received.first_s or now - began
                            received.gap_s = max(received.gap_s, now - last)
                            last = now
                        self._take(received, event)
            except grpc.aio.AioRpcError as error:
                told = from_rpc_error(error)
                if told.reason == "LEDGER_BEHIND" and "have" in told.metadata:
                    received.keep([int(count) for count in told.metadata["have"].split(".")])
                again = "ended" not in told.metadata and received.accepted and _may_go_on(error, told.reason)
                if not again or time.monotonic() > deadline:
                    received.error = told.reason or error.code().name
                    return
                received.resumes += 1
                await asyncio.sleep(RETRY_S)

    def _call(self, stub: inference_pb2_grpc.InferenceServiceStub, received: Received) -> object:
        if not received.resumes:
            return stub.Generate(received.request, timeout=TIMEOUT_S)
        cursor = [len(ids) for ids in received.ids]
        return stub.Resume(pb.ResumeRequest(request_id=received.request.request_id, cursor=cursor), timeout=TIMEOUT_S)

    def _take(self, received: Received, event: pb.GenerateResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "accepted":
            received.accepted = True
        elif kind == "delta":
            received.ids[event.delta.choice] += event.delta.token_ids
        elif kind == "finish":
            received.finished, received.durable = True, event.finish.durable


def _may_go_on(error: grpc.aio.AioRpcError, reason: str) -> bool:
    return (error.code() in BROKEN and not reason) or reason in TRY_AGAIN


def run(
    target: str,
    requests: list[pb.GenerateRequest],
    on_flow: Callable[[], None] | None = None,
    *,
    replay: bool = False,
) -> list[Received]:
    """A crowd, from a program without a loop."""
    return asyncio.run(Crowd(target, requests, replay=replay).run(on_flow))
