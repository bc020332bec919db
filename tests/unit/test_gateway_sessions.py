"""The gateway's two ledgers, without sockets: what a broken stream costs on the Run and on the Dispatch link."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from lmesh_chassis.errors import ServiceError
from lmesh_gateway.dispatch_session import DispatchSession
from lmesh_gateway.placement import Leg, Outcome, Report
from lmesh_gateway.plan import Plan, SequenceParams
from lmesh_gateway.run_session import RunSession, StepEntry
from lmesh_gateway.slots import SequenceFinish, SequenceOutput, SequenceStart, Slot

PARAMS = SequenceParams(
    temperature=0.0, top_p=1.0, top_k=0, seed=1, max_tokens=9, stop_token_ids=(), logprobs=-1, prompt_logprobs=-1
)
LEG = Leg(worker_id="w", epoch="e", address="127.0.0.1:1", lease=7)
LENGTH, RUNNING, ABORTED = SequenceFinish.LENGTH, SequenceFinish.RUNNING, SequenceFinish.ABORTED


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.error: ServiceError | None = None
        self.fails = False

    def on_output(self, output: SequenceOutput) -> None:
        if self.fails:
            raise RuntimeError("a fault of ours")
        self.ids += output.ids

    def on_lost(self, error: ServiceError) -> None:
        assert self.error is None
        self.error = error


def start(lease: int = 7, length: int = 3) -> SequenceStart:
    return SequenceStart(
        lease=lease,
        request_id=f"r{lease}",
        choice=0,
        ids=[1] * length,
        prompt_len=length,
        params=PARAMS,
        cache_salt="",
        traceparent="",
    )


def entry(slot: Slot | tuple[int, int], pos: int, ids: Sequence[int], finish: SequenceFinish = RUNNING) -> StepEntry:
    number, lease = (slot.number, slot.start.lease) if isinstance(slot, Slot) else slot
    return StepEntry(slot=number, lease=lease, start_pos=pos, output=SequenceOutput(ids=ids, finish=finish))


class TestRunSession:
    def test_slots_are_reused_after_their_end_alone(self) -> None:
        session, first, second = RunSession("w"), Listener(), Listener()
        session.connected()
        one = session.start(start(1), first)
        session.collect()
        session.abort(one)
        two = session.start(start(2), second)
        assert two.number != one.number  # the worker may not have heard of the abort yet
        session.take(1, [entry(one, 3, [], ABORTED)])
        assert session.start(start(3), Listener()).number == one.number
        assert first.error is None and first.ids == []

    def test_an_unsent_start_is_just_taken_back(self) -> None:
        session = RunSession("w")
        slot = session.start(start(), Listener())
        session.abort(slot)
        assert session.collect() is None and session.idle

    def test_repeated_steps_and_foreign_leases_are_dropped(self) -> None:
        session, listener = RunSession("w"), Listener()
        slot = session.start(start(), listener)
        session.collect()
        assert session.take(1, [entry(slot, 3, [10])])
        assert session.take(1, [entry(slot, 4, [99])])
        assert session.take(2, [entry((slot.number, 8), 3, [66]), entry(slot, 4, [11], LENGTH)])
        assert listener.ids == [10, 11] and session.idle
        assert not session.take(4, [])

    def test_ids_at_another_position_fail_the_sequence(self) -> None:
        session, listener = RunSession("w"), Listener()
        slot = session.start(start(), listener)
        session.collect()
        session.take(1, [entry(slot, 5, [10])])
        assert listener.error is not None and listener.error.metadata["worker_reason"] == "POSITION_MISMATCH"
        batch = session.collect()
        assert batch is not None and batch.aborts == ((slot.number, 7),)

    def test_one_requests_fault_is_its_own(self) -> None:
        session, bad, good = RunSession("w"), Listener(), Listener()
        bad.fails = True
        one, two = session.start(start(1), bad), session.start(start(2), good)
        session.collect()
        session.take(1, [entry(one, 3, [10]), entry(two, 3, [11])])
        assert bad.error is not None and bad.error.reason == "INTERNAL"
        assert good.ids == [11]

    def test_after_a_break_what_may_be_lost_is_said_again(self) -> None:
        session, begun, silent, dropped = RunSession("w"), Listener(), Listener(), Listener()
        session.connected()
        one, two, three = (session.start(start(i), x) for i, x in ((1, begun), (2, silent), (3, dropped)))
        session.collect()
        session.take(1, [entry(one, 3, [10])])
        session.abort(three)
        session.collect()
        old = two.number
        session.connected()
        batch = session.collect()
        assert batch is not None
        assert [slot.start.lease for slot in batch.starts] == [2] and two.number != old
        assert set(batch.aborts) == {(old, 2), (three.number, 3)}
        session.take(2, [entry((old, 2), 3, [66]), entry(two, 3, [20], LENGTH), entry(one, 4, [11], LENGTH)])
        assert (begun.ids, silent.ids) == ([10, 11], [20])
        later = [session.start(start(9), Listener()).number for _ in range(4)]
        assert old not in later and three.number not in later

    def test_a_dropped_session_costs_what_had_begun(self) -> None:
        session, begun, silent = RunSession("w"), Listener(), Listener()
        session.connected()
        one, two = session.start(start(1), begun), session.start(start(2), silent)
        session.collect()
        session.take(1, [entry(one, 3, [10])])
        session.dropped_by_worker()
        assert begun.error is not None and begun.error.reason == "WORKER_LOST" and session.last_seq == 0
        session.connected()
        batch = session.collect()
        assert batch is not None and [slot.start.lease for slot in batch.starts] == [2]
        session.take(1, [entry(two, 3, [20], LENGTH)])
        assert silent.ids == [20] and session.idle

    def test_starts_that_keep_killing_the_session_end(self) -> None:
        session, listener = RunSession("w"), Listener()
        session.start(start(), listener)
        for _ in range(4):
            session.connected()
            session.collect()
            session.dropped_by_worker()
        assert listener.error is not None and session.idle

    @given(script=st.lists(st.sampled_from(["step", "break", "start", "abort"]), max_size=40), seed=st.randoms())
    def test_every_id_once_and_in_order(self, script: list[str], seed: Any) -> None:
        """A worker that keeps unacknowledged steps, and streams that break at any point between batches."""
        session = RunSession("w")
        worker: dict[tuple[int, int], int] = {}  # (slot, lease) -> next position
        steps: list[list[StepEntry]] = []
        listeners: dict[int, tuple[Slot, Listener]] = {}
        session.connected()
        delivered = 0
        for action in [*script, "break", "step"]:
            if action == "start":
                listener = Listener()
                lease = len(listeners) + 1
                listeners[lease] = (session.start(start(lease), listener), listener)
            elif action == "abort" and listeners:
                session.abort(seed.choice(list(listeners.values()))[0])
            elif action == "break":
                if seed.random() < 0.5:
                    session.collect()  # written, and swallowed by the break
                session.connected()
            while (batch := session.collect()) is not None:
                for slot in batch.starts:
                    assert all(number != slot.number for number, _ in worker), "a slot was used twice"
                    worker[(slot.number, slot.start.lease)] = 3
                known = [key for key in batch.aborts if key in worker]
                steps += [[entry(key, worker.pop(key), [], ABORTED)] for key in known]
            if action == "step" and worker:
                step = []
                for key in list(worker):
                    step.append(entry(key, worker[key], [worker[key]]))
                    worker[key] += 1
                steps.append(step)
            if seed.random() < 0.7:
                for number in range(max(0, delivered - 1), len(steps)):  # the last one again, as after a resume
                    assert session.take(number + 1, steps[number])
                delivered = len(steps)
        for number in range(delivered, len(steps)):
            assert session.take(number + 1, steps[number])
        for _, listener in listeners.values():
            assert listener.error is None
            assert listener.ids == list(range(3, 3 + len(listener.ids)))


class Owner:
    """A request's owner that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.delivered_tokens = 0

    def on_requeued(self) -> None:
        self.told.append("requeued")

    def on_admitted(self) -> None:
        self.told.append("admitted")

    def on_placed(self, leg: Leg) -> None:
        self.told.append(f"placed {leg.lease}")

    def on_ended(self, error: ServiceError, outcome: Outcome) -> None:
        self.told.append(f"{outcome.name} {error.reason}")


def plan(request_id: str = "r", tokens: int = 3) -> Plan:
    now = time.monotonic()
    return Plan(
        request_id=request_id,
        model=cast(Any, SimpleNamespace(id="m", base="m", adapter="")),
        prompt_ids=(1,) * tokens,
        params=PARAMS,
        n=1,
        stop=(),
        keep_special_tokens=False,
        deadline_at=now + 60,
        queue_deadline_at=now + 60,
        tenant="",
        traceparent="",
        created=0.0,
    )


REPORT = Report(request_id="r", lease=7, outcome=Outcome.FINISHED, completion_tokens=3)


class TestDispatchSession:
    def opened(self) -> tuple[DispatchSession, Owner]:
        session, owner = DispatchSession(), Owner()
        session.connected()
        session.submit(plan(), owner)
        batch = session.collect()
        assert batch is not None and [p.request_id for p in batch.submits] == ["r"]
        return session, owner

    def test_repeats_are_ignored(self) -> None:
        session, owner = self.opened()
        session.on_queued("r")
        session.on_placed("r", LEG)
        session.on_placed("r", LEG)
        session.on_refused("nobody", "QUEUE_FULL", "", 0)
        assert owner.told == ["admitted", "placed 7"]

    def test_unplaced_requests_are_submitted_again(self) -> None:
        session, owner = self.opened()
        session.broken()
        session.connected()
        batch = session.collect()
        assert batch is not None and [p.request_id for p in batch.submits] == ["r"]
        session.on_queued("r")  # the scheduler had it all along
        session.on_placed("r", LEG)
        assert owner.told == ["admitted", "placed 7"]

    def test_an_id_that_is_another_gateways_is_told(self) -> None:
        """Also on a second stream: what the scheduler has under the id is not this gateway's."""
        session, owner = self.opened()
        session.broken()
        session.connected()
        session.collect()
        session.on_refused("r", "DUPLICATE_REQUEST_ID", "live", 0)
        assert owner.told == ["FAILED DUPLICATE_REQUEST_ID"]

    def test_an_end_before_the_repeat_goes_out(self) -> None:
        for happen, withdrawals in ((lambda s: s.on_expired("r", True), []), (lambda s: s.withdraw("r"), ["r"])):
            session, _ = self.opened()
            session.broken()
            session.connected()
            happen(session)
            batch = session.collect()
            assert (batch.submits, batch.withdrawals) == ([], withdrawals) if batch is not None else not withdrawals

    def test_a_duplicate_that_is_one(self) -> None:
        session, owner = self.opened()
        session.on_refused("r", "DUPLICATE_REQUEST_ID", "live", 0)
        assert owner.told == ["FAILED DUPLICATE_REQUEST_ID"] and session.live("r") is None

    def test_reports_survive_breaks_and_are_said_once_a_stream(self) -> None:
        session, _ = self.opened()
        session.on_placed("r", LEG)
        session.finished(REPORT)
        first = session.collect()
        session.broken()  # it may not have arrived
        session.connected()
        again = session.collect()
        assert first is not None and again is not None and first.finished == again.finished == [REPORT]
        session.on_placed("r", LEG)  # the standing as the scheduler saw it before it read that
        assert session.collect() is None
        session.connected()
        session.on_placed("r", LEG)
        last = session.collect()
        assert last is not None and last.finished == [REPORT]

    def test_a_placement_that_crosses_a_withdrawal_is_given_back(self) -> None:
        session, owner = self.opened()
        session.withdraw("r")
        batch = session.collect()
        assert batch is not None and (batch.withdrawals, batch.cancels) == (["r"], [])
        session.on_placed("r", LEG)
        batch = session.collect()
        assert batch is not None
        assert [(f.lease, f.outcome) for f in batch.finished] == [(7, Outcome.CANCELLED)]
        assert owner.told == []

    def test_a_clients_cancel_is_no_withdrawal_and_both_survive_a_break(self) -> None:
        session, _ = self.opened()
        session.withdraw("r")
        session.cancel("elsewhere")
        for _ in range(2):
            batch = session.collect()
            assert batch is not None and (batch.withdrawals, batch.cancels) == (["r"], ["elsewhere"])
            session.broken()  # it may not have arrived
            session.connected()

    def test_an_unsent_submission_is_just_taken_back(self) -> None:
        session = DispatchSession()
        session.connected()
        session.submit(plan(), Owner())
        session.withdraw("r")
        assert session.collect() is None

    def test_scheduler_gone_for_good(self) -> None:
        session, owner = self.opened()
        other = Owner()
        session.submit(plan("placed"), other)
        session.collect()
        session.on_placed("placed", LEG)
        session.broken()
        session.give_up()
        assert owner.told == ["FAILED SCHEDULER_UNAVAILABLE"]
        assert other.told == ["placed 7"]  # what runs goes on

    def test_endings(self) -> None:
        cases = [
            (lambda s: s.on_revoked("r", 0, "CANCELLED"), "CANCELLED CANCELLED"),
            (lambda s: s.on_revoked("r", 0, "WORKER_LOST"), "FAILED WORKER_LOST"),
            (lambda s: s.on_revoked("r", 0, "DRAINING"), "FAILED DRAINING"),
            (lambda s: s.on_revoked("r", 0, "GATEWAY_LOST"), "FAILED SCHEDULER_UNAVAILABLE"),
            (lambda s: s.on_revoked("r", 0, "MODEL_NOT_FOUND"), "FAILED MODEL_NOT_FOUND"),
            (lambda s: s.on_expired("r", True), "EXPIRED QUEUE_TIMEOUT"),
            (lambda s: s.on_refused("r", "MODEL_NOT_FOUND", "gone", 0), "FAILED MODEL_NOT_FOUND"),
            (lambda s: s.on_refused("r", "NEW_REASON", "?", 0), "FAILED SCHEDULER_UNAVAILABLE"),
        ]
        for happen, told in cases:
            session, owner = self.opened()
            happen(session)
            assert owner.told == [told]
            assert session.live("r") is None and session.ended_lately("r")

    def test_a_revocation_of_another_lease_is_dropped(self) -> None:
        session, owner = self.opened()
        session.on_placed("r", LEG)
        session.on_revoked("r", 6, "WORKER_LOST")
        assert owner.told == ["placed 7"]

    def test_batches_are_bounded(self) -> None:
        session = DispatchSession()
        session.connected()
        for i in range(5):
            session.submit(plan(f"r{i}", tokens=400_000), Owner())
        sizes = []
        while (batch := session.collect()) is not None:
            sizes.append(len(batch.submits))
        assert sizes == [3, 2]
