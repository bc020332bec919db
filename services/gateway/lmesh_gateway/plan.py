"""A request made ready to run: prompt as ids, every default resolved, everything checked."""

from __future__ import annotations

from dataclasses import dataclass

from lmesh_gateway.generation import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParams:
    """Sampling and stopping as the worker gets them; see lmesh.worker.v1.SequenceParams."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: int  # -1: none
    prompt_logprobs: int  # -1: none
    # Neutral where a record from before there were these is taken up.
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is submitted and run. The two deadlines are by `time.monotonic`, `created` is Unix time in seconds."""

    request_id: str
    model: ServedModel
    prompt_ids: tuple[int, ...]
    params: SequenceParams
    n: int
    stop: tuple[str, ...]
    keep_special_tokens: bool
    deadline_at: float
    queue_deadline_at: float
    tenant: str
    traceparent: str
    created: float
    cache_salt: str = ""  # derived from the tenant: tenants must not learn each other's prompts from the cache's speed
    priority: int = 0  # smaller is sooner
    detach_ttl_s: float | None = None  # how long it runs on without a client; None: it is cancelled
    sync: bool = False  # clients see ids when the ledger has them, and not before
