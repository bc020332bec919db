"""Placement by load: a pure function, so it is checked as one."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st
from lmesh_scheduler.placement import RequestView, WorkerView, place


def worker(worker_id: str, **changes: object) -> WorkerView:
    view: dict[str, object] = {
        "model": "m",
        "placeable": True,
        "placed": 0,
        "max_placed": 8,
        "max_seqs": 4,
        "kv_used": 0.0,
    }
    view |= {"max_step_tokens": 512, **changes}
    return WorkerView(id=worker_id, **view)  # type: ignore[arg-type]


def request(sequences: int = 1, model: str = "m") -> RequestView:
    return RequestView(model=model, sequences=sequences, prompt_tokens=10)


class TestPlace:
    def test_nobody(self) -> None:
        assert place(request(), []) is None

    def test_only_workers_of_the_model_that_take_work(self) -> None:
        workers = [worker("a", model="other"), worker("b", placeable=False), worker("c", placed=7)]
        assert place(request(), workers) == "c"

    def test_least_loaded_by_share_of_a_step(self) -> None:
        # Two of four against three of sixteen.
        assert place(request(), [worker("a", placed=2), worker("b", placed=3, max_seqs=16, max_placed=32)]) == "b"

    def test_fewer_blocks_held_among_equals_then_the_id(self) -> None:
        assert place(request(), [worker("a", kv_used=0.5), worker("b", kv_used=0.1)]) == "b"
        assert place(request(), [worker("b"), worker("a")]) == "a"

    def test_a_burst_over_a_prefix_stays_together_and_spills_when_the_worker_is_full(self) -> None:
        placed = {"a": 0, "b": 0}
        for _ in range(40):
            views = [
                worker(name, placed=count, max_seqs=32, max_placed=64, cached_tokens=512 if count or name == "a" else 0)
                for name, count in placed.items()
            ]
            chosen = place(RequestView(model="m", sequences=1, prompt_tokens=544), views)
            assert chosen is not None
            placed[chosen] += 1
        assert placed["a"] >= 32
        assert placed["b"] > 0

    def test_what_is_cached_outweighs_a_light_load_only(self) -> None:
        long = RequestView(model="m", sequences=1, prompt_tokens=400)
        assert place(long, [worker("a", placed=2, cached_tokens=384), worker("b")]) == "a"
        assert place(long, [worker("a", placed=4, cached_tokens=384), worker("b")]) == "b"

    def test_choices_count_against_the_cap(self) -> None:
        assert place(request(sequences=3), [worker("a", placed=6)]) is None
        assert place(request(sequences=2), [worker("a", placed=6)]) == "a"

    def test_more_choices_than_any_cap_go_to_an_idle_worker(self) -> None:
        assert place(request(sequences=20), [worker("a", placed=1), worker("b")]) == "b"


views = st.builds(
    WorkerView,
    id=st.text("abcdef", min_size=1, max_size=3),
    model=st.sampled_from(["m", "other"]),
    placeable=st.booleans(),
    placed=st.integers(0, 12),
    max_placed=st.integers(1, 10),
    max_seqs=st.integers(1, 8),
    max_step_tokens=st.integers(1, 512),
    cached_tokens=st.integers(0, 20),
    kv_used=st.floats(0, 1),
)


@example(
    workers=[
        replace(worker("a"), max_seqs=1, max_step_tokens=1, max_placed=1),
        replace(worker("b"), max_seqs=1, max_step_tokens=1, max_placed=2, placed=1, cached_tokens=2),
    ],
    sequences=1,
    seed=0,
)
@given(workers=st.lists(views, unique_by=lambda w: w.id, max_size=8), sequences=st.integers(1, 12), seed=st.integers())
def test_the_choice_fits_and_does_not_depend_on_order(workers: list[WorkerView], sequences: int, seed: int) -> None:
    chosen = place(request(sequences), workers)
    shuffled = list(workers)
    random.Random(seed).shuffle(shuffled)
    assert place(request(sequences), shuffled) == chosen
    room = {w.id for w in workers if w.placed == 0 or w.placed + sequences <= w.max_placed}
    fitting = {w.id: w for w in workers if w.id in room and w.placeable and w.model == "m"}
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert not any(_better(w, fitting[chosen]) for w in fitting.values())


def _better(one: WorkerView, other: WorkerView) -> bool:
    """Less loaded, and no dearer in what it has to compute: such a worker is never passed over for the other."""
    steps = [max(0, 10 - w.cached_tokens) / w.max_step_tokens for w in (one, other)]
    return one.placed / one.max_seqs < other.placed / other.max_seqs and steps[0] <= steps[1]
