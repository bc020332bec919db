"""Which worker is told to hold which adapter, with scripted answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from lmesh_scheduler.adapters.registry import AdapterRegistry, Published, fits
from lmesh_scheduler.adapters.residency import BANK_FULL, BUSY_RETRY_S, RETRY_S, Residency
from lmesh_scheduler.fleet import Fleet, Hello, ModelDescriptor, Worker


@dataclass
class Scene:
    """Workers of one model, whose bank takes `room` adapters."""

    room: int = 10
    now: float = 0.0
    busy: dict[str, set[str]] = field(default_factory=dict)  # worker's id -> digests in use
    bad: set[str] = field(default_factory=set)
    held: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = AdapterRegistry()
        clock = lambda: self.now  # noqa: E731
        self.fleet = Fleet(lease_ttl_s=5, alive_s=2, clock=clock, wall=clock)
        self.residency = Residency(
            self.registry, self.fleet, clock=clock, in_use=lambda w: self.busy.get(w.hello.worker_id, set())
        )

    def worker(self, worker_id: str = "w1", adapters: tuple[str, ...] = ()) -> Worker:
        model = ModelDescriptor(
            id="m", source="s", digest="base", text_digest="t", max_model_len=1, vocab_size=1, block_size=1
        )
        hello = Hello(
            worker_id=worker_id,
            epoch="e",
            address="a",
            model=model,
            max_seqs=8,
            max_step_tokens=8,
            kv_blocks=8,
            device="cpu",
            adapters=adapters,
        )
        worker, _ = self.fleet.join(hello)
        self.held[worker_id] = list(adapters)
        self.residency.joined(worker, adapters)
        return worker

    def publish(self, name: str, version: int = 1, **fields: Any) -> Published:
        defaults: dict[str, Any] = {"tenant": "", "model": "m", "digest": f"{name}{version}", "artifact": f"f-{name}"}
        entry = Published(name=name, version=version, created=0.0, **(defaults | fields))
        self.registry.put(entry)
        return entry

    def answer(self, worker: Worker) -> list[str]:
        """The worker obeys, until nothing is asked; what it was told."""
        shelf, told, held = self.residency.shelf(worker), [], self.held[worker.hello.worker_id]
        while shelf.loads or shelf.drops:
            drops, loads = shelf.drops, shelf.loads
            shelf.drops, shelf.loads = [], []
            for digest in drops:
                told.append(f"-{digest}")
                held[:] = [d for d in held if d != digest]
                self.residency.told(worker, digest, held=False)
            for digest, _ in loads:
                told.append(f"+{digest}")
                self._load(worker, digest, held)
        return told

    def _load(self, worker: Worker, digest: str, held: list[str]) -> None:
        if digest in self.bad:
            self.residency.told(worker, digest, held=False, reason="UNKNOWN_TENSORS", message="no slot")
        elif len(held) >= self.room:
            self.residency.told(worker, digest, held=False, reason=BANK_FULL, message="full")
        else:
            held.append(digest)
            self.residency.told(worker, digest, held=True)


def test_a_worker_that_joins_is_given_the_newest_versions() -> None:
    scene = Scene()
    for version in (1, 2):
        scene.publish("a", version)
    scene.publish("b", model="other")
    assert scene.answer(scene.worker()) == ["+a2"]


def test_what_it_holds_already_is_not_loaded_again_and_what_is_gone_is_dropped() -> None:
    scene = Scene()
    scene.publish("a")
    worker = scene.worker(adapters=("a1", "gone"))
    scene.residency.tick()
    assert scene.answer(worker) == ["-gone"]


def test_an_offer_is_loaded_everywhere_before_it_is_published() -> None:
    scene = Scene()
    workers = [scene.worker("w1"), scene.worker("w2")]
    entry = scene.publish("a")
    scene.registry.remove(entry)
    scene.residency.offer(entry)
    assert not scene.residency.settled(entry)
    assert [scene.answer(worker) for worker in workers] == [["+a1"], ["+a1"]]
    assert scene.residency.settled(entry) and scene.residency.hopeless("m", "a1") is None
    scene.residency.withdraw("a1")  # it was not taken up
    scene.residency.tick()
    assert [scene.answer(worker) for worker in workers] == [["-a1"], ["-a1"]]


def test_what_no_worker_can_load_is_hopeless_for_a_while() -> None:
    scene = Scene(bad={"a1"})
    workers = [scene.worker("w1"), scene.worker("w2")]
    entry = scene.publish("a")
    scene.residency.offer(entry)
    assert scene.answer(workers[0]) == ["+a1"]
    assert scene.residency.hopeless("m", "a1") is None  # the other may
    scene.answer(workers[1])
    fault = scene.residency.hopeless("m", "a1")
    assert fault is not None and fault.reason == "UNKNOWN_TENSORS"
    scene.residency.want("m", "a1")
    assert scene.answer(workers[0]) == []
    scene.now += RETRY_S
    scene.bad.clear()
    scene.residency.want("m", "a1")
    assert scene.answer(workers[0]) == ["+a1"]


def test_the_longest_unused_makes_room_for_what_is_needed() -> None:
    scene = Scene(room=2)
    for name in "abc":
        scene.publish(name)
    worker = scene.worker()
    assert scene.answer(worker) == ["+a1", "+b1", "+c1"]  # nobody waits for c: nothing makes room for it
    scene.now = 1.0
    scene.residency.used(worker, "a1")
    scene.residency.want("m", "c1")
    assert scene.answer(worker) == ["+c1", "-b1", "+c1"] and scene.held["w1"] == ["a1", "c1"]


def test_what_is_in_use_stays() -> None:
    scene = Scene(room=1, busy={"w1": {"a1"}})
    for name in "ab":
        scene.publish(name)
    worker = scene.worker(adapters=("a1",))
    scene.answer(worker)
    scene.residency.want("m", "b1")
    assert scene.answer(worker) == ["+b1"]
    assert scene.residency.hopeless("m", "b1") is None  # its turn comes
    scene.residency.want("m", "b1")
    assert scene.answer(worker) == []
    scene.busy.clear()
    scene.now += BUSY_RETRY_S
    scene.residency.want("m", "b1")
    assert scene.answer(worker) == ["+b1", "-a1", "+b1"]


def test_a_deleted_adapter_leaves_when_nothing_runs_with_it() -> None:
    scene = Scene(busy={"w1": {"a1"}})
    entry = scene.publish("a")
    worker = scene.worker()
    scene.answer(worker)
    scene.registry.remove(entry)
    scene.residency.tick()
    assert scene.answer(worker) == []
    scene.busy.clear()
    scene.residency.tick()
    assert scene.answer(worker) == ["-a1"]
    fault = scene.residency.hopeless("m", "a1")
    assert fault is not None and fault.reason == "ADAPTER_NOT_FOUND"


def test_one_deleted_while_it_was_on_its_way_is_dropped() -> None:
    scene = Scene()
    entry = scene.publish("a")
    worker = scene.worker()
    scene.registry.remove(entry)
    assert scene.answer(worker) == ["+a1", "-a1"] and not scene.residency.holds(worker, "a1")


def test_one_worker_at_a_time_is_asked_for_what_is_needed() -> None:
    scene = Scene(room=0)
    first, second = scene.worker("w1"), scene.worker("w2")
    first.placed = 3
    scene.publish("a")
    scene.residency.want("m", "a1")
    assert not scene.residency.shelf(first).loads and scene.residency.shelf(second).loads == [("a1", "f-a")]


@pytest.mark.parametrize(
    ("trained_on", "served", "waived", "expected"),
    [
        ("base", "base", False, True),
        ("", "base", False, True),  # nobody says
        ("other", "base", False, False),
        ("other", "base", True, False),
        ("base+nf4", "base", False, False),
        ("base+nf4", "base", True, True),
        ("base", "base+nf4", True, True),
        ("base", "dummy-base", True, False),  # random weights are no recipe of the base
        ("", "dummy-base", False, True),  # as measuring adapters without a checkpoint wants it
    ],
)
def test_an_adapter_fits_its_own_base(trained_on: str, served: str, waived: bool, expected: bool) -> None:
    entry = Scene().publish("a", base_digest=trained_on, recipe_mismatch=waived)
    assert fits(entry, served) is expected


def test_only_its_tenant_may_ask_for_it() -> None:
    scene = Scene()
    scene.publish("a", tenant="t")
    assert scene.registry.allows("t", "m", "a1")
    assert not scene.registry.allows("u", "m", "a1") and not scene.registry.allows("t", "n", "a1")
