"""Text to token ids and back, from tokenizer.json or from a GGUF file's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lmesh_kernels.text.added_tokens import NO_TOKENS, AddedTokens, add_tokens
from lmesh_kernels.text.byte_rules import ByteRule, byte_rule, strip_start
from lmesh_kernels.text.gguf_metadata import read_metadata
from lmesh_kernels.text.gguf_tokenizer import build_tokenizer
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


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
        self.byte_rule: ByteRule | None = byte_rule(json.loads(tokenizer.to_str())["decoder"])
        # Added tokens are cut out of the text as it stands, so they stand for their own text.
        self._bytes: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}

    def _id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._tokenizer.token_to_id(content)

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

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` as they stand, none added, and of each the characters [begin, end) of `text` that it covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        if self.byte_rule is None:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        return strip_start(data.decode("utf-8", "replace"), self.byte_rule.strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; none for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if self.byte_rule is None else self.byte_rule.token_bytes(token)

    def token_text(self, token_id: int) -> str:
        """One id's text by itself; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def load_tokenizer(files: ModelFiles, added: AddedTokens = NO_TOKENS) -> TextTokenizer:
    """The tokenizer of a model's files, with what is added to its vocabulary.

    Raises ModelNotFoundError where there is none, UnsupportedTokenizerError for a GGUF kind that is not built, and
    AddedTokenError.
    """
    tokenizer = raw_tokenizer(files, added)
    return _from_gguf(files.path, tokenizer) if files.format == "gguf" else _from_folder(files.path, tokenizer)


def raw_tokenizer(files: ModelFiles, added: AddedTokens = NO_TOKENS) -> Tokenizer:
    """The library's tokenizer alone, which `save` writes as a tokenizer.json. Raises as `load_tokenizer` does."""
    tokenizer = build_tokenizer(read_metadata(files.path)) if files.format == "gguf" else _read_folder(files.path)
    if added:
        add_tokens(tokenizer, added)
    return tokenizer


def _read_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} has no tokenizer.json; save the tokenizer as a fast one")
    return Tokenizer.from_file(str(path))


def _from_gguf(path: Path, tokenizer: Tokenizer) -> TextTokenizer:
    metadata = read_metadata(path)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_KEYS.items()}
    return TextTokenizer(
        tokenizer,
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
        eos_ids=[i for key in ("eot", "eom") if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None],
        chat_template=metadata.get("tokenizer.chat_template"),
        # A Llama 3 file that does not say so has a BOS all the same.
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe")),
    )


_GGUF_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _from_folder(folder: Path, tokenizer: Tokenizer) -> TextTokenizer:
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    return TextTokenizer(
        tokenizer,
        special_tokens={name: _content(config[name]) for name in _NAMED if config.get(name)},
        eos_ids=_eos_ids(folder),
        chat_template=_chat_template(folder, config),
        add_bos=bool(config.get("add_bos_token", False)),
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the tokenizer config's (of several named ones the default)."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
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
