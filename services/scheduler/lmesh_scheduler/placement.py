"""Which worker takes a request: a pure function of what is known when it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What placement knows of a request."""

    model: str
    sequences: int  # choices
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What placement knows of a worker."""

    id: str
    model: str
    placeable: bool  # healthy, and not leaving
    placed: int  # sequences placed on it and not ended
    max_placed: int  # as many as it may be given
    max_seqs: int  # of one step
    kv_used: float  # share of its KV blocks held by live sequences


def place(request: RequestView, workers: Iterable[WorkerView]) -> str | None:
    """The id of the least loaded worker that has room, or None.

    Load is sequences placed against sequences of a step, then KV blocks held; ids break ties, so the answer is
    the same for the same views in any order. A request with more choices than a worker ever takes goes to an idle one.
    """
    fitting = [w for w in workers if w.model == request.model and w.placeable and _has_room(w, request)]
    best = min(fitting, key=lambda w: (w.placed / w.max_seqs, w.kv_used, w.id), default=None)
    return None if best is None else best.id


def _has_room(worker: WorkerView, request: RequestView) -> bool:
    return worker.placed == 0 or worker.placed + request.sequences <= worker.max_placed
