"""Stop strings: streamed in any pieces, the matcher shows what a search of the whole text would."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lmesh_kernels.text.stops import StopMatcher

letters = st.text(alphabet="ab\u00e9", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first moment at which a stop is complete; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


@settings(deadline=None)
@given(st.lists(letters, max_size=8), stop_lists)
@example(["aa", "b"], ["aab", "ab"])
@example(["aba", "bb"], ["abb"])
def test_streamed_equals_a_search_of_the_whole(pieces: list[str], stops: list[str]) -> None:
    assert streamed(pieces, stops) == naive("".join(pieces), stops)


@settings(deadline=None)
@given(letters, stop_lists)
def test_how_the_text_is_cut_does_not_matter(text: str, stops: list[str]) -> None:
    assert streamed(list(text), stops) == streamed([text], stops)


@settings(deadline=None)
@given(st.lists(letters, max_size=8), stop_lists)
def test_only_what_may_begin_a_stop_is_held(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return
        held = seen[len(shown) :]
        assert seen == shown + held
        assert not held or any(s.startswith(held) and s != held for s in stops)


def test_a_stop_over_three_pieces() -> None:
    matcher = StopMatcher(["<end>"])
    assert [matcher.push(piece) for piece in ("one <", "en", "d> two")] == [("one ", None), ("", None), ("", "<end>")]


def test_of_overlapping_stops_the_first_complete_wins() -> None:
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", "abc")


def test_a_false_start_is_let_through() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aa") == ("", None)
    assert matcher.push("a") == ("a", None)
    assert matcher.push("c") == ("aac", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
