"""A `tokenizers.Tokenizer` from the vocabulary inside a GGUF file (byte-level BPE)."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_CONTROL, _USER_DEFINED = 3, 4
# How each family cuts text before merging; names are those of tokenizer.ggml.pre.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class UnsupportedTokenizerError(ValueError):
    """The file's tokenizer is of a kind that is not built here; the message names it."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How the family `name` cuts text before merging. Raises UnsupportedTokenizerError."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in ("default", "gpt-2"):
        return gpt2
    if name == "llama-bpe":
        return _split(_LLAMA3_SPLIT)
    if name == "qwen2":
        return _split(_QWEN2_SPLIT)
    raise UnsupportedTokenizerError(
        f"GGUF pre-tokenizer {name!r} is not built; built are: default, gpt-2, llama-bpe, qwen2, smollm"
    )


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` (of `read_metadata`) describes. Raises UnsupportedTokenizerError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedTokenizerError(f"GGUF tokenizer model {kind!r} is not built; built is: gpt2 (byte-level BPE)")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is itself in the vocabulary whole, whatever its merges say.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    _mark_added(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    return tokenizer


def _mark_added(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    added = {_CONTROL: [], _USER_DEFINED: []}  # type: dict[int, list[AddedToken]]
    for token, kind in zip(tokens, types, strict=False):
        if kind in added:
            added[kind].append(AddedToken(token, special=kind == _CONTROL, normalized=False))
    tokenizer.add_special_tokens(added[_CONTROL])
    tokenizer.add_tokens(added[_USER_DEFINED])
