"""What every request must give, whatever happens to the mesh: ids are a pure function of (seed, choice, position)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

from lmesh_kernels.text.tokenizer import TextTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MODEL = "m"
VOCAB = 258
EOS = 257
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_tokenizer() -> TextTokenizer:
    """A byte-level tokenizer in which each letter is one id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(tokenizer, special_tokens={}, eos_ids=(EOS,), chat_template=None, add_bos=False)


TOKENIZER = letter_tokenizer()
LETTER_IDS = tuple(TOKENIZER.encode(LETTERS, add_special_tokens=False))
_LETTER_OF = dict(zip(LETTER_IDS, LETTERS, strict=True))


def token(seed: int, choice: int, position: int) -> int:
    """The id at an absolute position."""
    return LETTER_IDS[zlib.crc32(b"%d:%d:%d" % (seed, choice, position)) % len(LETTER_IDS)]


def text_of(ids: list[int]) -> str:
    """The letters of ids."""
    return "".join(_LETTER_OF[i] for i in ids)


@dataclass(frozen=True, slots=True)
class Whole:
    """One choice's complete output; `reason` is "stop" or "length"."""

    ids: list[int]
    text: str
    reason: str
    stop_string: str = ""
    stop_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One request as its client sends it; `deadline_s` None is a generous one."""

    request_id: str
    prompt: tuple[int, ...]
    seed: int
    n: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    deadline_s: float | None = None

    @cached_property
    def whole(self) -> list[Whole]:
        """What its choices must be."""
        return [self._choice(choice) for choice in range(self.n)]

    def _choice(self, choice: int) -> Whole:
        ids: list[int] = []
        for position in range(len(self.prompt), len(self.prompt) + self.max_tokens):
            ids.append(token(self.seed, choice, position))
            if ids[-1] in self.stop_ids:
                return Whole(ids, text_of(ids[:-1]), "stop", stop_token_id=ids[-1])
            text = text_of(ids)
            for stop in self.stop:
                if text.endswith(stop):
                    return Whole(ids, text[: -len(stop)], "stop", stop_string=stop)
        return Whole(ids, text_of(ids), "length")
