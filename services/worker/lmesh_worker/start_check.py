"""Whether a sequence can run at all: checks that would otherwise surface inside an engine step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lmesh_worker.messages import Params

# Kept here, not in errors: the engine process checks too, and it must not import gRPC.
INVALID_START = "INVALID_START"
PROMPT_TOO_LONG = "PROMPT_TOO_LONG"


class Fault(NamedTuple):
    """Why a sequence cannot run: UPPER_SNAKE reason and a text for the person."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine can take: `max_model_len` tokens of prompt and output together, ids below `vocab_size`."""

    max_model_len: int
    vocab_size: int


def find_fault(ids: list[int], prompt_len: int, params: Params, limits: Limits) -> Fault | None:
    """The first fault of a sequence, or None."""
    if not 1 <= prompt_len <= len(ids):
        return Fault(INVALID_START, f"prompt_len must lie in 1..{len(ids)}, not {prompt_len}")
    room = limits.max_model_len - min(params.max_tokens, 1)  # for the first new token
    if len(ids) > room:
        return Fault(PROMPT_TOO_LONG, f"{len(ids)} tokens; the model takes {room}, and its output")
    if max(ids) >= limits.vocab_size:
        return Fault(INVALID_START, f"id {max(ids)} is not below the vocabulary's {limits.vocab_size}")
    return _params_fault(params)


def _params_fault(params: Params) -> Fault | None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return Fault(INVALID_START, "temperature must be finite and at least 0")
    if not 0 < params.top_p <= 1:
        return Fault(INVALID_START, "top_p must lie in (0, 1]")
    if params.logprobs < -1 or params.prompt_logprobs < -1:
        return Fault(INVALID_START, "logprobs and prompt_logprobs must be -1 (none) or more")
    if params.max_tokens < 1 and params.prompt_logprobs < 0:
        return Fault(INVALID_START, "max_tokens must be at least 1, or 0 with prompt_logprobs")
    return None
