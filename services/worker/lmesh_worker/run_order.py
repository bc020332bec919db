"""What a gateway asks of a worker, and how much the worker bears with it."""

from __future__ import annotations

from dataclasses import dataclass

from lmesh_worker.messages import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOrder:
    """One sequence as a gateway asks for it; fields as in lmesh.worker.v1.Start."""

    slot: int
    lease: int
    request_id: str
    choice: int
    ids: list[int]
    prompt_len: int
    params: Params
    cache_salt: str
    traceparent: str
    priority: int
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """How far a gateway may fall behind, and how long its sequences outlive its stream."""

    grace_s: float
    max_unacked_steps: int
    max_unacked_bytes: int
