"""The scheduler's core on a virtual clock: admission, room, time, cancellation, fencing, spans."""

from __future__ import annotations

import pytest
from lmesh_chassis import tracing
from lmesh_scheduler.fleet import Heartbeat
from lmesh_scheduler.gateways import Expired, Placed, Queued, Refused, Revoked
from lmesh_scheduler.requests import State
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.scheduler_bench import INCARNATION, Bench, told


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestSubmit:
    def test_queued_placed_running_finished(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        assert told(gateway) == [Queued("r", 0), Placed("r", "w1", "e1", "w1:1", lease)]
        bench.core.started("r", lease)
        assert bench.state("r") is State.RUNNING
        bench.finish("r")
        ended = bench.request("r")
        assert (ended.state, ended.completion_tokens, ended.cached_tokens) == (State.FINISHED, 5, 2)
        assert worker.placed == 0
        assert [e.event for e in ended.timeline] == ["queued", "placed", "running", "first_token", "finished"]
        assert told(gateway) == []

    def test_leases_grow_and_belong_to_the_incarnation(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=8)
        for i in range(5):
            bench.submit(gateway, f"r{i}")
        leases = [event.lease for event in told(gateway) if isinstance(event, Placed)]
        assert leases == sorted(set(leases))
        assert {lease >> 32 for lease in leases} == {INCARNATION}
        assert max(leases) < 2**64

    def test_unknown_model(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r", model="other")
        (refused,) = told(gateway)
        assert isinstance(refused, Refused)
        assert refused.reason == "MODEL_NOT_FOUND"
        assert "served: m" in refused.message
        assert bench.core.requests.find("r") is None
        assert bench.core.refused_by_reason == {"MODEL_NOT_FOUND": 1}

    def test_duplicates_are_refused_live_and_ended(self, bench: Bench) -> None:
        first, second = bench.gateway("g1"), bench.gateway("g2")
        bench.worker()
        bench.submit(first, "r")
        told(first)
        bench.submit(second, "r")
        assert [e.reason for e in told(second) if isinstance(e, Refused)] == ["DUPLICATE_REQUEST_ID"]
        bench.submit(first, "r")  # its own, said again: it hears where it stands
        assert told(first) == [Placed("r", "w1", "e1", "w1:1", bench.request("r").lease)]
        bench.finish("r")
        bench.submit(second, "r")
        assert [e.reason for e in told(second) if isinstance(e, Refused)] == ["DUPLICATE_REQUEST_ID"]
        assert bench.state("r") is State.FINISHED

    def test_full_queue(self) -> None:
        bench = Bench(max_queue=2)
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        for name in "abcd":
            bench.submit(gateway, name)
        refused = [event for event in told(gateway) if isinstance(event, Refused)]
        assert [(event.request_id, event.reason) for event in refused] == [("d", "QUEUE_FULL")]
        assert refused[0].retry_after_ms > 0

    def test_draining_takes_nothing_new_and_ends_what_it_has(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        bench.submit(gateway, "runs")
        bench.submit(gateway, "waits")
        bench.submit(gateway, "stays")
        bench.core.drain()
        told(gateway)
        bench.submit(gateway, "late")
        assert [event.reason for event in told(gateway) if isinstance(event, Refused)] == ["DRAINING"]
        bench.finish("runs")
        assert bench.state("waits") is State.PLACED
        bench.core.revoke_queued()
        assert (bench.state("stays"), bench.state("waits")) == (State.FAILED, State.PLACED)
        assert told(gateway)[-1] == Revoked("stays", 0, "DRAINING")


class TestRoom:
    def test_choices_count_and_a_place_goes_on_at_once(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker(max_seqs=4)
        bench.submit(gateway, "a", n=3)
        bench.submit(gateway, "b", n=2)
        bench.submit(gateway, "c", n=1)
        assert (bench.state("b"), bench.state("c")) == (State.QUEUED, State.QUEUED)  # c must not starve b
        bench.finish("a")
        assert (bench.state("b"), bench.state("c")) == (State.PLACED, State.PLACED)
        assert worker.placed == 3

    def test_slots_factor(self) -> None:
        bench = Bench(slots_factor=2.5)
        gateway, worker = bench.gateway(), bench.worker(max_seqs=2)
        for i in range(9):
            bench.submit(gateway, str(i))
        assert worker.placed == 5
        assert bench.core.placements.queued == 4

    def test_load_is_spread(self, bench: Bench) -> None:
        gateway, one, two = bench.gateway(), bench.worker("w1"), bench.worker("w2")
        for i in range(4):
            bench.submit(gateway, str(i))
        assert (one.placed, two.placed) == (2, 2)

    def test_stuck_and_draining_workers_get_nothing(self, bench: Bench) -> None:
        gateway, stuck, leaving = bench.gateway(), bench.worker("w1"), bench.worker("w2")
        bench.core.worker_beat(stuck, Heartbeat(stuck=True), draining=False)
        bench.core.worker_beat(leaving, Heartbeat(), draining=True)
        bench.submit(gateway, "r")
        assert bench.state("r") is State.QUEUED
        bench.core.worker_beat(stuck, Heartbeat(), draining=False)
        assert bench.request("r").worker_id == "w1"


class TestTime:
    def test_expiry_in_the_queue(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        bench.submit(gateway, "runs")
        bench.submit(gateway, "waits", queue_timeout_s=3.0, deadline_s=60.0)
        bench.submit(gateway, "due", deadline_s=4.0)
        told(gateway)
        bench.pass_time(2.5)
        assert told(gateway) == []
        bench.pass_time(2.0)
        assert told(gateway) == [Expired("waits", True), Expired("due", True)]
        assert bench.core.placements.queued == 0

    def test_expiry_while_running_frees_the_place(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        bench.submit(gateway, "runs", deadline_s=5.0, queue_timeout_s=1.0)
        bench.submit(gateway, "next")
        lease = bench.request("runs").lease
        bench.core.started("runs", lease)
        told(gateway)
        bench.pass_time(6.0)
        assert Expired("runs", False) in told(gateway)
        assert (bench.state("runs"), bench.state("next")) == (State.EXPIRED, State.PLACED)
        bench.finish("runs", state=State.EXPIRED)  # the gateway's report comes after: counts are taken, the end stands
        assert (bench.state("runs"), bench.request("runs").completion_tokens) == (State.EXPIRED, 5)

    def test_ends_before_its_deadline(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r", deadline_s=5.0)
        bench.finish("r")
        told(gateway)
        bench.pass_time(10.0)
        assert told(gateway) == []
        assert bench.state("r") is State.FINISHED


class TestCancel:
    def test_from_another_gateway(self, bench: Bench) -> None:
        owner, other = bench.gateway("g1"), bench.gateway("g2")
        bench.worker(max_seqs=1)
        bench.submit(owner, "runs")
        bench.submit(owner, "waits")
        lease = bench.request("runs").lease
        told(owner)
        assert bench.core.cancel("waits")
        assert bench.core.cancel("runs")
        assert told(owner) == [Revoked("waits", 0, "CANCELLED"), Revoked("runs", lease, "CANCELLED")]
        assert told(other) == []

    def test_its_own_gateway_is_told_unless_it_withdrew_it_itself(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        bench.submit(gateway, "s")
        lease = bench.request("r").lease
        told(gateway)
        assert bench.core.cancel("r")  # it had asked before the request came there
        assert bench.core.withdraw(gateway, "s")
        assert told(gateway) == [Revoked("r", lease, "CANCELLED")]
        assert worker.placed == 0

    def test_a_withdrawal_reaches_its_own_gateways_request_only(self, bench: Bench) -> None:
        owner, other, third = bench.gateway("g1"), bench.gateway("g2"), bench.gateway("g3")
        bench.worker()
        bench.submit(owner, "r")
        bench.submit(other, "r")  # refused, while its withdrawal is on its way
        assert not bench.core.withdraw(other, "r")
        assert bench.state("r") is State.PLACED
        bench.core.take_over(third, bench.request("r").submission, 1)
        assert not bench.core.withdraw(owner, "r")  # it crossed the take-over
        assert bench.state("r") is State.PLACED
        assert bench.core.withdraw(third, "r")
        assert bench.state("r") is State.CANCELLED

    def test_of_an_ended_request_is_refused_and_counted(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r")
        bench.finish("r")
        assert not bench.core.cancel("r")
        assert not bench.core.cancel("unknown")
        assert bench.core.requests.refused_transitions == 1
        assert (bench.state("r"), bench.request("r").reason) == (State.FINISHED, "")


class TestFencing:
    def test_other_leases_are_dropped(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        bench.core.started("r", lease + 1)
        bench.finish("r", lease=lease - 1)
        bench.finish("r", lease=0)
        assert bench.state("r") is State.PLACED
        bench.core.started("r", lease)
        bench.core.started("r", lease)
        bench.finish("r")
        bench.finish("r", state=State.FAILED)
        assert bench.state("r") is State.FINISHED
        assert [state for _, state in bench.journaled].count(State.FINISHED) == 1


class TestTrace:
    @pytest.fixture
    def spans(self, monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("test"))
        return exporter

    def test_the_wait_is_a_span_under_the_callers(self, bench: Bench, spans: InMemorySpanExporter) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        parent = f"00-{0xABC:032x}-{0xDEF:016x}-01"
        bench.submit(gateway, "a", traceparent=parent)
        bench.submit(gateway, "b", traceparent=parent)
        assert [span.attributes["lmesh.request_id"] for span in spans.get_finished_spans()] == ["a"]
        bench.core.cancel("b")
        placed, cancelled = spans.get_finished_spans()
        for span in (placed, cancelled):
            assert span.name == "scheduler.queue"
            assert (span.context.trace_id, span.parent.span_id) == (0xABC, 0xDEF)
        assert placed.attributes["lmesh.outcome"] == "placed"
        assert cancelled.attributes["lmesh.outcome"] == "cancelled"
