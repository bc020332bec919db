"""Incremental detokenization: text as soon as it is whole characters, never part of one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lmesh_kernels.text.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of ids into a growing text; all pushes and the flush make the text of all ids.

    `prompt_ids` are ids before the first one pushed. They matter where a token's text hangs on its neighbours
    (SentencePiece drops the space of a first word); byte-level tokenizers do not need them.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> None:
        kind = _ByteWise if tokenizer.is_byte_level else _Windowed
        self._impl: _ByteWise | _Windowed = kind(tokenizer, skip_special_tokens, prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character are kept back."""
        return self._impl.push(ids)

    def flush(self) -> str:
        """What was kept back: an unfinished character shows as U+FFFD."""
        return self._impl.flush()


class _ByteWise:
    """An id is a fixed run of bytes, so a streaming UTF-8 decoder does it, O(1) an id."""

    def __init__(self, tokenizer: TextTokenizer, skip: bool, prompt_ids: Sequence[int]) -> None:
        del prompt_ids  # bytes do not depend on what stands before
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._bytes(i) for i in ids if i not in self._skipped))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """Decodes a short window twice, with and without the new id; what differs is the new text."""

    CONTEXT = 6  # ids before the window that a decoder may look at
    LONGEST = 16  # ids of one unfinished character (byte fallback needs 4); more means the bytes are no UTF-8

    def __init__(self, tokenizer: TextTokenizer, skip: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        self._window = list(prompt_ids[-self.CONTEXT :])
        self._read = len(self._window)  # ids of the window whose text has been returned
        self._shown = self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._push(i) for i in ids)

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._read < self.LONGEST:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._window = self._window[-self.CONTEXT :]
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def flush(self) -> str:
        return self._advance(self._decode(self._window))
