"""Random lives of a small mesh around the scheduler's core: each request ends once, and no place leaks."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lmesh_scheduler.errors import RESUMED_ELSEWHERE, WorkerIdInUseError
from lmesh_scheduler.fleet import Heartbeat, Worker
from lmesh_scheduler.gateways import Expired, Revoked
from lmesh_scheduler.requests import LIVE, State

from tests.scheduler_bench import Bench, hello, told


class MeshLife(RuleBasedStateMachine):
    """Random lives of a small mesh; whatever happens, each request ends at most once and no place leaks."""

    @initialize()
    def start(self) -> None:
        self.bench = Bench(max_queue=6, ended_kept=10_000)
        self.core = self.bench.core
        self.links = {name: self.bench.gateway(name) for name in ("g1", "g2")}
        self.workers: dict[str, Worker] = {}
        self.submitted = 0
        self.epochs = 0
        self.ends: dict[str, list[str]] = {}

    def hear(self) -> None:
        for link in self.links.values():
            for event in told(link):
                if isinstance(event, Expired) or (isinstance(event, Revoked) and self.is_end(event)):
                    self.ends.setdefault(event.request_id, []).append(type(event).__name__)

    @staticmethod
    def is_end(event: Revoked) -> bool:
        """Not of one that waits for another worker, nor of one that another gateway carries on."""
        return not event.requeued and event.reason != RESUMED_ELSEWHERE

    @rule(name=st.sampled_from(["w1", "w2"]), seqs=st.integers(1, 3))
    def worker_boots(self, name: str, seqs: int) -> None:
        self.epochs += 1
        try:
            self.workers[name] = self.core.worker_joined(hello(name, epoch=str(self.epochs), max_seqs=seqs))
        except WorkerIdInUseError:
            assert self.workers[name].linked

    @rule(name=st.sampled_from(["w1", "w2"]))
    def worker_unlinks(self, name: str) -> None:
        if name in self.workers and self.core.fleet.current(self.workers[name]):
            self.core.worker_unlinked(self.workers[name])

    @rule(gateway=st.sampled_from(["g1", "g2"]), n=st.integers(1, 3), deadline=st.sampled_from([0.0, 4.0, 30.0]))
    def submit(self, gateway: str, n: int, deadline: float) -> None:
        self.submitted += 1
        self.bench.submit(self.links[gateway], f"r{self.submitted}", n=n, deadline_s=deadline)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), by=st.sampled_from(["g1", "g2"]), what=st.sampled_from(["cancel", "start", "finish"]))
    def gateway_speaks(self, data: st.DataObject, by: str, what: str) -> None:
        request_id = f"r{data.draw(st.integers(1, self.submitted))}"
        found = self.core.requests.find(request_id)
        if what == "cancel":
            self.core.cancel(request_id)
        elif found is not None and what == "start":
            self.core.started(request_id, found.lease)
        elif found is not None:
            self.bench.finish(request_id)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), by=st.sampled_from(["g1", "g2"]), what=st.sampled_from(["lose the leg", "take over"]))
    def request_moves(self, data: st.DataObject, by: str, what: str) -> None:
        found = self.core.requests.find(f"r{data.draw(st.integers(1, self.submitted))}")
        if found is None or not found.live:
            return
        if what == "lose the leg":
            self.core.failover.leg_lost(found.id, found.lease, "WORKER_LOST")
        else:
            self.core.take_over(self.links[by], found.submission, found.owner_epoch + 1)

    @rule(name=st.sampled_from(["w1", "w2"]))
    def worker_sticks(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None and worker.linked and self.core.fleet.current(worker):
            self.core.worker_beat(worker, Heartbeat(stuck=True), draining=False)
            assert not worker.placements

    @rule(name=st.sampled_from(["g1", "g2"]), comes_back=st.booleans())
    def gateway_breaks(self, name: str, comes_back: bool) -> None:
        self.core.gateway_left(self.links[name])
        if comes_back:
            self.hear()
            self.links[name] = self.bench.gateway(name)
            told(self.links[name])

    @rule(seconds=st.sampled_from([0.5, 3.0, 12.0]), beating=st.sets(st.sampled_from(["w1", "w2"])))
    def time_passes(self, seconds: float, beating: set[str]) -> None:
        self.bench.beating = []
        for name in beating & set(self.workers):
            if self.core.fleet.current(self.workers[name]) and self.workers[name].linked:
                self.core.worker_beat(self.workers[name], Heartbeat(), draining=False)
        self.bench.pass_time(seconds)

    @invariant()
    def each_ends_once(self) -> None:
        self.hear()
        ends = [(name, state) for name, state in self.bench.journaled if state not in LIVE]
        for request_id, events in self.ends.items():
            assert len(events) == 1, f"{request_id} was told {events}"
        assert all(len({state for name, state in ends if name == one}) == 1 for one in {name for name, _ in ends})

    @invariant()
    def places_are_those_of_live_requests(self) -> None:
        held: dict[str, int] = {}
        for request in self.core.requests.live():
            if request.state is not State.QUEUED:
                assert self.core.fleet.find(request.worker_id, request.epoch) is not None
                held[request.worker_id] = held.get(request.worker_id, 0) + request.submission.n
        for worker in self.core.fleet.workers():
            name = worker.hello.worker_id
            assert worker.placed == sum(worker.placements.values()) == held.get(name, 0)
            assert worker.placed <= worker.hello.max_seqs or len(worker.placements) == 1

    @invariant()
    def queues_hold_the_queued(self) -> None:
        queued = [request for request in self.core.requests.live() if request.state is State.QUEUED]
        assert self.core.placements.queued == len(queued)
        assert sum(not r.placements and not r.owner_epoch for r in queued) <= 6
        leases = [r.lease for r in self.core.requests.of_gateway("g1") + self.core.requests.of_gateway("g2") if r.lease]
        assert len(leases) == len(set(leases))


TestMeshLife = MeshLife.TestCase
TestMeshLife.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
