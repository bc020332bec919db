"""A step in parts says what the whole one said, in the same order, and no part is large."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_worker.messages import Finish, Logprobs, SequenceError, Timing
from lmesh_worker.outputs import SessionStep
from lmesh_worker.session import Session
from lmesh_worker.step_parts import parts

MOST = 400


def scores(entry: int, prompt: bool, count: int, k: int) -> Logprobs:
    alternatives = range(count * k)
    return Logprobs(
        entry, prompt, [-float(i) for i in range(count)], k, list(alternatives), [-float(i) for i in alternatives]
    )


ENTRY = st.tuples(
    st.integers(0, 3),  # ids
    st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(0, 5))),  # prompt scores: places, alternatives
    st.booleans(),  # scores of the ids
    st.booleans(),  # an error
)


def build(entries: list[tuple]) -> SessionStep:
    step = SessionStep(weights_version=3)
    for index, (count, prompt, scored, failed) in enumerate(entries):
        finish = Finish.ERROR if failed else Finish.RUNNING
        step.add(index, 100 + index, 10 * index, [1000 * index + i for i in range(count)], finish)
        step.timings.append(Timing(index, index, 0, 0, 0))
        if prompt is not None:
            step.logprobs.append(scores(index, True, *prompt))
        if scored:
            step.logprobs.append(scores(index, False, count, 2))
        if failed:
            step.errors.append(SequenceError(index, "R", str(index)))
    return step


def told(steps: list[SessionStep]) -> dict[int, dict]:
    """By slot, all that a gateway puts together."""
    slots: dict[int, dict] = {}
    for step in steps:
        begin, entries = 0, []
        for i, slot in enumerate(step.slot):
            entry = slots.setdefault(
                slot, {"ids": [], "prompt": [], "tops": [], "new": [], "errors": [], "timings": []}
            )
            assert not entry.get("finish"), "nothing comes after the end"
            entry |= {"lease": step.lease[i], "finish": step.finish[i]}
            entry.setdefault("start_pos", step.start_pos[i])
            entry["ids"] += step.ids[begin : begin + step.n_new[i]]
            begin += step.n_new[i]
            entries.append(entry)
        for found in step.logprobs:
            entry = entries[found.entry]
            entry["prompt" if found.prompt else "new"] += found.chosen
            entry["tops"] += zip(found.top_ids, found.top_logprobs, strict=True)
        for error in step.errors:
            entries[error.entry]["errors"].append(error.message)
        for timing in step.timings:
            entries[timing.entry]["timings"].append(timing.cached_tokens)
    return slots


@settings(deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=8))
def test_nothing_is_lost_or_doubled(entries: list[tuple]) -> None:
    step = build(entries)
    made = parts(step, MOST)
    assert told(made) == told([step])
    assert list(dict.fromkeys(slot for part in made for slot in part.slot)) == step.slot
    assert all(part.slot and part.weights_version == 3 for part in made)
    assert all(part.nbytes <= MOST for part in made)


def test_a_step_that_fits_is_left_alone() -> None:
    step = build([(1, None, True, False)] * 3)
    assert parts(step) == [step]
    assert parts(step)[0] is step


def test_a_session_numbers_the_parts_and_does_not_take_their_size_for_slowness() -> None:
    session = Session("g", max_unacked_steps=1000, max_unacked_bytes=2**20)
    step = SessionStep(weights_version=1)
    step.add(1, 1, 5000, [7], Finish.LENGTH)
    step.logprobs.append(scores(0, True, 5000, 40))
    assert step.nbytes > 3 * 2**20
    assert session.push(step)
    assert session._last_seq == 4
    assert [piece.step_seq for piece, _ in session._unacked] == [1, 2, 3, 4]
    small = SessionStep(weights_version=1)
    small.add(1, 1, 5001, [7], Finish.RUNNING)
    assert session.push(small)
    session.acknowledge(5)
    assert session._unacked_bytes == 0
