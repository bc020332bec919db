"""Whether a sequence can run at all: checks that would otherwise surface inside an engine step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lmesh_worker.messages import Params

# Kept here, not in errors: the engine process checks too, and it must not import gRPC.
INVALID_START = "INVALID_START"
PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
MAX_TOP_K = 2**31 - 1  # the device holds it as int32
MAX_REPETITION = 100.0
MAX_PENALTY = 2.0
MAX_BIASES = 300
MAX_BIAS = 100.0


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
    if min(ids) < 0:
        return Fault(INVALID_START, f"ids must be at least 0, not {min(ids)}")
    return _params_fault(params, limits.vocab_size)


def _params_fault(params: Params, vocab_size: int) -> Fault | None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return Fault(INVALID_START, "temperature must be finite and at least 0")
    if not 0 < params.top_p <= 1:
        return Fault(INVALID_START, "top_p must lie in (0, 1]")
    if not 0 <= params.top_k <= MAX_TOP_K:
        return Fault(INVALID_START, f"top_k must lie in 0..{MAX_TOP_K}, 0 for all")
    if not (-1 <= params.logprobs <= vocab_size and -1 <= params.prompt_logprobs <= vocab_size):
        return Fault(INVALID_START, f"logprobs and prompt_logprobs must lie in -1..{vocab_size}, -1 for none")
    if params.max_tokens < (0 if params.prompt_logprobs >= 0 else 1):
        return Fault(INVALID_START, "max_tokens must be at least 1, or 0 with prompt_logprobs")
    return _adjustment_fault(params, vocab_size)


def _adjustment_fault(params: Params, vocab_size: int) -> Fault | None:
    if not 0 <= params.min_p <= 1:  # a NaN is neither
        return Fault(INVALID_START, "min_p must lie in [0, 1], 0 for off")
    if not 0 < params.repetition_penalty <= MAX_REPETITION:
        return Fault(INVALID_START, f"repetition_penalty must lie in (0, {MAX_REPETITION:g}], 1 for off")
    if not (abs(params.presence_penalty) <= MAX_PENALTY and abs(params.frequency_penalty) <= MAX_PENALTY):
        return Fault(
            INVALID_START, f"presence_penalty and frequency_penalty must lie in [-2, {MAX_PENALTY:g}], 0 for off"
        )
    if len(params.logit_bias) > MAX_BIASES:
        return Fault(INVALID_START, f"logit_bias takes at most {MAX_BIASES} ids, not {len(params.logit_bias)}")
    for token, bias in params.logit_bias:
        if not (0 <= token < vocab_size and abs(bias) <= MAX_BIAS):
            return Fault(INVALID_START, f"logit_bias takes ids below {vocab_size} and at most {MAX_BIAS:g} either way")
    if len({token for token, _ in params.logit_bias}) < len(params.logit_bias):
        return Fault(INVALID_START, "logit_bias must name each id once")
    return None
