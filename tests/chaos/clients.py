"""Clients of the simulated mesh: each sends one request, checks every id it gets, and may leave, cancel or resume."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis.errors import from_rpc_error

from tests.chaos.oracle import MODEL, Spec, Whole
from tests.chaos.rpc import SimChannel
from tests.chaos.wires import Net

GENEROUS_S = 200.0
ATTEMPTS = 40  # most streams of one request
MOST_BEHIND = 20
REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
# Whoever hears one of these may try again: nothing was admitted, or nobody can say yet.
TRY_AGAIN = frozenset(
    {"SCHEDULER_UNAVAILABLE", "MODEL_NOT_FOUND", "MODEL_LOADING", "NO_WORKER", "DRAINING", "LEDGER_UNAVAILABLE"}
)


@dataclass(frozen=True, kw_only=True)
class Habit:
    """What a client does; times are seconds from its first stream, inf for never."""

    gateways: tuple[str, ...]  # in the order in which it tries them
    begin_s: float
    leave_s: float = float("inf")  # drops its stream for good
    cancel_s: float = float("inf")  # asks for a Cancel, at the last gateway of its list
    away_s: float = float("inf")  # drops its stream and comes back by Resume
    detach: bool = False
    sync: bool = False
    think_s: float = 0.0  # between two reads


@dataclass(eq=False)
class Client:
    """One client and its request. `outcome` is "" while it runs, then finish, left, or an error's reason."""

    net: Net
    spec: Spec
    habit: Habit
    fail: Callable[[str], None]
    note: Callable[[str], None]
    ids: list[list[int]] = field(init=False)
    texts: list[str] = field(init=False)
    outcome: str = ""
    accepted: bool = False
    streams: int = 0
    submissions: int = 0
    behind: int = 0  # times that the ledger had less than it
    taken_back: bool = False  # and it had been shown ids
    durable: bool = False
    _began: float = 0.0
    _call: Any = None

    def __post_init__(self) -> None:
        self.ids = [[] for _ in range(self.spec.n)]
        self.texts = ["" for _ in range(self.spec.n)]

    @property
    def done(self) -> bool:
        return bool(self.outcome)

    async def run(self) -> None:
        """The client's life."""
        try:
            await self._live()
        except Exception as error:
            self.fail(f"{self.spec.request_id}'s client itself failed: {error!r}")
            raise

    async def _live(self) -> None:
        await asyncio.sleep(self.habit.begin_s)
        self._began = self.net.loop.now
        asides = [asyncio.ensure_future(aside) for aside in self._asides()]
        while not self.done and self.streams < ATTEMPTS:
            await self._stream()
        for aside in asides:
            aside.cancel()
        self.outcome = self.outcome or "gave up"
        self.note(f"{self.spec.request_id} {self.outcome} after {self.streams} streams")

    def _asides(self) -> list[Any]:
        habit = self.habit
        found = []
        if habit.leave_s < float("inf"):
            found.append(self._leave())
        if habit.cancel_s < float("inf"):
            found.append(self._cancel())
        if habit.away_s < float("inf"):
            found.append(self._go_away())
        return found

    async def _leave(self) -> None:
        await asyncio.sleep(self.habit.leave_s)
        self._end("left")
        if self._call is not None:
            self._call.cancel()

    async def _go_away(self) -> None:
        await asyncio.sleep(self.habit.away_s)
        if self._call is not None and self.accepted:
            self._call.cancel()

    async def _cancel(self) -> None:
        await asyncio.sleep(self.habit.cancel_s)
        stub = self._stub(self.habit.gateways[-1])
        # It ended before, or the gateway is gone: the stream tells what became of the request.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Cancel(pb.CancelRequest(request_id=self.spec.request_id), timeout=5.0)

    def _end(self, outcome: str) -> None:
        self.outcome = self.outcome or outcome

    def _stub(self, gateway: str) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(SimChannel(self.net, f"{gateway}:1"))

    # -- streams

    async def _stream(self) -> None:
        gateway = self.habit.gateways[self.streams % len(self.habit.gateways)]
        self.streams += 1
        resumed = self.accepted
        timeout = max(0.01, self._began + (self.spec.deadline_s or GENEROUS_S) - self.net.loop.now)
        stub = self._stub(gateway)
        try:
            if resumed:
                self._call = stub.Resume(self._resume(), timeout=timeout)
            else:
                self.submissions += 1
                self._call = stub.Generate(self._request(), timeout=timeout)
            await self._read(self._call)
        except grpc.aio.AioRpcError as error:
            await self._after(from_rpc_error(error), resumed)
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
            if not self.done:
                await asyncio.sleep(0.5)  # went away, and comes back

    async def _after(self, error: Any, resumed: bool) -> None:
        reason = error.reason or error.code.name
        broken = error.code is grpc.StatusCode.UNAVAILABLE and not error.reason
        self.note(f"{self.spec.request_id} stream {self.streams}: {reason}")
        if reason == "INTERNAL" or reason == "WORKER_FAILED":
            self.fail(f"{self.spec.request_id} was told {reason}: {error.message}")
        if reason == "LEDGER_BEHIND" and resumed:
            # What it has was shown by a gateway that died of it, or that has no Redis: it takes all of it anew.
            self.behind += 1
            self.taken_back = self.taken_back or _has_less(error.metadata.get("have", ""), self.ids)
            if self.behind > MOST_BEHIND:
                self._end(reason)
            self.ids, self.texts = [[] for _ in self.ids], ["" for _ in self.texts]
            await asyncio.sleep(0.5)
            return
        if reason == "DUPLICATE_REQUEST_ID" and self.streams > 1:
            self.accepted = True  # an earlier stream of its own broke before it could say so
            reason = "NO_WORKER"
        again = broken or (reason in TRY_AGAIN and "ended" not in error.metadata)
        if again:
            await asyncio.sleep(0.3 if self.streams < 5 else 1.5)
        else:
            self._end("BROKEN" if broken else reason)

    async def _read(self, call: Any) -> None:
        finished = begun = False
        async for event in call:
            kind = event.WhichOneof("event")
            if begun == (kind == "accepted"):
                self.fail(f"{self.spec.request_id} got {kind}, and Accepted comes first and once")
            begun = True
            if finished:
                self.fail(f"{self.spec.request_id} got {kind} after its Finish")
            if kind == "accepted":
                self.accepted = True
                if event.accepted.request_id != self.spec.request_id or event.accepted.seed != self.spec.seed:
                    self.fail(f"{self.spec.request_id} was accepted as {event.accepted}")
            elif kind == "delta":
                self._delta(event.delta)
            else:
                finished = True
                self._finish(event.finish)
            if self.habit.think_s:
                await asyncio.sleep(self.habit.think_s)
        if finished:
            self._end("finish")
        else:
            self.fail(f"{self.spec.request_id}'s stream ended well without a Finish")

    def _delta(self, delta: Any) -> None:
        have, whole = self.ids[delta.choice], self.spec.whole[delta.choice]
        have += delta.token_ids
        self.texts[delta.choice] += delta.text
        if have != whole.ids[: len(have)]:
            self.fail(f"{self.spec.request_id}.{delta.choice} got {have}, not {whole.ids[: len(have)]}")
        if not whole.text.startswith(self.texts[delta.choice]):
            self.fail(f"{self.spec.request_id}.{delta.choice} got {self.texts[delta.choice]!r}, not {whole.text!r}")

    def _finish(self, finish: Any) -> None:
        self.durable = finish.durable
        for choice, whole in enumerate(self.spec.whole):
            told = finish.choices[choice]
            got = Whole(
                self.ids[choice],
                self.texts[choice],
                REASONS.get(told.reason, "?"),
                told.stop_string,
                told.stop_token_id if told.HasField("stop_token_id") else None,
            )
            if got != whole:
                self.fail(f"{self.spec.request_id}.{choice} finished with {got}, not {whole}")
        if finish.usage.completion_tokens != sum(len(whole.ids) for whole in self.spec.whole):
            self.fail(f"{self.spec.request_id} was charged {finish.usage.completion_tokens} tokens")

    # -- messages

    def _request(self) -> pb.GenerateRequest:
        spec, habit = self.spec, self.habit
        request = pb.GenerateRequest(
            model=MODEL,
            tokens=pb.TokenInput(ids=spec.prompt),
            sampling=pb.SamplingParams(temperature=1.0, seed=spec.seed, n=spec.n),
            stop=pb.StopParams(
                max_tokens=spec.max_tokens, stop=spec.stop, stop_token_ids=spec.stop_ids, ignore_eos=True
            ),
            request_id=spec.request_id,
            durability=pb.DURABILITY_SYNC if habit.sync else pb.DURABILITY_ASYNC,
            on_disconnect=pb.ON_DISCONNECT_DETACH if habit.detach else pb.ON_DISCONNECT_CANCEL,
        )
        request.queue_timeout.FromSeconds(200)
        if habit.detach:
            request.detach_ttl.FromSeconds(20)
        return request

    def _resume(self) -> pb.ResumeRequest:
        return pb.ResumeRequest(request_id=self.spec.request_id, cursor=[len(ids) for ids in self.ids])


def _has_less(have: str, ids: list[list[int]]) -> bool:
    """Whether the ledger, which has so many ids of each choice, knows less than was shown."""
    counts = [int(count) for count in have.split(".")] if have else [0] * len(ids)
    return any(count < len(shown) for count, shown in zip(counts, ids, strict=True))
