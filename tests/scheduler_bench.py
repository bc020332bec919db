"""The scheduler's core on a virtual clock, with what it journals and tells at hand."""

from __future__ import annotations

from typing import Any

from lmesh_chassis.tenants import Tenant
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.fleet import Heartbeat, Held, Hello, ModelDescriptor, Worker
from lmesh_scheduler.gateways import Event, Gateway
from lmesh_scheduler.inheritance import Inheritance
from lmesh_scheduler.requests import Request, State, Submission, TimelineEvent
from lmesh_scheduler.scheduler import Ending, Scheduler

INCARNATION = 1_900_000_000


def hello(
    worker_id: str = "w1",
    *,
    epoch: str = "e1",
    model: str = "m",
    max_seqs: int = 2,
    held: tuple[Held, ...] = (),
    cached: dict[str, Any] | None = None,
    **changes: str,
) -> Hello:
    fields = {"source": "s", "digest": "d", "text_digest": "t", **changes}
    descriptor = ModelDescriptor(
        id=model, max_model_len=512, vocab_size=1000, block_size=16, **fields, **(cached or {})
    )
    return Hello(
        worker_id=worker_id,
        epoch=epoch,
        address=f"{worker_id}:1",
        model=descriptor,
        max_seqs=max_seqs,
        max_step_tokens=512,
        kv_blocks=64,
        device="cpu",
        held=held,
    )


class Bench:
    """A scheduler, its clock, and what was journaled and told."""

    def __init__(
        self, *, inherited: Inheritance | None = None, tenants: dict[str, Tenant] | None = None, **changes: float
    ) -> None:
        self.now = 1000.0
        self.journaled: list[tuple[str, State]] = []
        self.settings = SchedulerSettings(**{"slots_factor": 1.0, **changes})  # type: ignore[arg-type]
        self.core = Scheduler(
            self.settings,
            incarnation=INCARNATION,
            clock=lambda: self.now,
            wall=lambda: 1e9 + self.now,
            journal=lambda r: self.journaled.append((r.id, r.state)),
            inherited=inherited,
            tenants=tenants,
        )
        self.beating: list[Worker] = []

    def gateway(self, gateway_id: str = "g") -> Gateway:
        return self.core.gateway_joined(gateway_id, lambda: None)

    def worker(self, *args: str, **changes: object) -> Worker:
        worker = self.core.worker_joined(hello(*args, **changes))  # type: ignore[arg-type]
        self.beating.append(worker)
        return worker

    def submit(self, gateway: Gateway, request_id: str, *, model: str = "m", **changes: object) -> None:
        fields = {"prompt_ids": (1, 2, 3), "max_tokens": 8, **changes}
        self.core.submit(gateway, Submission(request_id=request_id, model=model, **fields))  # type: ignore[arg-type]

    def finish(self, request_id: str, *, state: State = State.FINISHED, lease: int | None = None, new: int = 5) -> None:
        held = self.request(request_id).lease if lease is None else lease
        self.core.finished(Ending(request_id, held, state, "", new, 2, [TimelineEvent(1e9 + self.now, "first_token")]))

    def request(self, request_id: str) -> Request:
        found = self.core.requests.find(request_id)
        assert found is not None
        return found

    def state(self, request_id: str) -> State:
        return self.request(request_id).state

    def pass_time(self, seconds: float) -> None:
        """Ticks and heartbeats go on."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            for worker in self.beating:
                self.core.worker_beat(worker, Heartbeat(), draining=False)
            self.core.tick()


def told(gateway: Gateway) -> list[Event]:
    return gateway.take(10_000)
