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
from lmesh_gateway.http.schemas import ChatBody, ChatMessage, CompletionBody, SamplingBody

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a call's headers say."""

    request_id: str | None
    deadline_s: float | None
    traceparent: str

    @classmethod
    def of(cls, request: Request) -> Envelope:
        """Reads the headers; raises InvalidArgumentError."""
        return cls(headers.request_id(request), headers.deadline_s(request), headers.traceparent(request))

    def id_of(self, index: int, count: int) -> str | None:
        """The request id of one prompt of a batch."""
        return self.request_id if self.request_id is None or count == 1 else f"{self.request_id}-{index}"


def chat_request(body: ChatBody, envelope: Envelope) -> GenerationRequest:
    """The core's request for a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise MalformedBodyError("top_logprobs: needs logprobs to be true", field="top_logprobs")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    messages = tuple(_message(m, i) for i, m in enumerate(body.messages))
    return GenerationRequest(
        model=body.model,
        prompt=ChatPrompt(messages=messages, add_generation_prompt=body.add_generation_prompt),
        request_id=envelope.request_id,
        sampling=_sampling(body),
        stops=_stops(body, limit),
        output=OutputOptions(
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            keep_special_tokens=not body.skip_special_tokens,
        ),
        deadline_s=envelope.deadline_s,
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
        keep_special_tokens=not body.skip_special_tokens,
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
    )


def _stops(body: SamplingBody, max_tokens: int | None) -> StopRules:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return StopRules(
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
    )


def _message(message: ChatMessage, index: int) -> Mapping[str, Any]:
    unsupported = [name for name, value in (message.model_extra or {}).items() if value]
    if unsupported:
        field = f"messages[{index}].{unsupported[0]}"
        raise MalformedBodyError(f"{field}: is not supported yet; leave it out", field=field)
    content = message.content
    if content is None:
        raise MalformedBodyError(f"messages[{index}].content: must be a text", field=f"messages[{index}].content")
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": text, **named}


def _prompts(body: CompletionBody) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [TextPrompt(text=prompt)]
    if not prompt:
        raise MalformedBodyError("prompt: must not be empty", field="prompt")
    if isinstance(prompt[0], int):
        return [TokenPrompt(ids=tuple(prompt))]
    return [TextPrompt(text=p) if isinstance(p, str) else TokenPrompt(ids=tuple(p)) for p in prompt]
