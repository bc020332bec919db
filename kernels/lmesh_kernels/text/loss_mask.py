"""Token ids to train on, and which of them are to be learnt: what the assistant wrote, and its end of turn.

A chat's mask comes from rendering it turn by turn, with the template that serves: what a turn adds after the prompt
that would have asked for it is what the model is to say. Templates need no generation tags for it. The text is
tokenized once, whole, so that the ids are those of a conversation that has come this far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmesh_kernels.text.template import Messages, render
from lmesh_kernels.text.tokenizer import TextTokenizer

Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedIds:
    """Ids, and of each whether predicting it is to be learnt."""

    ids: list[int]
    trained: list[bool]
    skipped_turns: int = 0  # assistant turns that the template shows differently once the conversation has gone on

    @property
    def trained_tokens(self) -> int:
        """How many are to be learnt; the first token cannot be: nothing predicts it."""
        return sum(self.trained[1:])


def mask_chat(tokenizer: TextTokenizer, messages: Messages, show: Render) -> MaskedIds:
    """A conversation's ids; learnt are its assistant turns up to their end-of-turn token.

    A message with `"train": false` is not learnt. A turn that a later turn changes (templates that drop earlier
    reasoning) is left out and counted: what the model saw and what it said cannot both be shown in one text.
    """
    shown = [{k: v for k, v in message.items() if k != "train"} for message in messages]
    final = show(shown, False)
    spans, skipped = [], 0
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or not message.get("train", True):
            continue
        span = _span(shown, index, final, show)
        if span is None:
            skipped += 1
        else:
            spans.append(span)
    ids, offsets = tokenizer.encode_with_offsets(final)
    trained = [False] * len(ids)
    for begin, end in spans:
        _mark(trained, ids, offsets, begin, end, frozenset(tokenizer.eos_ids))
    return MaskedIds(ids=ids, trained=trained, skipped_turns=skipped)


def _span(messages: Messages, index: int, final: str, show: Render) -> tuple[int, int] | None:
    """Characters of `final` that the turn at `index` wrote, or None where the template does not show it so."""
    prompt, after = show(messages[:index], True), show(messages[: index + 1], False)
    if not final.startswith(after):
        return None
    begin = len(prompt)
    if not after.startswith(prompt):
        # The prompt for a new turn says more than a finished turn shows (an empty thought, say): what both begin with
        # is the prompt. It must hold all that came before, or words of others would be learnt.
        begin = _common_length(prompt, after)
        if begin < len(show(messages[:index], False)):
            return None
    return begin, len(after)


def _common_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _mark(
    trained: list[bool],
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    begin: int,
    end: int,
    ends: frozenset[int],
) -> None:
    """Marks the tokens inside [begin, end), to the last end-of-turn token among them if there is one."""
    inside = [i for i, (first, last) in enumerate(offsets) if begin <= first < last <= end]
    stops = [i for i in inside if ids[i] in ends]
    for i in inside:
        trained[i] = not stops or i <= stops[-1]


def mask_completion(tokenizer: TextTokenizer, prompt: str, completion: str) -> MaskedIds:
    """A prompt as it is served, and after it what is to be learnt: the completion and the end of the sequence."""
    before = tokenizer.encode(prompt, add_special_tokens=True)
    learnt = _ended(tokenizer, tokenizer.encode(completion, add_special_tokens=False))
    return MaskedIds(ids=before + learnt, trained=[False] * len(before) + [True] * len(learnt))


def mask_text(tokenizer: TextTokenizer, text: str) -> MaskedIds:
    """Plain text, learnt whole, with the end of the sequence; a BOS that the model has is shown, not learnt."""
    ids = _ended(tokenizer, tokenizer.encode(text, add_special_tokens=True))
    return MaskedIds(ids=ids, trained=[i > 0 or ids[0] != tokenizer.bos_id for i in range(len(ids))])


def _ended(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    if not tokenizer.eos_ids or (ids and ids[-1] in tokenizer.eos_ids):
        return ids
    return [*ids, tokenizer.eos_ids[0]]


def renderer(tokenizer: TextTokenizer, tools: list[dict[str, Any]] | None = None) -> Render:
    """Renders with the tokenizer's own chat template in this process. ValueError where it has none."""
    template = tokenizer.chat_template
    if template is None:
        raise ValueError("the model has no chat template")

    def run(messages: Messages, add_generation_prompt: bool) -> str:
        return render(
            template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=tokenizer.special_tokens,
            tools=tools,
        )

    return run
