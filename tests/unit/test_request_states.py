"""The request table against its transition table: whatever is tried, in any order, only what the table has happens."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from lmesh_scheduler.requests import (
    LIVE,
    TRANSITIONS,
    Request,
    RequestTable,
    State,
    Submission,
    TimelineEvent,
    TransitionError,
)

ENDED_KEPT = 5
# Written out here once more, so that a change of the table is a decision.
ALLOWED = {
    ("QUEUED", "PLACED"),
    ("PLACED", "RUNNING"),
    ("PLACED", "FINISHED"),
    ("RUNNING", "FINISHED"),
    ("PLACED", "QUEUED"),
    ("RUNNING", "QUEUED"),
    *((live, end) for live in ("QUEUED", "PLACED", "RUNNING") for end in ("CANCELLED", "EXPIRED", "FAILED")),
}


def request(request_id: str, gateway_id: str = "g") -> Request:
    submission = Submission(request_id=request_id, model="m", prompt_ids=(1, 2, 3), max_tokens=4)
    return Request(submission=submission, gateway_id=gateway_id, prompt_tokens=3)


def test_the_transition_table() -> None:
    assert {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters} == ALLOWED
    assert set(TRANSITIONS) == set(State)


class RequestLives(RuleBasedStateMachine):
    """Random lives of requests, beside a plain model of them."""

    requests = Bundle("requests")

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.journaled: list[tuple[str, int, State]] = []
        self.table = RequestTable(ended_kept=ENDED_KEPT, wall=self.tick, journal=self.note)
        self.states: dict[str, State] = {}
        self.order_of_ends: list[str] = []
        self.refused = 0

    def tick(self) -> float:
        self.now += 1
        return self.now

    def note(self, request: Request) -> None:
        self.journaled.append((request.id, request.version, request.state))

    @rule(target=requests)
    def submit(self) -> Request:
        new = request(f"r{len(self.states)}")
        self.table.add(new)
        self.states[new.id] = State.QUEUED
        return new

    @rule(of=requests)
    def submit_again(self, of: Request) -> None:
        known = self.table.find(of.id)
        if known is None:
            return
        try:
            self.table.add(request(of.id))
        except TransitionError:
            assert self.table.find(of.id) is known
        else:
            raise AssertionError("a known id was taken twice")

    @rule(of=requests, to=st.sampled_from(State))
    def move(self, of: Request, to: State) -> None:
        before, version, timeline = self.states[of.id], of.version, list(of.timeline)
        try:
            self.table.move(of, to)
        except TransitionError:
            assert (before.value, to.value) not in ALLOWED
            assert (of.state, of.version, of.timeline) == (before, version, timeline)
            self.refused += 1
            return
        assert (before.value, to.value) in ALLOWED
        assert of.version > version
        assert of.timeline[-1].event == to.value.lower()
        self.states[of.id] = to
        if to not in LIVE:
            self.order_of_ends.append(of.id)

    @rule(of=requests, tokens=st.integers(1, 9))
    def report(self, of: Request, tokens: int) -> None:
        reported, before = of.reported, of.completion_tokens
        self.table.report(of, completion_tokens=tokens, cached_tokens=0, events=[TimelineEvent(0.5, "first_token")])
        assert of.completion_tokens == (before if reported else tokens)
        assert [event.event for event in of.timeline].count("first_token") == 1
        assert of.state is self.states[of.id]

    @rule(target=requests, ended=consumes(requests))
    def forget_handle(self, ended: Request) -> object:
        return ended if ended.live else multiple()

    @invariant()
    def table_holds_live_and_last_ended(self) -> None:
        live = {request_id for request_id, state in self.states.items() if state in LIVE}
        assert {request.id for request in self.table.live()} == live
        assert len(self.table) == len(live)
        remembered = set(self.order_of_ends[-ENDED_KEPT:])
        for request_id in self.states:
            assert (self.table.find(request_id) is not None) == (request_id in live | remembered)
        assert {request.id for request in self.table.of_gateway("g")} == live | remembered

    @invariant()
    def ends_are_final_and_counted(self) -> None:
        assert len(self.order_of_ends) == len(set(self.order_of_ends)) == sum(self.table.ended_by_state.values())
        assert self.table.refused_transitions == self.refused

    @invariant()
    def journal_heard_every_change_in_order(self) -> None:
        versions = [version for _, version, _ in self.journaled]
        assert versions == list(range(1, len(versions) + 1))
        last = {request_id: state for request_id, _, state in self.journaled}
        assert last == self.states


TestRequestLives = RequestLives.TestCase
TestRequestLives.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_ended_request_keeps_its_length_and_not_its_prompt() -> None:
    table = RequestTable(ended_kept=5, wall=lambda: 0.0, journal=lambda r: None)
    one = request("a")
    table.add(one)
    table.move(one, State.CANCELLED)
    assert (one.prompt_tokens, tuple(one.submission.prompt_ids)) == (3, ())


def test_reported_events_are_sorted_in_by_time() -> None:
    times = iter([1.0, 2.0, 5.0])
    table = RequestTable(ended_kept=5, wall=lambda: next(times), journal=lambda r: None)
    one = request("a")
    table.add(one)
    table.move(one, State.PLACED)
    events = [TimelineEvent(4.0, "preempted"), TimelineEvent(3.0, "first_token", {"cached_tokens": "2"})]
    table.report(one, completion_tokens=1, cached_tokens=2, events=events)
    table.move(one, State.FINISHED)
    assert [event.event for event in one.timeline] == ["queued", "placed", "first_token", "preempted", "finished"]
