"""The prefix index against a plain model of it, and its hashes against the blocks' own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from lmesh_kernels.blocks import prefix_hashes, root_hash
from lmesh_scheduler.fleet import ModelDescriptor
from lmesh_scheduler.inheritance import Inheritance
from lmesh_scheduler.prefix_index import PENDING_S, Delta, PrefixIndex, granules_of
from lmesh_scheduler.requests import Submission

from tests.scheduler_bench import Bench, hello

BOOT = ("w1", "e1")
MODEL = ModelDescriptor(
    id="m",
    source="s",
    digest="d",
    text_digest="t",
    max_model_len=512,
    vocab_size=1000,
    block_size=16,
    weights_version=3,
    kv_format="float32/16/nhd",
    kv_granule_blocks=4,
)
CACHED = {"weights_version": 3, "kv_format": "float32/16/nhd", "kv_granule_blocks": 4}


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def delta(seq: int, added: tuple[int, ...] = (), removed: tuple[int, ...] = (), *, snapshot: bool = False) -> Delta:
    return Delta(seq, snapshot, b"".join(map(name, added)), b"".join(map(name, removed)))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def index(clock: Clock | None = None) -> PrefixIndex:
    made = PrefixIndex(clock or Clock())
    made.joined(BOOT)
    return made


def leading(of: PrefixIndex, *numbers: int) -> int:
    return of.leading(BOOT, [name(n) for n in numbers])


class TestDeltas:
    def test_a_snapshot_then_changes(self) -> None:
        one = index()
        assert one.apply(BOOT, delta(1, (1, 2), snapshot=True))
        assert one.apply(BOOT, delta(2, (3,), (1,)))
        assert (leading(one, 2, 3), leading(one, 1, 2), leading(one, 2, 9, 3)) == (2, 0, 1)
        assert one.size(BOOT) == 2

    def test_a_gap_forgets_all_until_the_next_snapshot(self) -> None:
        one = index()
        one.apply(BOOT, delta(1, (1,), snapshot=True))
        assert not one.apply(BOOT, delta(3, (2,)))
        assert leading(one, 1) == leading(one, 2) == 0
        assert not one.apply(BOOT, delta(4, (2,)))
        assert one.apply(BOOT, delta(5, (7,), snapshot=True))
        assert one.apply(BOOT, delta(6, (8,)))
        assert leading(one, 7, 8) == 2

    def test_a_link_begins_with_a_snapshot(self) -> None:
        one = index()
        one.apply(BOOT, delta(1, (1,), snapshot=True))
        one.joined(BOOT)
        assert leading(one, 1) == 1  # what was known still serves
        assert not one.apply(BOOT, delta(2, (2,)))

    def test_another_boot_knows_nothing(self) -> None:
        one = index()
        one.apply(BOOT, delta(1, (1,), snapshot=True))
        assert one.leading(("w1", "e2"), [name(1)]) == 0
        one.left(BOOT)
        assert leading(one, 1) == 0
        assert one.apply(BOOT, delta(2, (1,)))  # its last words
        assert one.boots() == []


class TestPending:
    def test_what_was_placed_counts_until_it_is_reported_or_forgotten(self) -> None:
        clock = Clock()
        one = index(clock)
        one.placed(BOOT, [name(1), name(2)])
        assert leading(one, 1, 2, 3) == 2
        one.apply(BOOT, delta(1, (1,), snapshot=True))
        assert leading(one, 1, 2) == 2
        clock.now += PENDING_S
        assert leading(one, 1, 2) == 1


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.booleans()), max_size=30))
def test_the_durable_side_follows(steps: list[tuple[set[int], set[int], bool]]) -> None:
    """Whatever is reported, and whenever it is written: what is written equals what is held."""
    one, held, written = index(), set[bytes](), set[bytes]()
    one.apply(BOOT, delta(1, snapshot=True))
    for seq, (added, removed, write) in enumerate(steps, start=2):
        removed -= added
        one.apply(BOOT, delta(seq, tuple(added), tuple(removed)))
        held = (held - {name(n) for n in removed}) | {name(n) for n in added}
        if write and (changes := one.take_changes(BOOT)) is not None:
            written = (set() if changes.whole else written - changes.removed) | changes.added
            assert written == held
    assert one.size(BOOT) == len(held)


def test_granules_are_named_as_the_worker_names_them() -> None:
    ids = list(range(200))
    submission = Submission(request_id="r", model="m", prompt_ids=ids, max_tokens=1, cache_salt="salt")
    root = root_hash(model_digest="d", weights_version=3, cache_salt="salt", kv_format="float32/16/nhd")
    assert granules_of(submission, MODEL) == prefix_hashes(root, ids, 16)[3::4]
    other = Submission(request_id="r", model="m", prompt_ids=ids, max_tokens=1, cache_salt="another tenant's")
    assert not set(granules_of(submission, MODEL)) & set(granules_of(other, MODEL))


class TestPlacement:
    PROMPT = tuple(range(160))

    def test_a_prefix_goes_where_it_is_held(self) -> None:
        bench = Bench(slots_factor=2.0)
        gateway = bench.gateway()
        workers = [bench.worker(name, max_seqs=8, cached=CACHED) for name in ("w1", "w2")]
        submission = Submission(request_id="r", model="m", prompt_ids=self.PROMPT, max_tokens=1)
        held = b"".join(granules_of(submission, workers[1].hello.model))
        bench.core.index.apply(("w2", "e1"), Delta(1, True, held, b""))
        for request_id in "abc":
            bench.submit(gateway, request_id, prompt_ids=self.PROMPT)
            assert bench.request(request_id).worker_id == "w2"
        bench.submit(gateway, "other", prompt_ids=tuple(range(500, 660)))
        assert bench.request("other").worker_id == "w1"
        bench.submit(gateway, "stranger", prompt_ids=self.PROMPT, cache_salt="x")
        assert bench.request("stranger").worker_id == "w1"

    def test_a_burst_follows_its_first(self) -> None:
        bench = Bench(slots_factor=2.0)
        gateway = bench.gateway()
        for worker_id in ("w1", "w2"):
            bench.worker(worker_id, max_seqs=32, cached=CACHED)
        for i in range(8):
            bench.submit(gateway, f"r{i}", prompt_ids=(*self.PROMPT, i))
        assert {bench.request(f"r{i}").worker_id for i in range(8)} == {"w1"}

    def test_a_new_scheduler_knows_what_the_last_one_wrote(self) -> None:
        """And waits a moment for the worker that holds it, rather than give it to whoever comes first."""
        submission = Submission(request_id="r", model="m", prompt_ids=self.PROMPT, max_tokens=1)
        boots = {("w1", "e1"): "m", ("w2", "e1"): "m", ("w3", "e1"): "m"}
        hashes = set(granules_of(submission, hello(cached=CACHED).model))
        bench = Bench(slots_factor=2.0, inherited=Inheritance(fleet=boots, index={("w2", "e1"): hashes}))
        gateway = bench.gateway()
        bench.worker("w1", max_seqs=8, cached=CACHED)
        bench.submit(gateway, "r", prompt_ids=self.PROMPT)
        bench.pass_time(0.5)
        assert not bench.request("r").lease
        bench.worker("w2", max_seqs=8, cached=CACHED)
        assert not bench.request("r").lease
        bench.pass_time(0.5)
        assert bench.request("r").worker_id == "w2"
        bench.pass_time(6)
        assert bench.core.index.boots() == [("w2", "e1"), ("w1", "e1")]
