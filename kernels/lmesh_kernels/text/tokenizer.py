"""Text to token ids and back, from tokenizer.json or from a GGUF file's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from lmesh_kernels.text.gguf_metadata import read_metadata
from lmesh_kernels.text.gguf_tokenizer import build_tokenizer
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level BPE (GPT-2's table): 188 stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in own}
    rest = [b for b in range(256) if b not in set(own)]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
assert set(_BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())


class TextTokenizer:
    """One model's tokenizer. Safe to use from several threads; encoding releases the GIL."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: dict[str, str],
        eos_ids: Sequence[int],
        chat_template: str | None,
        add_bos: bool,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([eos] if eos is not None else []), *eos_ids]))
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}

    def _id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._tokenizer.token_to_id(content)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether an id's bytes do not depend on its neighbours."""
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`; special tokens written out in it are recognised.

        With `add_special_tokens` the model's own are added (one BOS, where it has one): never a second BOS.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens or self.bos_id is None:
            return ids
        if self._add_bos and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids[1:] if ids[:2] == [self.bos_id, self.bos_id] else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One id's text by itself; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def load_tokenizer(files: ModelFiles) -> TextTokenizer:
    """The tokenizer of a model's files.

    Raises ModelNotFoundError where there is none, UnsupportedTokenizerError for a GGUF kind that is not built.
    """
    return _from_gguf(files.path) if files.format == "gguf" else _from_folder(files.path)


def _from_gguf(path: Path) -> TextTokenizer:
    metadata = read_metadata(path)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_KEYS.items()}
    return TextTokenizer(
        build_tokenizer(metadata),
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
        eos_ids=[i for i in (metadata.get("tokenizer.ggml.eot_token_id"),) if i is not None],
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    )


_GGUF_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _from_folder(folder: Path) -> TextTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} has no tokenizer.json; save the tokenizer as a fast one")
    config = _json(folder / "tokenizer_config.json")
    return TextTokenizer(
        Tokenizer.from_file(str(path)),
        special_tokens={name: _content(config[name]) for name in _NAMED if config.get(name)},
        eos_ids=_eos_ids(folder),
        chat_template=_chat_template(folder, config),
        add_bos=bool(config.get("add_bos_token", False)),
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the tokenizer config's (of several named ones the default)."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: str(entry["template"]) for entry in template}
        return named.get("default")
    return template


def _eos_ids(folder: Path) -> list[int]:
    """End-of-sequence ids that the model's configs add to the tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        found += value if isinstance(value, list) else [value] if value is not None else []
    return list(dict.fromkeys(found))
