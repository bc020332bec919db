"""A session against a model of it: whatever breaks and resumes, each stream's steps are the ones that follow."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_worker.errors import ReplayGoneError
from lmesh_worker.messages import Finish, Logprobs, SequenceError, StepReport, Timing
from lmesh_worker.metrics import NO_LOAD
from lmesh_worker.outputs import SessionStep, split
from lmesh_worker.session import Session


def step(token: int, size: int = 1) -> SessionStep:
    made = SessionStep(weights_version=1)
    made.add(1, 1, token, [token] * size, Finish.RUNNING)
    return made


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 5)),
        st.tuples(st.just("read"), st.integers(1, 5)),
        st.tuples(st.just("ack"), st.integers(0, 30)),
        st.tuples(st.just("resume"), st.integers(0, 30)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_any_history_gives_contiguous_steps(actions: list[tuple[str, int]]) -> None:
    asyncio.run(replay(actions))


async def replay(actions: list[tuple[str, int]]) -> None:
    session = Session("g", max_unacked_steps=1000, max_unacked_bytes=2**30)
    stream = session.attach(0)
    pushed, acked, cursor = 0, 0, 0
    for action, value in actions:
        if action == "push":
            for _ in range(value):
                pushed += 1
                assert session.push(step(pushed))
        elif action == "read":
            size = step(1).nbytes
            for _ in range(min(value, pushed - cursor)):
                if cursor == pushed:
                    break
                for got in await session.next_steps(stream, (value - 1) * size):
                    cursor += 1
                    assert (got.step_seq, got.ids) == (cursor, [cursor])
        elif action == "ack":
            acked = max(acked, min(value, cursor))
            session.acknowledge(min(value, cursor))
        elif acked <= value <= pushed:
            stream = session.attach(value)
            acked = cursor = value
        else:
            with pytest.raises(ReplayGoneError):
                session.attach(value)
        assert session.oldest_step_seq == acked + 1


async def test_a_waiting_stream_wakes_with_the_next_step() -> None:
    session = Session("g", max_unacked_steps=10, max_unacked_bytes=2**20)
    waiting = asyncio.create_task(session.next_steps(session.attach(0), 1000))
    await asyncio.sleep(0)
    assert not waiting.done()
    session.push(step(5))
    assert [taken.ids for taken in await waiting] == [[5]]


@pytest.mark.parametrize(("most_bytes", "taken"), [(0, [1, 1, 1]), (2 * step(1).nbytes, [2, 1]), (2**20, [3])])
async def test_what_gathers_is_taken_together_up_to_a_bound(most_bytes: int, taken: list[int]) -> None:
    session = Session("g", max_unacked_steps=10, max_unacked_bytes=2**20)
    stream = session.attach(0)
    for token in (1, 2, 3):
        session.push(step(token))
    batches = [await session.next_steps(stream, most_bytes) for _ in taken]
    assert [len(batch) for batch in batches] == taken
    assert [taken.ids for batch in batches for taken in batch] == [[1], [2], [3]]


@pytest.mark.parametrize(("steps", "size", "fits"), [(10, 1, True), (11, 1, False), (4, 100, True), (5, 100, False)])
def test_what_is_not_acknowledged_is_bounded(steps: int, size: int, fits: bool) -> None:
    """Of 1000 bytes a step takes 56 with one id, and a quarter with a hundred."""
    session = Session("g", max_unacked_steps=10, max_unacked_bytes=1000)
    assert [session.push(step(1, size)) for _ in range(steps)][-1] is fits
    session.acknowledge(steps)
    assert session.push(step(1, size))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12))
def test_a_report_is_shared_out_without_loss(entries: list[tuple[int, int]]) -> None:
    """Owner 0 stands for keys that nobody waits for."""
    keys = list(range(len(entries)))
    ids, spans = [], []
    for key, (_, count) in enumerate(entries):
        spans.append([100 * key + i for i in range(count)])
        ids += spans[-1]
    report = StepReport(
        keys=keys,
        start_pos=[10 * key for key in keys],
        n_new=[len(span) for span in spans],
        ids=ids,
        finish=[0] * len(keys),
        load=NO_LOAD,
        weights_version=3,
        step_us=1,
        logprobs=[Logprobs(key, False, [float(key)], 0, [], []) for key in keys],
        errors=[SequenceError(key, "R", str(key)) for key in keys],
        timings=[Timing(key, key, 0, 0, 0) for key in keys],
    )
    steps, places = split(report, lambda key: (entries[key][0], key, 50 + key) if entries[key][0] else None)
    assert set(steps) == {owner for owner, _ in entries if owner}
    assert set(places) == {key for key in keys if entries[key][0]}
    for owner, made in steps.items():
        mine = [key for key in keys if entries[key][0] == owner]
        assert (made.slot, made.lease) == (mine, [50 + key for key in mine])
        assert made.start_pos == [10 * key for key in mine]
        assert made.ids == [token for key in mine for token in spans[key]]
        assert made.n_new == [len(spans[key]) for key in mine]
        assert [made.slot[e.entry] for e in made.logprobs] == mine == [int(e.chosen[0]) for e in made.logprobs]
        assert [made.slot[e.entry] for e in made.errors] == mine == [int(e.message) for e in made.errors]
        assert [made.slot[e.entry] for e in made.timings] == mine == [e.cached_tokens for e in made.timings]
        assert made.weights_version == 3
