"""Small tokenizers of each kind of decoder, built in memory, wrapped as the services use them."""

from __future__ import annotations

from lmesh_kernels.text.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"  # SentencePiece's sign for a space


def wrap(tokenizer: Tokenizer, **options: object) -> TextTokenizer:
    defaults = {
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "eos_ids": (),
        "chat_template": None,
        "add_bos": False,
    }
    return TextTokenizer(tokenizer, **(defaults | options))  # type: ignore[arg-type]


def byte_level() -> Tokenizer:
    """256 bytes, a few merges across characters, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u00f0", "\u0141"), ("\u0120", "a"), ("a", "b")]  # the first joins two bytes of an emoji's four
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<\uff5cuser\u2581x\uff5c>"])
    tokenizer.add_tokens([AddedToken("\u00e9t\u00e9", normalized=False)])
    return tokenizer


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """Llama 2's kind: text tokens with a sign for the space, single bytes for everything else."""
    words = [SPACE, "a", "b", f"{SPACE}a", "ab", "\u00e9"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    merges = [(SPACE, "a"), ("a", "b")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """A decoder that looks at a token's place: not byte by byte."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", f"{SPACE}a", f"{SPACE}b", SPACE, "\u00e9"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def with_bos_processor(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, its own post-processor adding a BOS."""
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer
