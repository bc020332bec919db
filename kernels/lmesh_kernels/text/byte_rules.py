"""How a tokenizer's decoder turns single tokens into bytes, for the two kinds of decoder that work byte by byte.

Where a token's bytes do not depend on its neighbours, a text can be streamed exactly: the bytes of all tokens, read as
UTF-8, less the spaces that some decoders strip from the very beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level BPE (GPT-2's table): 188 stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in own}
    rest = [b for b in range(256) if b not in set(own)]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class ByteLevelRule:
    """Each character of a token stands for one byte (GPT-2, Llama 3, Qwen, SmolLM)."""

    strip: int = 0  # leading spaces that are taken off the whole text

    def token_bytes(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary; one with foreign characters stands for its own text."""
        try:
            return bytes([BYTE_OF[character] for character in token])
        except KeyError:
            return token.encode()


@dataclass(frozen=True, slots=True)
class ByteFallbackRule:
    """Tokens are text with a sign for the space; `<0x..>` tokens are single bytes (Llama 2, Gemma, Phi 3)."""

    replacements: tuple[tuple[str, str], ...]
    strip: int  # leading spaces that are taken off the whole text

    def token_bytes(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary."""
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        for sign, text in self.replacements:
            token = token.replace(sign, text)
        return token.encode()


ByteRule = ByteLevelRule | ByteFallbackRule


def byte_rule(decoder: dict[str, Any] | None) -> ByteRule | None:
    """The rule of a decoder as tokenizer.json writes it; None where tokens hang on their neighbours."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return ByteLevelRule()
    return _fallback_rule(steps) if "ByteFallback" in kinds else None


def _fallback_rule(steps: list[dict[str, Any]]) -> ByteFallbackRule | None:
    shape = " ".join(step["type"] for step in steps)
    if not re.fullmatch(r"(Replace )*ByteFallback( Fuse( Strip)?)?", shape):
        return None
    signs = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    plain = all("String" in step["pattern"] for step in signs)
    if not plain or any(step["content"] != " " or step["stop"] for step in strips):
        return None
    return ByteFallbackRule(
        tuple((step["pattern"]["String"], step["content"]) for step in signs), sum(step["start"] for step in strips)
    )


def strip_start(text: str, count: int) -> str:
    """`text` less at most `count` leading spaces."""
    spaces = len(text) - len(text.lstrip(" "))
    return text[min(spaces, count) :]
