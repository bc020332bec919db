"""From OpenAI bodies to the core's requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from lmesh_gateway.generation import (
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    Prompt,
    Sampling,
    StopRules,
    TextPrompt,
    TokenPrompt,
)
from lmesh_gateway.http import headers
from lmesh_gateway.http.errors import MalformedBodyError
from lmesh_gateway.http.schemas import ChatBody, ChatMessage, CompletionBody, ContentPart, SamplingBody
from lmesh_gateway.http.unsupported import check_message, check_part

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_PROMPTS = 2048  # OpenAI's limit; each prompt of a batch is a request of its own, with its own record


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a call's headers say."""

    request_id: str
    deadline_s: float | None
    traceparent: str
    tenant: str = ""
    detach_ttl_s: float | None = None
    sync: bool = False

    @classmethod
    def of(cls, request: Request) -> Envelope:
        """Reads the headers; raises InvalidArgumentError."""
        return cls(
            headers.request_id(request),
            headers.deadline_s(request),
            headers.traceparent(request),
            headers.tenant(request),
            headers.detach_ttl_s(request),
            headers.sync(request),
        )

    def id_of(self, index: int, count: int) -> str:
        """The request id of one prompt of a batch."""
        return self.request_id if count == 1 else f"{self.request_id}-{index}"


def chat_request(body: ChatBody, envelope: Envelope) -> GenerationRequest:
    """The core's request for a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise MalformedBodyError("top_logprobs: needs logprobs to be true", field="top_logprobs")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    messages = tuple(_message(m, i) for i, m in enumerate(body.messages))
    return GenerationRequest(
        model=body.model,
        prompt=ChatPrompt(messages=messages, add_generation_prompt=body.add_generation_prompt is not False),
        request_id=envelope.request_id,
        sampling=_sampling(body),
        stops=_stops(body, limit),
        output=OutputOptions(
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            keep_special_tokens=body.skip_special_tokens is False,
        ),
        deadline_s=envelope.deadline_s,
        priority=body.priority or 0,
        detach_ttl_s=envelope.detach_ttl_s,
        sync=envelope.sync,
        tenant=envelope.tenant,
        traceparent=envelope.traceparent,
    )


def completion_requests(body: CompletionBody, envelope: Envelope) -> list[GenerationRequest]:
    """One request of the core's a prompt."""
    prompts = _prompts(body)
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if limit == 0 and not body.echo:
        raise MalformedBodyError("max_tokens: must be at least 1, or 0 together with echo", field="max_tokens")
    scores_prompt = body.echo and (body.logprobs is not None or limit == 0)
    output = OutputOptions(
        logprobs=body.logprobs,
        prompt_logprobs=(body.logprobs or 0) if scores_prompt else None,
        keep_special_tokens=body.skip_special_tokens is False,
    )
    return [
        GenerationRequest(
            model=body.model,
            prompt=prompt,
            request_id=envelope.id_of(index, len(prompts)),
            sampling=_sampling(body),
            stops=_stops(body, limit),
            output=output,
            deadline_s=envelope.deadline_s,
            priority=body.priority or 0,
            detach_ttl_s=envelope.detach_ttl_s,
            sync=envelope.sync,
            tenant=envelope.tenant,
            traceparent=envelope.traceparent,
        )
        for index, prompt in enumerate(prompts)
    ]


def _sampling(body: SamplingBody) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,  # vLLM writes "all" as -1
        seed=body.seed,
        n=1 if body.n is None else body.n,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_biases(body.logit_bias or {}),
    )


def _biases(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for name, bias in biases.items():
        # isdecimal too: int() also reads " 7", "+7" and "1_0".
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            text = f"logit_bias: names must be token ids, not {name[:64]!r}"
            raise MalformedBodyError(text, field="logit_bias")
        if int(name) in found:
            raise MalformedBodyError(f"logit_bias: names id {int(name)} twice", field="logit_bias")
        found[int(name)] = bias
    return tuple(found.items())


def _stops(body: SamplingBody, max_tokens: int | None) -> StopRules:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return StopRules(
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def _message(message: ChatMessage, index: int) -> Mapping[str, Any]:
    place = f"messages[{index}]"
    check_message(message, place)
    content = message.content
    if content is None:
        raise MalformedBodyError(f"{place}.content: must be a text", field=f"{place}.content")
    if not isinstance(content, str):
        content = "".join(_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": content, **named}


def _text(part: ContentPart, place: str) -> str:
    check_part(part, place)
    if part.text is None:
        raise MalformedBodyError(f"{place}.text: must be given", field=f"{place}.text")
    return part.text


def _prompts(body: CompletionBody) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [TextPrompt(text=prompt)]
    if not prompt:
        raise MalformedBodyError("prompt: must not be empty", field="prompt")
    if isinstance(prompt[0], int):
        return [TokenPrompt(ids=tuple(prompt))]
    if len(prompt) > MAX_PROMPTS:
        raise MalformedBodyError(f"prompt: at most {MAX_PROMPTS} prompts a call, not {len(prompt)}", field="prompt")
    return [TextPrompt(text=p) if isinstance(p, str) else TokenPrompt(ids=tuple(p)) for p in prompt]
