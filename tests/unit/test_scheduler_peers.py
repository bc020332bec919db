"""The scheduler's core on a virtual clock: workers and gateways that come, go, come back and get lost."""

from __future__ import annotations

import pytest
from lmesh_scheduler.errors import ModelConflictError, WorkerIdInUseError
from lmesh_scheduler.fleet import Heartbeat
from lmesh_scheduler.gateways import Expired, Placed, Refused, Revoked
from lmesh_scheduler.requests import State

from tests.scheduler_bench import Bench, hello, told


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestWorkers:
    def test_silence_loses_the_worker(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        told(gateway)
        bench.beating.clear()
        bench.pass_time(4.0)
        assert bench.state("r") is State.PLACED
        bench.pass_time(2.0)
        assert told(gateway) == [Revoked("r", lease, "WORKER_LOST", requeued=True)]
        assert bench.state("r") is State.QUEUED
        assert bench.core.fleet.workers() == []
        with pytest.raises(WorkerIdInUseError):  # its link must begin anew
            bench.core.worker_beat(worker, Heartbeat(), draining=False)
        bench.pass_time(31)
        assert told(gateway) == [Revoked("r", 0, "WORKER_LOST")]
        assert (bench.state("r"), bench.request("r").reason) == (State.FAILED, "WORKER_LOST")
        assert [state for _, state in bench.journaled][-1] is State.FAILED

    def test_a_link_that_comes_back_keeps_its_placements(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        bench.beating.clear()
        bench.core.worker_unlinked(worker)
        bench.submit(gateway, "s")
        assert bench.state("s") is State.QUEUED  # an unlinked worker gets nothing new
        again = bench.worker()
        assert (bench.state("r"), bench.state("s"), again.placed) == (State.PLACED, State.PLACED, 2)
        bench.finish("r")
        assert again.placed == 1

    def test_a_new_boot_loses_the_old_ones_placements_at_once(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        told(gateway)
        bench.core.worker_unlinked(worker)
        bench.beating.clear()
        fresh = bench.worker(epoch="e2")
        again = bench.request("r").lease
        assert told(gateway) == [
            Revoked("r", lease, "WORKER_LOST", requeued=True),
            Placed("r", "w1", "e2", "w1:1", again),
        ]
        assert fresh.placed == 1
        assert bench.core.fleet.find("w1", "e1") is None

    def test_an_id_in_use_is_refused_until_its_owner_falls_silent(self, bench: Bench) -> None:
        worker = bench.worker()
        with pytest.raises(WorkerIdInUseError):
            bench.core.worker_joined(hello(epoch="e2"))
        bench.beating.clear()
        bench.now += 3  # the link still stands, and no heartbeat came: the host is gone
        bench.core.worker_joined(hello(epoch="e2"))
        with pytest.raises(WorkerIdInUseError):
            bench.core.worker_beat(worker, Heartbeat(), draining=False)

    def test_one_model_id_has_one_digest(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker("w1")
        for changed in ("digest", "text_digest"):
            with pytest.raises(ModelConflictError, match="give it another id"):
                bench.core.worker_joined(hello("w2", **{changed: "other"}))
        bench.submit(gateway, "r")
        assert bench.request("r").worker_id == "w1"
        assert [w.hello.worker_id for w in bench.core.fleet.workers()] == ["w1"]

    def test_a_gateways_word_counts_only_when_the_worker_is_silent_here_too(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        bench.core.worker_unreachable("w1", "e1")
        assert bench.state("r") is State.PLACED
        bench.core.worker_unlinked(worker)
        bench.core.worker_unreachable("w1", "another epoch")
        assert bench.state("r") is State.PLACED
        bench.core.worker_unreachable("w1", "e1")
        assert bench.state("r") is State.QUEUED

    def test_a_drained_worker_leaves_with_its_last_request(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        bench.submit(gateway, "r")
        bench.beating.clear()
        bench.core.worker_beat(worker, Heartbeat(), draining=True)
        bench.core.worker_unlinked(worker)
        assert bench.core.fleet.serves("m")
        bench.finish("r")
        assert not bench.core.fleet.serves("m")

    def test_catalog(self, bench: Bench) -> None:
        gateway = bench.gateway()
        gateway.catalog_due = False
        worker = bench.worker("w1")
        assert gateway.catalog_due
        bench.now += 50
        bench.worker("w2")
        bench.worker("w3", model="other", digest="x")
        entries = [(e.model.id, e.workers, e.created) for e in bench.core.fleet.catalog()]
        assert entries == [("m", 2, 1e9 + 1000), ("other", 1, 1e9 + 1050)]
        gateway.catalog_due = False
        bench.core.worker_beat(worker, Heartbeat(), draining=True)
        bench.core.worker_unlinked(worker)
        assert gateway.catalog_due
        assert [(e.model.id, e.workers) for e in bench.core.fleet.catalog()] == [("m", 1), ("other", 1)]

    def test_requests_wait_for_a_model_in_its_grace(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.beating.clear()
        bench.pass_time(6)
        assert bench.core.fleet.workers() == []
        bench.submit(gateway, "waits")
        bench.submit(gateway, "short", queue_timeout_s=5.0)
        told(gateway)
        bench.pass_time(10)
        assert told(gateway) == [Expired("short", True)]
        bench.pass_time(25)
        assert told(gateway) == [Revoked("waits", 0, "WORKER_LOST")]
        bench.submit(gateway, "late")
        assert [e.reason for e in told(gateway) if isinstance(e, Refused)] == ["MODEL_NOT_FOUND"]

    def test_a_worker_that_comes_in_the_grace_takes_what_waits(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.beating.clear()
        bench.pass_time(6)
        bench.submit(gateway, "waits")
        bench.pass_time(20)
        bench.worker("w9")
        bench.pass_time(20)
        assert bench.request("waits").worker_id == "w9"


class TestGateways:
    def test_a_lost_gateways_queued_requests_are_dropped_after_the_grace(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        bench.submit(gateway, "runs")
        bench.submit(gateway, "waits")
        bench.core.gateway_left(gateway)
        bench.pass_time(9)
        assert bench.state("waits") is State.QUEUED
        bench.pass_time(2)
        assert (bench.state("waits"), bench.request("waits").reason) == (State.FAILED, "GATEWAY_LOST")
        assert bench.state("runs") is State.PLACED  # it may well stream on without us
        bench.pass_time(60)
        assert bench.state("runs") is State.FAILED
        assert bench.core.gateways.find("g") is None

    def test_nothing_is_placed_for_a_gateway_that_is_away(self, bench: Bench) -> None:
        away, there = bench.gateway("g1"), bench.gateway("g2")
        bench.worker(max_seqs=1)
        bench.submit(away, "runs")
        bench.submit(away, "first")
        bench.submit(there, "second")
        bench.core.gateway_left(away)
        bench.finish("runs")
        assert (bench.state("first"), bench.state("second")) == (State.QUEUED, State.PLACED)
        bench.finish("second")
        back = bench.gateway("g1")
        assert bench.state("first") is State.PLACED
        assert Placed("first", "w1", "e1", "w1:1", bench.request("first").lease) in told(back)

    def test_a_gateway_that_comes_back_hears_how_things_stand(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker(max_seqs=3)
        for name in ("runs", "expires", "done", "waits", "times_out"):
            bench.submit(gateway, name, deadline_s=5.0 if name == "expires" else 0.0)
        bench.request("times_out").queue_deadline = 0.0
        bench.finish("done")  # makes room for "waits"
        told(gateway)  # swallowed by a link that breaks
        bench.submit(gateway, "more")
        bench.core.gateway_left(gateway)
        bench.pass_time(6)
        back = bench.gateway()
        runs, waits = bench.request("runs"), bench.request("waits")
        heard = told(back)
        assert Expired("expires", False) in heard
        assert Placed("runs", "w1", "e1", "w1:1", runs.lease) in heard
        assert Placed("waits", "w1", "e1", "w1:1", waits.lease) in heard
        assert "done" not in {event.request_id for event in heard}
        assert back.catalog_due
        bench.submit(back, "runs")  # said again, as it had not heard
        assert told(back) == [Placed("runs", "w1", "e1", "w1:1", runs.lease)]

    def test_refusals_that_were_not_told_are_told_on_the_next_link(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.submit(gateway, "r")
        bench.core.gateway_left(gateway)
        assert [e.reason for e in told(bench.gateway()) if isinstance(e, Refused)] == ["MODEL_NOT_FOUND"]

    def test_an_older_link_says_nothing_more_and_its_end_harms_nobody(self, bench: Bench) -> None:
        woken: list[int] = []
        old = bench.core.gateway_joined("g", lambda: woken.append(1))
        new = bench.gateway("g")
        bench.worker()
        assert woken == [1]
        assert not bench.core.gateways.current(old)
        bench.core.gateway_left(old)
        bench.pass_time(100)
        bench.submit(new, "r")
        assert (told(old), len(told(new))) == ([], 2)
        assert len(bench.core.gateways) == 1
