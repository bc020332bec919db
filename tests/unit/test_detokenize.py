"""The incremental detokenizer: whatever the ids and however they are cut, the pieces make the full text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lmesh_kernels.text.byte_rules import ByteFallbackRule, ByteLevelRule
from lmesh_kernels.text.detokenize import Detokenizer
from lmesh_kernels.text.tokenizer import TextTokenizer

from tests.small_tokenizers import byte_fallback, byte_level, metaspace, wrap

BYTE_LEVEL, FALLBACK, FALLBACK_UNSTRIPPED = wrap(byte_level()), wrap(byte_fallback()), wrap(byte_fallback(strip=False))
BYTEWISE = {"byte-level": BYTE_LEVEL, "byte-fallback": FALLBACK, "byte-fallback-unstripped": FALLBACK_UNSTRIPPED}
METASPACE = wrap(metaspace())
KINDS = BYTEWISE | {"metaspace": METASPACE}

# Taken modulo the vocabulary: half of them are of its end, where the words are.
numbers = st.lists(st.integers(-12, -1) | st.integers(0, 10**6), max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=6)
texts = st.text(alphabet="ab \u00e9\u20ac\U0001f600\U0001f468\u200d\n", max_size=30)


def streamed(tokenizer: TextTokenizer, ids: Sequence[int], cut_at: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    borders = [0, *sorted(min(c, len(ids)) for c in cut_at), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(borders)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(raw=numbers, cut_at=cuts, skip=st.booleans())
def test_pieces_make_the_full_text_of_any_ids(kind: str, raw: list[int], cut_at: list[int], skip: bool) -> None:
    tokenizer = KINDS[kind]
    ids = [i % (tokenizer.vocab_size + 2) for i in raw]  # two past the end: ids that no token has
    full = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, cut_at, skip=skip)) == full
    assert "".join(streamed(tokenizer, ids, list(range(len(ids))), skip=skip)) == full


@pytest.mark.parametrize("kind", BYTEWISE)
@settings(deadline=None)
@given(text=texts)
@example(text="\U0001f600\U0001f600\U0001f600\U0001f600")
@example(text="  a")
def test_no_piece_shows_part_of_a_character(kind: str, text: str) -> None:
    tokenizer = BYTEWISE[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids, list(range(len(ids))), skip=False)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(pieces).lstrip(" ") == text.lstrip(" ")


@settings(deadline=None)
@given(text=texts)
def test_byte_level_text_comes_back_exactly(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert "".join(streamed(BYTE_LEVEL, ids, [], skip=False)) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(prompt=numbers.filter(bool), raw=numbers)
def test_a_continuation_adds_to_its_prompts_text(kind: str, prompt: list[int], raw: list[int]) -> None:
    tokenizer = KINDS[kind]
    whole = [i % tokenizer.vocab_size for i in [*prompt, *raw]]
    before = tokenizer.decode(whole[: len(prompt)], skip_special_tokens=True)
    if "\ufffd" in before:
        return  # a prompt that ends within a character has no text of its own to add to
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, prompt_ids=whole[: len(prompt)])
    added = detokenizer.push(whole[len(prompt) :]) + detokenizer.flush()
    assert before + added == tokenizer.decode(whole, skip_special_tokens=True)


def test_half_a_character_waits_and_shows_only_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) == 3  # two of its four bytes are one token
    detokenizer = Detokenizer(BYTE_LEVEL, skip_special_tokens=True)
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_skipped_token_does_not_break_a_character() -> None:
    head, middle, tail = BYTE_LEVEL.encode("\U0001f600", add_special_tokens=False)
    special = min(BYTE_LEVEL.special_ids)
    assert "".join(streamed(BYTE_LEVEL, [head, special, middle, tail], [1, 2], skip=True)) == "\U0001f600"


def test_only_the_first_space_of_a_text_is_stripped() -> None:
    ids = FALLBACK.encode("a a", add_special_tokens=False)
    assert streamed(FALLBACK, ids, [1], skip=True) == ["a", " a", ""]
    after_prompt = Detokenizer(FALLBACK, skip_special_tokens=True, prompt_ids=ids)
    assert after_prompt.push(ids) == " a a"
    after_bos = Detokenizer(FALLBACK, skip_special_tokens=True, prompt_ids=[FALLBACK.bos_id or 0])
    assert after_bos.push(ids) == "a a"


def test_decoders_are_recognised() -> None:
    assert isinstance(BYTE_LEVEL.byte_rule, ByteLevelRule)
    assert isinstance(FALLBACK.byte_rule, ByteFallbackRule) and FALLBACK.byte_rule.strip == 1
    assert isinstance(FALLBACK_UNSTRIPPED.byte_rule, ByteFallbackRule) and FALLBACK_UNSTRIPPED.byte_rule.strip == 0
    assert METASPACE.byte_rule is None
