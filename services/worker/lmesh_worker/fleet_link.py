"""The worker's end of the Fleet link: joins the scheduler, reports load and progress, takes the drain command."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import grpc
from lmesh.scheduler.v1 import fleet_pb2, fleet_pb2_grpc, model_pb2
from lmesh_chassis.backoff import Backoff
from lmesh_chassis.errors import RemoteError
from lmesh_chassis.links import Link

from lmesh_worker.adapter_shelf import AdapterShelf
from lmesh_worker.kv_feed import KvFeed
from lmesh_worker.messages import Load, Ready
from lmesh_worker.watchdog import Verdict

_log = logging.getLogger(__name__)

_DEFAULT_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this worker is and what it serves."""

    worker_id: str
    epoch: str  # this boot's id
    address: str  # advertised host:port
    model_id: str
    source: str  # resolved
    digest: str
    text_digest: str


class FleetLink:
    """Keeps the worker known to its scheduler for as long as `run` runs.

    `load()` and `verdict()` are asked at each heartbeat, `held()`, (request id, lease) and sequences of what runs, at
    each hello; `kv` says what the prefix cache holds, `adapters` which adapters are held, and takes orders for them.
    `on_drain` is called when the scheduler wants this worker gone, `on_revoked` with leases that are to be dropped.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        identity: Identity,
        ready: Ready,
        *,
        load: Callable[[], Load],
        verdict: Callable[[], Verdict],
        held: Callable[[], dict[tuple[str, int], int]],
        kv: KvFeed,
        adapters: AdapterShelf,
        on_drain: Callable[[], None],
        on_revoked: Callable[[Collection[int]], None],
        backoff: Backoff | None = None,
    ) -> None:
        self._identity = identity
        self._ready = ready
        self._load = load
        self._verdict = verdict
        self._held = held
        self._kv = kv
        self._adapters = adapters
        self._on_drain = on_drain
        self._on_revoked = on_revoked
        self._draining = False
        self._told_draining = asyncio.Event()
        self._due = False
        self._interval_s = _DEFAULT_INTERVAL_S
        self.joined = asyncio.Event()  # set by the first hello, and then for good
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        self._link: Link[fleet_pb2.FleetRequest, fleet_pb2.FleetResponse] = Link(
            lambda: stub.Fleet(),
            name="fleet",
            hello=self._hello,
            collect=self._collect,
            on_connected=self._on_connected,
            on_message=self._on_message,
            on_broken=self._on_broken,
            backoff=backoff,
        )
        kv.on_due = adapters.on_change = self._link.wake

    @property
    def connected(self) -> bool:
        """Whether the scheduler hears this worker now."""
        return self._link.connected

    async def run(self) -> None:
        """Keeps the link up, and a heartbeat on it, until `leave` or cancellation."""
        beats = asyncio.create_task(self._beat())
        try:
            await self._link.run()
        finally:
            beats.cancel()
            self._kv.close()
            await asyncio.gather(beats, return_exceptions=True)

    def report_now(self) -> None:
        """Sends a heartbeat at once: something changed that should not wait for the interval."""
        self._due = True
        self._link.wake()

    async def announce_draining(self, timeout_s: float) -> bool:
        """Tells the scheduler to place nothing more here; False when it could not be told in time."""
        self._draining = True
        self.report_now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told_draining.wait()
        return self._told_draining.is_set()

    def leave(self) -> None:
        """Ends the link well; `run` returns."""
        self._due = True  # the last load goes along
        self._link.close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self.report_now()

    def _hello(self) -> fleet_pb2.FleetRequest:
        own, ready = self._identity, self._ready
        model = model_pb2.ModelDescriptor(
            id=own.model_id,
            source=own.source,
            digest=own.digest,
            text_digest=own.text_digest,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            block_size=ready.block_size,
            weights_version=ready.weights_version,
            kv_format=ready.kv_format,
            kv_granule_blocks=ready.kv_granule_blocks,
        )
        capacity = fleet_pb2.Capacity(
            max_seqs=ready.max_seqs, max_step_tokens=ready.max_step_tokens, kv_blocks=ready.kv_blocks
        )
        hello = fleet_pb2.WorkerHello(
            worker_id=own.worker_id,
            epoch=own.epoch,
            address=own.address,
            model=model,
            capacity=capacity,
            device=ready.device,
            held=[
                fleet_pb2.HeldPlacement(request_id=request_id, lease=lease, sequences=sequences)
                for (request_id, lease), sequences in self._held().items()
            ],
            adapters=self._adapters.held,
        )
        # A hello is a fresh start for the scheduler: the rest is said again.
        self._told_draining.clear()
        self._kv.restart()
        self._adapters.restart()
        self._due = True
        return fleet_pb2.FleetRequest(hello=hello)

    def _collect(self) -> fleet_pb2.FleetRequest | None:
        delta, adapters = self._kv.next(), self._adapters.take_untold()
        if delta is None and not adapters and not self._due:
            return None
        request = fleet_pb2.FleetRequest(draining=self._draining)
        if self._due:
            self._due = False
            request.heartbeat.CopyFrom(self._heartbeat())
        if delta is not None:
            kv = fleet_pb2.KvDelta(seq=delta.seq, snapshot=delta.snapshot, added=delta.added, removed=delta.removed)
            request.kv.CopyFrom(kv)
        for state in adapters:
            request.adapters.add(digest=state.digest, held=state.held, reason=state.reason, message=state.message)
        if self._draining:
            self._told_draining.set()
        return request

    def _heartbeat(self) -> fleet_pb2.Heartbeat:
        load = self._load()
        return fleet_pb2.Heartbeat(
            running=load.running,
            waiting=load.waiting,
            kv_blocks_used=load.kv_blocks_used,
            steps=load.steps,
            prefix_query_tokens=load.prefix_query_tokens,
            prefix_hit_tokens=load.prefix_hit_tokens,
            preemptions=load.preemptions,
            generated_tokens=load.generated_tokens,
            progress=self._verdict().value,  # type: ignore[arg-type]  # the numbers are those of Progress
        )

    def _on_connected(self, response: fleet_pb2.FleetResponse) -> None:
        hello = response.hello
        if hello.heartbeat_interval_ms:
            self._interval_s = hello.heartbeat_interval_ms / 1000
        self.joined.set()
        _log.info("joined the scheduler", extra={"incarnation": hello.incarnation, "interval_s": self._interval_s})
        self._on_message(response)

    def _on_message(self, response: fleet_pb2.FleetResponse) -> None:
        if response.revoked_leases:
            self._on_revoked(response.revoked_leases)
        if response.kv_snapshot:
            self._kv.snapshot()
        # Drops first: they make room for what is to be loaded.
        self._adapters.drop(response.drop_adapters)
        for order in response.load_adapters:
            self._adapters.load(order.digest, order.artifact)
        if response.drain:
            self._on_drain()

    def _on_broken(self, error: RemoteError | None) -> bool:
        if error is not None and error.code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
            # It may be put right on the other side (a model's digest, an id in use), so it is tried again, loudly.
            _log.error("the scheduler refuses this worker", extra={"reason": error.reason, "detail": error.message})
        return True
