"""One choice's assembly: whatever the pieces, the same text, ids, counts and log-probabilities."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmesh_gateway.choice import ChoiceAssembler, Piece
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_kernels.text.detokenize import Detokenizer
from lmesh_kernels.text.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Finish = Literal["stop", "length"]


def byte_tokenizer() -> TextTokenizer:
    """256 bytes, a few pairs that cut characters and words apart, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("c", "d"), ("Ġ", "a"), ("Ã", "©"), ("ð", "Ł")]
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return TextTokenizer(
        tokenizer, special_tokens={"eos_token": "<eos>"}, eos_ids=[], chat_template=None, add_bos=False
    )


TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_ids[0]
TEXTS = st.text(alphabet="abcd é🎉\n", max_size=24)
IDS = st.one_of(
    TEXTS.map(lambda text: TOKENIZER.encode(text, add_special_tokens=False)),
    st.lists(st.integers(0, EOS - 1), max_size=24),  # any bytes, also such that are no UTF-8
)
CUTS = st.lists(st.integers(0, 24), max_size=8)
SPANS = st.lists(st.tuples(st.integers(0, 23), st.integers(1, 4)), max_size=3)
STRAY = st.lists(st.text(alphabet="abcd é🎉", min_size=1, max_size=4), max_size=1)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[list[int], list[int], list[str]]:
    """Ids, where to cut them, and stop strings, most of which are somewhere in their text."""
    ids = draw(IDS)
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    inside = [text[begin : begin + length] for begin, length in draw(SPANS)]
    cuts = [cut for cut in draw(CUTS) if cut < len(ids)]
    return ids, cuts, [stop for stop in [*inside, *draw(STRAY)] if stop]


@dataclass
class Whole:
    """All pieces of a choice put end to end."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    last: Piece | None = None
    counted: int = 0


def columns(ids: list[int]) -> LogprobColumns:
    return LogprobColumns(
        k=2,
        chosen=[-float(i) for i in ids],
        top_ids=[x for i in ids for x in (i, i + 1)],
        top_logprobs=[-0.5] * 2 * len(ids),
    )


def assemble(ids: list[int], cuts: list[int], stops: list[str], finish: Finish) -> Whole:
    assembler = ChoiceAssembler(TOKENIZER, stop=stops)
    whole = Whole()
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        part = ids[begin:end]
        last = index == len(edges) - 2
        piece = assembler.push(part, finish=finish if last else None, logprobs=columns(part))
        whole.text += piece.text
        whole.ids += piece.ids
        assert piece.logprobs is not None
        whole.chosen += piece.logprobs.chosen
        whole.top_ids += piece.logprobs.top_ids
        whole.last = piece
        if piece.reason is not None:
            break
    whole.counted = assembler.completion_tokens
    return whole


@given(script=scripts(), ends=st.booleans())
def test_pieces_change_nothing(script: tuple[list[int], list[int], list[str]], ends: bool) -> None:
    ids, cuts, stops = script
    ids, finish = ([*ids, EOS], "stop") if ends else (ids, "length")
    whole, once = assemble(ids, cuts, stops, finish), assemble(ids, [], stops, finish)
    assert (whole.text, whole.ids, whole.chosen, whole.counted) == (once.text, once.ids, once.chosen, once.counted)
    assert whole.last is not None and once.last is not None
    assert (whole.last.reason, whole.last.stop_string) == (once.last.reason, once.last.stop_string)


@given(script=scripts(), ends=st.booleans())
def test_against_the_plain_definition(script: tuple[list[int], list[int], list[str]], ends: bool) -> None:
    """The text is that of all ids up to the first stop string; ids count up to the one that completes it."""
    ids, cuts, stops = script
    finish: Finish = "stop" if ends else "length"
    all_ids = [*ids, EOS] if ends else ids
    whole = assemble(all_ids, cuts, stops, finish)
    full = TOKENIZER.decode(ids, skip_special_tokens=True)
    found = [(full.index(s) + len(s), full.index(s), s) for s in stops if s in full]
    assert whole.last is not None
    if not found:
        assert (whole.text, whole.ids, whole.last.reason, whole.last.stop_string) == (full, all_ids, finish, None)
        assert whole.last.stop_token_id == (EOS if ends else None)
        assert whole.counted == len(all_ids)
        return
    _, begin, stop = min(found)
    assert whole.text == full[:begin]
    assert (whole.last.reason, whole.last.stop_string, whole.last.stop_token_id) == ("stop", stop, None)
    assert whole.ids == all_ids[: whole.counted]
    before = Detokenizer(TOKENIZER, skip_special_tokens=True).push(ids[: whole.counted - 1])
    assert not any(s in before for s in stops)


@given(script=scripts())
def test_logprobs_stay_with_their_ids(script: tuple[list[int], list[int], list[str]]) -> None:
    ids, cuts, stops = script
    whole = assemble(ids, cuts, stops, "length")
    assert whole.chosen == [-float(i) for i in whole.ids]
    assert whole.top_ids == [x for i in whole.ids for x in (i, i + 1)]


def test_no_piece_holds_part_of_a_character() -> None:
    ids = TOKENIZER.encode("é🎉", add_special_tokens=False)
    assembler = ChoiceAssembler(TOKENIZER)
    pieces = [assembler.push([token]).text for token in ids]
    assert "".join(pieces) == "é🎉" and all(piece in ("", "é", "🎉") for piece in pieces)


def test_unfinished_character_shows_at_the_end() -> None:
    ids = TOKENIZER.encode("a🎉", add_special_tokens=False)[:-1]
    assert ChoiceAssembler(TOKENIZER).push(ids, finish="length").text == "a\ufffd"


def test_held_text_is_let_go_at_the_end() -> None:
    assembler = ChoiceAssembler(TOKENIZER, stop=["abcd"])
    ids = TOKENIZER.encode("xabc", add_special_tokens=False)
    assert assembler.push(ids).text == "x"
    assert assembler.push([EOS], finish="stop").text == "abc"


@pytest.mark.parametrize("keep", [False, True])
def test_stop_token_is_listed_and_counted_and_not_shown(keep: bool) -> None:
    assembler = ChoiceAssembler(TOKENIZER, keep_special_tokens=keep)
    ids = TOKENIZER.encode("ab", add_special_tokens=False)
    piece = assembler.push([*ids, EOS], finish="stop")
    assert (piece.text, list(piece.ids), piece.stop_token_id) == ("ab", [*ids, EOS], EOS)
    assert assembler.completion_tokens == len(ids) + 1


def test_special_tokens_inside_the_text() -> None:
    ids = [*TOKENIZER.encode("a", add_special_tokens=False), EOS, *TOKENIZER.encode("b", add_special_tokens=False)]
    assert ChoiceAssembler(TOKENIZER).push(ids, finish="length").text == "ab"
    assert ChoiceAssembler(TOKENIZER, keep_special_tokens=True).push(ids, finish="length").text == "a<eos>b"
