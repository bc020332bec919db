"""Tokens that training adds to a model's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer


class AddedTokenError(ValueError):
    """Tokens that a vocabulary cannot be given; the message names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """Texts that become one token each, cut out of a text as they stand before anything else is."""

    plain: tuple[str, ...] = ()  # part of what a model says, as any other token
    special: tuple[str, ...] = ()  # left out of an answer's text unless it is asked for with them

    def __bool__(self) -> bool:
        return bool(self.plain or self.special)

    @property
    def all(self) -> tuple[str, ...]:
        """In the order of their ids."""
        return self.plain + self.special


NO_TOKENS = AddedTokens()


def add_tokens(tokenizer: Tokenizer, added: AddedTokens) -> range:
    """Adds them after the last id that the vocabulary has, and returns their ids.

    Raises AddedTokenError for one that is a token already, or a vocabulary whose ids have gaps.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if known := [f"{text!r} (id {vocabulary[text]})" for text in added.all if text in vocabulary]:
        raise AddedTokenError(f"tokens of the model already, leave them out: {', '.join(known[:5])}")
    first = max(vocabulary.values(), default=-1) + 1
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added.plain])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added.special])
    ids = range(first, first + len(added.all))
    if [tokenizer.token_to_id(text) for text in added.all] != list(ids):
        raise AddedTokenError(f"the vocabulary's {len(vocabulary)} ids do not reach from 0 to {first - 1} without gaps")
    return ids
