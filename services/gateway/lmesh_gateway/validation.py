"""Checks of a request, field by field: each refusal names the field and what would be right."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence

from lmesh_gateway.errors import ContextLengthExceededError, InvalidArgumentError
from lmesh_gateway.generation import (
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    Prompt,
    Sampling,
    ServedModel,
    StopRules,
    TextPrompt,
    TokenPrompt,
)

MAX_CHOICES = 128
MAX_TEMPERATURE = 100.0
MAX_REPETITION = 100.0
MAX_PENALTY = 2.0  # OpenAI's, either way
MAX_BIASES = 300
MAX_BIAS = 100.0  # OpenAI's, either way
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256  # the matcher looks at each possible start of a stop string after each token
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_DETACH_TTL_S = 3600.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:~-]{1,128}")


def check_request(request: GenerationRequest) -> None:
    """Everything that can be checked before the model is known; raises InvalidArgumentError."""
    if not request.model:
        raise _wrong("model", "must name a model; ListModels gives the names")
    if request.request_id is not None and not is_request_id(request.request_id):
        raise _wrong("request_id", "must be 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -")
    _check_prompt(request.prompt)
    _check_sampling(request.sampling)
    _check_stops(request.stops)
    _check_output(request.output)
    _check_times(request)
    if request.stops.max_tokens == 0 and request.output.prompt_logprobs is None:
        raise _wrong("stop.max_tokens", "must be at least 1, or 0 together with output.prompt_logprobs")


def is_request_id(text: str) -> bool:
    """Whether a client may name its request so."""
    return _REQUEST_ID.fullmatch(text) is not None


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidArgumentError for the first id outside the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        index = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise _wrong(f"{field}[{index}]", f"{ids[index]} is no id of the model; ids lie in [0, {vocab_size})")


def check_against_model(request: GenerationRequest, prompt_ids: Sequence[int], model: ServedModel) -> None:
    """Ids in the vocabulary and a prompt that fits; raises InvalidArgumentError or ContextLengthExceededError."""
    field = prompt_field(request.prompt)
    check_ids(field, prompt_ids, model.vocab_size)
    check_ids("stop.stop_token_ids", request.stops.stop_token_ids, model.vocab_size)
    for token, _ in request.sampling.logit_bias:
        if not 0 <= token < model.vocab_size:
            text = f"{token} is no id of the model; ids lie in [0, {model.vocab_size})"
            raise _wrong(f"sampling.logit_bias[{token}]", text)
    if not prompt_ids:
        raise _wrong(field, "the prompt has no tokens; write something")
    room = 0 if request.stops.max_tokens == 0 else 1
    if len(prompt_ids) + room > model.max_model_len:
        raise ContextLengthExceededError(
            f"the prompt has {len(prompt_ids)} tokens, and {model.id} takes {model.max_model_len} tokens of prompt and "
            f"output together; shorten the prompt to at most {model.max_model_len - room}",
            field=field,
            metadata={"prompt_tokens": str(len(prompt_ids)), "max_model_len": str(model.max_model_len)},
        )


def check_text_length(field: str, text: str, model: ServedModel) -> None:
    """Refuses text that cannot fit however it is tokenized, before seconds go into tokenizing it."""
    # Twice: a normalizer may shorten the text.
    most = 2 * model.max_model_len * model.longest_token_bytes
    if most and len(text) > most:  # characters, of which each has at least a byte
        raise ContextLengthExceededError(
            f"the prompt has {len(text)} characters, and {model.id} takes {model.max_model_len} tokens of prompt and "
            "output together; shorten the prompt",
            field=field,
            metadata={"prompt_characters": str(len(text)), "max_model_len": str(model.max_model_len)},
        )


def prompt_field(prompt: Prompt) -> str:
    """The request field that a prompt came in."""
    if isinstance(prompt, TextPrompt):
        return "text.prompt"
    return "tokens.ids" if isinstance(prompt, TokenPrompt) else "chat.messages"


def _check_prompt(prompt: Prompt) -> None:
    if isinstance(prompt, TokenPrompt) and not prompt.ids:
        raise _wrong("tokens.ids", "must hold at least one id")
    if not isinstance(prompt, ChatPrompt):
        return
    if not prompt.messages:
        raise _wrong("chat.messages", "must hold at least one message")
    for index, message in enumerate(prompt.messages):
        if not message.get("role"):
            raise _wrong(f"chat.messages[{index}].role", "must be given, such as user")


def _check_sampling(sampling: Sampling) -> None:
    temperature, top_p = sampling.temperature, sampling.top_p
    if temperature is not None and not 0 <= temperature <= MAX_TEMPERATURE:  # false for NaN too
        raise _wrong("sampling.temperature", f"must lie in [0, {MAX_TEMPERATURE:g}], not {temperature}")
    if top_p is not None and not (math.isfinite(top_p) and 0 < _float32(top_p) <= 1):
        raise _wrong("sampling.top_p", f"must lie in (0, 1], not {top_p}")
    if sampling.top_k is not None and not 0 <= sampling.top_k < 2**31:
        raise _wrong("sampling.top_k", f"must be 0 (all) or more, not {sampling.top_k}")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise _wrong("sampling.seed", f"must lie in [0, 2^64), not {sampling.seed}")
    if not 1 <= sampling.n <= MAX_CHOICES:
        raise _wrong("sampling.n", f"must lie in 1..{MAX_CHOICES}, not {sampling.n}")
    _check_adjustment(sampling)


def _check_adjustment(sampling: Sampling) -> None:
    """Conditions are false for NaN too."""
    if sampling.min_p is not None and not 0 <= sampling.min_p <= 1:
        raise _wrong("sampling.min_p", f"must lie in [0, 1], not {sampling.min_p}")
    repetition = sampling.repetition_penalty
    if repetition is not None and not (0 < repetition <= MAX_REPETITION and _float32(repetition) > 0):
        raise _wrong("sampling.repetition_penalty", f"must lie in (0, {MAX_REPETITION:g}], not {repetition}")
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(sampling, name)
        if penalty is not None and not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            raise _wrong(f"sampling.{name}", f"must lie in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], not {penalty}")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise _wrong("sampling.logit_bias", f"at most {MAX_BIASES} ids, not {len(sampling.logit_bias)}")
    for token, bias in sampling.logit_bias:
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _wrong(f"sampling.logit_bias[{token}]", f"must lie in [-{MAX_BIAS:g}, {MAX_BIAS:g}], not {bias}")


def _float32(value: float) -> float:
    """As the wire carries it: a mass that becomes 0 there would be refused further in."""
    if abs(value) > 1:
        return value
    single: float = struct.unpack("f", struct.pack("f", value))[0]
    return single


def _check_stops(stops: StopRules) -> None:
    if stops.max_tokens is not None and not 0 <= stops.max_tokens < 2**31:
        raise _wrong("stop.max_tokens", f"must be 0 or more, not {stops.max_tokens}")
    if len(stops.stop) > MAX_STOPS:
        raise _wrong("stop.stop", f"at most {MAX_STOPS} stop strings, not {len(stops.stop)}")
    for index, stop in enumerate(stops.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _wrong(f"stop.stop[{index}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}")
    if len(stops.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _wrong("stop.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids, not {len(stops.stop_token_ids)}")


def _check_output(output: OutputOptions) -> None:
    for field, count in (("logprobs", output.logprobs), ("prompt_logprobs", output.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise _wrong(f"output.{field}", f"must lie in 0..{MAX_LOGPROBS}, not {count}")


def _check_times(request: GenerationRequest) -> None:
    if abs(request.priority) > MAX_PRIORITY:
        raise _wrong("priority", f"must lie in -{MAX_PRIORITY}..{MAX_PRIORITY}, not {request.priority}")
    ttl = request.detach_ttl_s
    if ttl is not None and not 0 < ttl <= MAX_DETACH_TTL_S:  # a NaN is neither
        raise _wrong("detach_ttl", f"must be longer than 0 and at most {MAX_DETACH_TTL_S:g} s, not {ttl:g} s")
    timeout = request.queue_timeout_s
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise _wrong("queue_timeout", f"must be longer than 0, not {timeout} s")


def _wrong(field: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {message}", field=field)
