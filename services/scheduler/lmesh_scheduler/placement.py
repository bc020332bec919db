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
    reserve: int = 0  # places of each worker that are not for this request


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What placement knows of a worker."""

    id: str
    model: str
    placeable: bool  # healthy, and not leaving
    placed: int  # sequences placed on it and not ended
    max_placed: int  # as many as it may be given
    max_seqs: int  # of one step
    max_step_tokens: int  # of one step
    kv_used: float  # share of its KV blocks held by live sequences
    holds_adapter: bool = True  # that of this request, if it has one
    cached_tokens: int = 0  # of this request's prompt, held there or about to be


def place(request: RequestView, workers: Iterable[WorkerView]) -> str | None:
    """The id of the worker with room on which the request costs least, or None.

    The cost, in steps: what of the prompt it has to compute, in steps full of prompt tokens, plus the square of its
    load, in steps full of sequences. Rows share a step almost for nothing until it is nearly full, hence the square:
    a burst of 32 over a prefix of 512 tokens stays together on a worker of 32 rows and 512 tokens a step, and the next
    one goes to an idle worker (docs/decisions/0004). Then fewer KV blocks held, then the id, so the answer is the same
    for the same views in any order. A request with more choices than a worker ever takes goes to an idle one.
    """
    able = [w for w in workers if w.model == request.model and w.placeable and w.holds_adapter]
    fitting = [w for w in able if _has_room(w, request)]
    best = min(fitting, key=lambda w: (_cost(request, w), w.kv_used, w.id), default=None)
    return None if best is None else best.id


def _cost(request: RequestView, worker: WorkerView) -> float:
    prefill = max(0, request.prompt_tokens - worker.cached_tokens) / worker.max_step_tokens
    load: float = (worker.placed / worker.max_seqs) ** 2
    return prefill + load


def _has_room(worker: WorkerView, request: RequestView) -> bool:
    return worker.placed == 0 or worker.placed + request.sequences <= max(1, worker.max_placed - request.reserve)
