"""The workers: who they are, how they are, and until when that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmesh_scheduler.errors import ModelConflictError, WorkerIdInUseError
from lmesh_scheduler.placement import WorkerView

GATHER_S = 1.0  # workers try again every half second at the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescriptor:
    """A model as its workers announce it."""

    id: str
    source: str
    digest: str
    text_digest: str
    max_model_len: int
    vocab_size: int
    block_size: int
    weights_version: int = 0
    kv_format: str = ""
    kv_granule_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A placement that a worker runs, as it says itself when it joins."""

    request_id: str
    lease: int
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker as it joins."""

    worker_id: str
    epoch: str
    address: str
    model: ModelDescriptor
    max_seqs: int
    max_step_tokens: int
    kv_blocks: int
    device: str
    held: tuple[Held, ...] = ()  # what it runs already
    adapters: tuple[str, ...] = ()  # content digests of those that it holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker's load and progress (the wire's numbers)."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    steps: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    generated_tokens: int = 0
    stuck: bool = False
    progress: int = 1


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """One worker's boot."""

    hello: Hello
    seen: float  # last sign of life, by the scheduler's clock
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    draining: bool = False
    linked: bool = True
    placements: dict[str, int] = field(default_factory=dict)  # request id -> sequences
    placed: int = 0  # sequences placed here and not ended
    revoked: list[int] = field(default_factory=list)  # leases that it is to be told of
    snapshot_due: bool = False  # it is to be asked for a snapshot of its cache
    snapshot_asked: bool = False  # it was, and has not sent it yet
    wake: Callable[[], None] = lambda: None  # its link has something to write

    def revoke(self, lease: int) -> None:
        """The sequences of a lease are to be dropped there."""
        self.revoked.append(lease)
        self.wake()

    def give(self, request_id: str, sequences: int) -> None:
        """A request is placed here."""
        self.placements[request_id] = sequences
        self.placed += sequences

    def take_back(self, request_id: str) -> None:
        """A request has ended; no matter if it was not placed here."""
        self.placed -= self.placements.pop(request_id, 0)

    def view(self, slots_factor: float, *, holds_adapter: bool, cached_tokens: int) -> WorkerView:
        """What placement needs of it; what it holds of one request's is handed in."""
        hello = self.hello
        return WorkerView(
            id=hello.worker_id,
            model=hello.model.id,
            placeable=self.linked and not self.draining and not self.heartbeat.stuck,
            placed=self.placed,
            max_placed=max(1, int(slots_factor * hello.max_seqs)),
            max_seqs=max(1, hello.max_seqs),
            max_step_tokens=max(1, hello.max_step_tokens),
            kv_used=self.heartbeat.kv_blocks_used / max(1, hello.kv_blocks),
            holds_adapter=holds_adapter,
            cached_tokens=cached_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that some worker serves; `created` is Unix seconds."""

    model: ModelDescriptor
    workers: int
    created: float


class Fleet:
    """Workers by id."""

    def __init__(
        self, *, lease_ttl_s: float, alive_s: float, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._lease_ttl_s, self._alive_s, self._clock, self._wall = lease_ttl_s, alive_s, clock, wall
        self._workers: dict[str, Worker] = {}
        self._created: dict[str, float] = {}
        self._left: dict[str, float] = {}  # models without a worker, and since when
        # Workers that an earlier scheduler had, with their models, and since when they are waited for.
        self._expected: dict[str, str] = {}
        self._expected_since = -math.inf

    def expect(self, models: Mapping[str, str]) -> None:
        """An earlier scheduler had these workers (id: model) a moment ago: they are about to join again."""
        self._expected = dict(models)
        self._expected_since = self._clock()
        self._left.update(dict.fromkeys(models.values(), self._clock()))

    @property
    def settled(self) -> bool:
        """Whether all have joined again that are expected, or had their time: only then the catalog means something."""
        return not self._expected or self._clock() - self._expected_since >= self._lease_ttl_s

    def gathering(self, model_id: str) -> bool:
        """Whether workers of a model are about to come back: whoever came first would get what another has cached."""
        waited = self._clock() - self._expected_since
        return waited < GATHER_S and model_id in self._expected.values()

    def workers(self) -> list[Worker]:
        """All, by id."""
        return [self._workers[i] for i in sorted(self._workers)]

    def find(self, worker_id: str, epoch: str = "") -> Worker | None:
        """The worker of this id and, if given, this epoch."""
        worker = self._workers.get(worker_id)
        return worker if worker and epoch in ("", worker.hello.epoch) else None

    def current(self, worker: Worker) -> bool:
        """Whether neither a newer boot nor a newer link of the same boot has taken over."""
        return self._workers.get(worker.hello.worker_id) is worker

    def serving(self, model_id: str) -> list[Worker]:
        """Workers of a model, in no order that matters."""
        return [w for w in self._workers.values() if w.hello.model.id == model_id]

    def join(self, hello: Hello) -> tuple[Worker, Worker | None]:
        """Takes a worker in; returns it and the older boot that it replaces, if there is one.

        Raises WorkerIdInUseError while another boot of that id is heard of, ModelConflictError for other weights,
        tokenizer or block size under a served id.
        """
        before = self._workers.get(hello.worker_id)
        replaced = before if before and before.hello.epoch != hello.epoch else None
        if replaced is not None and self._alive(replaced):
            raise WorkerIdInUseError(
                f"worker id {hello.worker_id} is in use at {replaced.hello.address}: give each worker its own",
                field="worker_id",
            )
        self._check_model(hello)
        worker = Worker(hello=hello, seen=self._clock())
        if before and replaced is None:  # the same boot on a new link: an object of its own, so that links differ
            worker.placements, worker.placed, worker.heartbeat = before.placements, before.placed, before.heartbeat
            worker.revoked = before.revoked
        self._expected.pop(hello.worker_id, None)
        self._workers[hello.worker_id] = worker
        self._created.setdefault(hello.model.id, self._wall())
        self._left.pop(hello.model.id, None)
        return worker, replaced

    def _alive(self, worker: Worker) -> bool:
        # A broken host leaves its link standing; only heartbeats tell that a boot is still there.
        return worker.linked and self._clock() - worker.seen < self._alive_s

    def _check_model(self, hello: Hello) -> None:
        mine = hello.model
        for other in self.serving(mine.id):
            theirs = other.hello.model
            if other.hello.worker_id != hello.worker_id and _identity(mine) != _identity(theirs):
                raise ModelConflictError(
                    f"model {mine.id} is served with {_words(theirs)}, this worker has {_words(mine)}: "
                    "give it another id",
                    field="model.id",
                )

    def leave(self, worker: Worker) -> None:
        """Forgets a worker."""
        if self._workers.get(worker.hello.worker_id) is worker:
            del self._workers[worker.hello.worker_id]
        if not self.serves(worker.hello.model.id):
            self._left[worker.hello.model.id] = self._clock()

    def overdue(self) -> list[Worker]:
        """Workers whose lease has lapsed."""
        limit = self._clock() - self._lease_ttl_s
        return [w for w in self._workers.values() if w.seen < limit]

    def beat(self, worker: Worker, heartbeat: Heartbeat) -> None:
        """A sign of life."""
        worker.heartbeat, worker.seen = heartbeat, self._clock()

    def serves(self, model_id: str) -> bool:
        """Whether some worker serves this model."""
        return bool(self.serving(model_id))

    def awaited(self, model_id: str, grace_s: float) -> bool:
        """Whether the model's last worker left so lately that another may come."""
        left = self._left.get(model_id)
        return left is not None and self._clock() - left < grace_s

    def catalog(self) -> list[CatalogEntry]:
        """Models that are served, by id."""
        return [self._entry(model_id) for model_id in sorted({w.hello.model.id for w in self._workers.values()})]

    def _entry(self, model_id: str) -> CatalogEntry:
        models = [w.hello.model for w in self.serving(model_id)]
        # A request must fit wherever it is placed: the shortest context counts.
        model = min(models, key=lambda m: (m.max_model_len, m.source))
        return CatalogEntry(model=model, workers=len(models), created=self._created[model_id])


def _identity(model: ModelDescriptor) -> tuple[str, str, int, int]:
    return model.digest, model.text_digest, model.block_size, model.vocab_size


def _words(model: ModelDescriptor) -> str:
    return (
        f"digest {model.digest[:12]}, text digest {model.text_digest[:12]}, "
        f"{model.vocab_size} logits and blocks of {model.block_size}"
    )
