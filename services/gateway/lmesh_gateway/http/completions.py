"""POST /v1/completions: the core's events, of one prompt or of a batch, as OpenAI's text completion objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lmesh_gateway.generation import Accepted, ChoiceEnd, Delta, Finish, TokenLogprobs, Usage
from lmesh_gateway.http.cursor import Cursor
from lmesh_gateway.http.fanout import Tagged
from lmesh_gateway.http.sse import DONE, event
from lmesh_gateway.http.usage import usage_object

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it stands before its completion: its text, and the text of each of its ids."""

    text: str
    tokens: tuple[str, ...]


@dataclass(slots=True)
class _Choice:
    """One choice as far as it has come; `offset` is where the next token's text begins in the choice's text."""

    index: int
    echo: Echo | None
    offset: int = 0
    echoed: bool = False
    text: list[str] = field(default_factory=list)
    logprobs: Object | None = None
    reason: str | None = None


class Completions:
    """Turns one call's events into chunks, or gathers them into one object.

    Choice c of prompt p has index p * n + c, as OpenAI numbers them.
    """

    def __init__(self, *, call_id: str, model: str, created: int, n: int, echoes: list[Echo | None]) -> None:
        self._head = {"id": f"cmpl-{call_id}", "object": "text_completion", "created": created, "model": model}
        self._n = n
        self._choices = [_Choice(p * n + c, echo) for p, echo in enumerate(echoes) for c in range(n)]
        self._usages: list[Usage] = []
        self._prompt_scores: dict[int, tuple[TokenLogprobs, ...]] = {}

    async def chunks(
        self, events: AsyncIterator[Tagged], include_usage: bool, cursor: Cursor | None
    ) -> AsyncGenerator[str, None]:
        """The stream of chunks, then the counts if they are wanted, then [DONE].

        Of one request each event's id is the cursor after it; a batch has none.
        """
        async for prompt, item in events:
            if cursor is not None:
                cursor.count(item)
            for choice, text, logprobs, reason in self._take(prompt, item):
                if text or logprobs or reason:
                    yield event(
                        {**self._head, "choices": [_choice_object(choice, text, logprobs, reason)]}, cursor or ""
                    )
        if include_usage:
            yield event({**self._head, "choices": [], "usage": usage_object(self._usages)}, cursor or "")
        yield DONE

    async def whole(self, events: AsyncIterator[Tagged]) -> Object:
        """The answer in one object."""
        async for prompt, item in events:
            for choice, text, logprobs, reason in self._take(prompt, item):
                choice.text.append(text)
                choice.reason = reason or choice.reason
                choice.logprobs = _joined(choice.logprobs, logprobs)
        choices = [_choice_object(c, "".join(c.text), c.logprobs, c.reason) for c in self._choices]
        return {**self._head, "choices": choices, "usage": usage_object(self._usages)}

    def _take(
        self, prompt: int, item: Accepted | Delta | ChoiceEnd | Finish
    ) -> list[tuple[_Choice, str, Object | None, str | None]]:
        if isinstance(item, Finish):
            self._usages.append(item.usage)
            return []
        if isinstance(item, Accepted):
            return []
        choice = self._choices[prompt * self._n + item.choice]
        if isinstance(item, ChoiceEnd):
            text, logprobs = self._echo(choice, prompt)
            return [(choice, text, logprobs, item.reason)]
        if item.prompt_logprobs is not None:
            self._prompt_scores[prompt] = item.prompt_logprobs
        text, logprobs = self._echo(choice, prompt)
        new = None if item.logprobs is None else _logprobs_object(choice, list(item.logprobs))
        return [(choice, text + item.text, _joined(logprobs, new), None)]

    def _echo(self, choice: _Choice, prompt: int) -> tuple[str, Object | None]:
        """The prompt, once, before a choice's first output."""
        if choice.echo is None or choice.echoed:
            return "", None
        choice.echoed = True
        scores = self._prompt_scores.get(prompt)
        if scores is None:
            choice.offset = len(choice.echo.text)
            return choice.echo.text, None
        return choice.echo.text, _prompt_logprobs_object(choice, choice.echo, scores)


def _choice_object(choice: _Choice, text: str, logprobs: Object | None, reason: str | None) -> Object:
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs_object(choice: _Choice, entries: list[TokenLogprobs]) -> Object:
    offsets = []
    for entry in entries:
        offsets.append(choice.offset)
        choice.offset += len(entry.token.text)
    return {
        "tokens": [e.token.text for e in entries],
        "token_logprobs": [e.token.logprob for e in entries],
        "top_logprobs": [{t.text: t.logprob for t in (*e.top, e.token)} for e in entries],
        "text_offset": offsets,
    }


def _prompt_logprobs_object(choice: _Choice, echo: Echo, scores: tuple[TokenLogprobs, ...]) -> Object:
    """The prompt's entries; nothing comes before the first token, so it has none."""
    choice.offset = len(echo.tokens[0])
    rest = _logprobs_object(choice, list(scores))
    return {
        "tokens": [echo.tokens[0], *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
        "text_offset": [0, *rest["text_offset"]],
    }


def _joined(first: Object | None, second: Object | None) -> Object | None:
    if first is None or second is None:
        return first or second
    return {name: [*first[name], *second[name]] for name in first}
