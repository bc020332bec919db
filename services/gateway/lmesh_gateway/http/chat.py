"""POST /v1/chat/completions: the core's events as OpenAI's chat objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lmesh_gateway.generation import Accepted, ChoiceEnd, Delta, Event, Finish, TokenLogprob, TokenLogprobs, Usage
from lmesh_gateway.http.cursor import Cursor
from lmesh_gateway.http.sse import DONE, event
from lmesh_gateway.http.usage import usage_object

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heading:
    """What every chunk of one call repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, accepted: Accepted) -> Heading:
        """From the first event."""
        return cls(f"chatcmpl-{accepted.request_id}", int(accepted.created), accepted.model)

    def chunk(self, choices: list[Object], usage: Object | None = None) -> Object:
        """A chunk object."""
        base = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return {**base, "choices": choices} | ({} if usage is None else {"usage": usage})


async def chunks(
    accepted: Accepted, events: AsyncIterator[Event], include_usage: bool, cursor: Cursor
) -> AsyncGenerator[str, None]:
    """The stream: the role first, then text, each choice's end, the counts if they are wanted, [DONE].

    Each event's id is the cursor after it; a choice that the cursor has begun had its role before.
    """
    heading, greeted = Heading.of(accepted), cursor.begun
    async for item in events:
        if isinstance(item, Delta | ChoiceEnd) and item.choice not in greeted:
            greeted.add(item.choice)
            yield event(heading.chunk([_choice(item.choice, {"role": "assistant", "content": ""})]), cursor)
        cursor.count(item)
        if isinstance(item, Delta):
            if item.text or item.logprobs:
                yield event(heading.chunk([_choice(item.choice, {"content": item.text}, item.logprobs)]), cursor)
        elif isinstance(item, ChoiceEnd):
            yield event(heading.chunk([_choice(item.choice, {}, reason=item.reason)]), cursor)
        elif isinstance(item, Finish) and include_usage:
            yield event(heading.chunk([], usage_object([item.usage])), cursor)
    yield DONE


def _choice(
    index: int, delta: Object, logprobs: tuple[TokenLogprobs, ...] | None = None, reason: str | None = None
) -> Object:
    told = None if logprobs is None else {"content": [logprob_object(p) for p in logprobs], "refusal": None}
    return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}


@dataclass(slots=True)
class _Gathered:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    reason: str = ""


async def whole(accepted: Accepted, events: AsyncIterator[Event]) -> Object:
    """The answer in one object."""
    choices: dict[int, _Gathered] = {}
    usage = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
    async for item in events:
        if isinstance(item, Delta):
            gathered = choices.setdefault(item.choice, _Gathered())
            gathered.text.append(item.text)
            if item.logprobs is not None:
                gathered.logprobs = [*(gathered.logprobs or []), *item.logprobs]
        elif isinstance(item, ChoiceEnd):
            choices.setdefault(item.choice, _Gathered()).reason = item.reason
        elif isinstance(item, Finish):
            usage = item.usage
    heading = Heading.of(accepted)
    return {
        "id": heading.id,
        "object": "chat.completion",
        "created": heading.created,
        "model": heading.model,
        "choices": [_whole_choice(index, choices[index]) for index in sorted(choices)],
        "usage": usage_object([usage]),
    }


def _whole_choice(index: int, gathered: _Gathered) -> Object:
    logprobs = None
    if gathered.logprobs is not None:
        logprobs = {"content": [logprob_object(p) for p in gathered.logprobs], "refusal": None}
    message = {"role": "assistant", "content": "".join(gathered.text), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": gathered.reason}


def logprob_object(entry: TokenLogprobs) -> Object:
    """One token's entry."""
    return {**_token(entry.token), "top_logprobs": [_token(t) for t in entry.top]}


def _token(token: TokenLogprob) -> Object:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
