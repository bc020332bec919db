"""Incremental detokenization: text as soon as it is whole characters, never part of one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lmesh_kernels.text.byte_rules import ByteRule, strip_start
from lmesh_kernels.text.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of ids into a growing text; all pushes and the flush make the text of all ids.

    `prompt_ids` are ids before the first one pushed. They matter where a token's text hangs on its place
    (SentencePiece drops the space of a text's first word); byte-level tokenizers do not need them.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> None:
        rule = tokenizer.byte_rule
        self._impl: _ByteWise | _Windowed = (
            _Windowed(tokenizer, skip_special_tokens, prompt_ids)
            if rule is None
            else _ByteWise(tokenizer, rule, skip_special_tokens, prompt_ids)
        )

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character are kept back."""
        return self._impl.push(ids)

    def flush(self) -> str:
        """What was kept back: an unfinished character shows as U+FFFD."""
        return self._impl.flush()


class _ByteWise:
    """An id is a fixed run of bytes, so a streaming UTF-8 decoder does it, O(1) an id."""

    def __init__(self, tokenizer: TextTokenizer, rule: ByteRule, skip: bool, prompt_ids: Sequence[int]) -> None:
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Only the very beginning of a text is stripped: after a prompt that shows any token nothing is.
        self._strip = 0 if any(i not in self._skipped for i in prompt_ids) else rule.strip

    def push(self, ids: Sequence[int]) -> str:
        return self._stripped(self._decoder.decode(b"".join(self._bytes(i) for i in ids if i not in self._skipped)))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not self._strip or not text:
            return text
        rest = strip_start(text, self._strip)
        self._strip = 0 if rest else self._strip - len(text)
        return rest


class _Windowed:
    """Decodes a short window with and without the new id; what differs is the new text.

    For decoders that look at a token's neighbours (Metaspace, WordPiece), which have no tokens of single bytes.
    """

    CONTEXT = 6  # ids before the window that a decoder may look at
    LONGEST = 16  # ids that one unfinished character may take; more means that the bytes are no UTF-8

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
