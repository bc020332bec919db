"""Shares and limits of tenants, on the scheduler's core with a virtual clock."""

from __future__ import annotations

import random

import pytest
from lmesh_chassis.tenants import Tenant
from lmesh_scheduler.gateways import Refused
from lmesh_scheduler.requests import Request

from tests.scheduler_bench import Bench, told


def tenants(**weights: float) -> dict[str, Tenant]:
    return {name: Tenant(id=name, key_digests=(), weight=weight) for name, weight in weights.items()}


def placed(bench: Bench) -> list[Request]:
    return [request for request in bench.core.requests.live() if request.lease]


class TestShares:
    @pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
    def test_tokens_follow_the_weights_while_both_wait(self, weight: float, share: float) -> None:
        """A's requests are long, B's short and many: tokens are shared, not turns. A step is a token each."""
        bench = Bench(tenants=tenants(a=1.0, b=weight))
        gateway, rng = bench.gateway(), random.Random(7)
        bench.worker(max_seqs=8)
        for i in range(600):
            bench.submit(gateway, f"b{i}", tenant="b", prompt_ids=range(5), max_tokens=60)
            if i < 100:
                bench.submit(gateway, f"a{i}", tenant="a", prompt_ids=range(20), max_tokens=400)
        left, spent = dict[str, int](), {"a": 0, "b": 0}
        while bench.core.placements.waiting_of("a") and bench.core.placements.waiting_of("b"):
            for one in placed(bench):
                tenant = one.submission.tenant
                if one.id not in left:
                    left[one.id] = rng.randint(100, 400) if tenant == "a" else rng.randint(10, 60)
                    spent[tenant] += one.prompt_tokens
                total = left[one.id]
                one.completion_tokens += 1
                spent[tenant] += 1
                if one.completion_tokens == total:
                    bench.finish(one.id, new=total)
            told(gateway)
        assert spent["b"] / sum(spent.values()) == pytest.approx(share, abs=0.05)

    def test_a_lone_request_finds_a_place_beside_a_backlog(self) -> None:
        bench = Bench(tenants=tenants(a=1.0, b=1.0), slots_factor=2.0)
        gateway = bench.gateway()
        worker = bench.worker(max_seqs=8)
        for i in range(200):
            bench.submit(gateway, f"a{i}", tenant="a", max_tokens=4000)
        assert worker.placed == 7
        bench.submit(gateway, "b", tenant="b")
        assert bench.request("b").lease
        bench.submit(gateway, "b2", tenant="b")
        bench.finish(placed(bench)[0].id, new=4000)
        assert bench.request("b2").lease  # the next place is B's, though 193 came before

    def test_without_tenants_all_places_are_for_all(self) -> None:
        bench = Bench(slots_factor=2.0)
        gateway, worker = bench.gateway(), bench.worker(max_seqs=8)
        for i in range(40):
            bench.submit(gateway, f"r{i}")
        assert worker.placed == 16

    def test_idleness_is_not_saved_up(self) -> None:
        bench = Bench(tenants=tenants(a=1.0, b=1.0), reserved_slots=0)
        gateway = bench.gateway()
        bench.worker(max_seqs=1)
        for i in range(10):
            bench.submit(gateway, f"a{i}", tenant="a")
        for i in range(5):
            bench.finish(f"a{i}")
        for i in range(6):
            bench.submit(gateway, f"b{i}", tenant="b")
        order = []
        while live := placed(bench):
            order.append(live[0].submission.tenant)
            bench.finish(live[0].id)
        assert 3 <= order[:8].count("b") <= 5  # not the first six of all

    def test_a_request_that_is_placed_again_is_charged_once(self) -> None:
        bench = Bench(tenants=tenants(a=1.0, b=1.0))
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r", tenant="a")
        spent = bench.core.shares.spent("a")
        bench.core.failover.leg_lost("r", bench.request("r").lease, "WORKER_LOST")
        assert bench.core.shares.spent("a") == spent > 0
        bench.finish("r")
        assert bench.core.shares.spent("a") == 3 + 5
        assert bench.core.shares.live("a") == 0


class TestLimits:
    def refused(self, bench: Bench, request_id: str, **fields: object) -> Refused | None:
        gateway = bench.core.gateways.find("g") or bench.gateway()
        told(gateway)
        bench.submit(gateway, request_id, tenant="t", **fields)
        return next((event for event in told(gateway) if isinstance(event, Refused)), None)

    def limited(self, **limits: int) -> Bench:
        bench = Bench(tenants={"t": Tenant(id="t", key_digests=(), **limits)}, slots_factor=1.0)
        bench.worker(max_seqs=1)
        return bench

    def test_requests_a_minute(self) -> None:
        bench = self.limited(requests_per_minute=2)
        assert [self.refused(bench, name) for name in "ab"] == [None, None]
        fault = self.refused(bench, "c")
        assert fault is not None
        assert (fault.reason, fault.retry_after_ms) == ("RATE_LIMITED", 30_000)
        bench.pass_time(30)
        assert self.refused(bench, "c") is None

    def test_tokens_a_minute_count_what_was_generated(self) -> None:
        bench = self.limited(tokens_per_minute=60)
        assert self.refused(bench, "a") is None
        bench.finish("a", new=100)  # nobody knew beforehand: the bucket goes below zero
        fault = self.refused(bench, "b")
        assert fault is not None
        assert (fault.reason, fault.retry_after_ms) == ("RATE_LIMITED", 44_000)
        bench.pass_time(44)
        assert self.refused(bench, "b") is None

    def test_requests_that_wait_or_live(self) -> None:
        bench = self.limited(max_queued=1, max_live=3)
        assert [self.refused(bench, name) for name in ("runs", "waits")] == [None, None]
        fault = self.refused(bench, "c")
        assert fault is not None
        assert fault.reason == "QUOTA_EXCEEDED"
        bench.finish("runs")
        assert self.refused(bench, "c") is None
