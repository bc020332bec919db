"""The real model's tokenizer, from its GGUF file, against transformers' reading of the same file."""

from __future__ import annotations

import copy
import inspect
import random
import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_kernels.text.detokenize import Detokenizer
from lmesh_kernels.text.gguf_tokenizer import pre_tokenizer
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.template import render
from lmesh_kernels.text.tokenizer import TextTokenizer, load_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

SOURCE = "packaged:smollm2-135m-instruct"

WRITTEN = (
    "",
    " ",
    "\n",
    "Hello, world!",
    "  leading and trailing  ",
    "a\tb\t\tc\r\nd\r\r\n\n\n\ne",
    " " * 17 + "x" + " " * 64,
    "\u00a0\u2003\u3000\u200b\ufeff",
    "don't I'll WE'VE o'clock they'd 'tis 's",
    "3.14159 1,000,000 0x7fff 1e-9 2024-02-29T12:34:56Z 00000 \u0663\u0664 \u00b2\u2167\u00bd",
    "def f(x: int) -> int:\n    return x**2  # square\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 3); return 0; }',
    '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9"}}',
    "<html><body class='a'>&nbsp;&#8364;</body></html>",
    "SELECT * FROM t WHERE a >= 1 AND b != 'x';--",
    "Stra\u00dfe na\u00efve fa\u00e7ade \u0141\u00f3d\u017a \u01c5 \ufb01ligature",
    "e\u0301 vs \u00e9, A\u030a vs \u00c5 vs \u212b",
    "Ελληνικά Русский עברית العربية",
    "你好，世界！こんにちは 한국어 สวัสดี हिन्दी",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1eb\U0001f1f7\u2764\ufe0f",
    "\u2200x\u2208\u211d: \u2308x\u2309 = \u2212\u230a\u2212x\u230b \u2211\u222b\u221a",
    "\ufffd\u0000\u0001\u007f\u0085",
    "\U00010348\U000e0041\U0010ffff",
    "http://user:pw@example.org:8080/a/b?c=d&e=%20f#g",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_start|><|im_end|>",
    "a<|im_end|>b <|im_end|> c",
    "<|im_start|",
    "<repo_name>x<file_sep>y<jupyter_start>",
    "!!!???...---___***///\\\\\\((([[[{{{",
    "x" * 500,
    "ab" * 200 + " " + "9" * 100,
)
ALPHABETS = (
    "abcdefghij \n",
    " \t\n\r\u00a0",
    "0123456789.,-",
    "(){}[];:=+*/<>|&!'\"\\_#",
    "\u00e9\u00df\u0142\u00f8 ae",
    "\u4e2d\u6587\u65e5\u672c \u3002",
    "\U0001f600\u200d\u2764\ufe0f\U0001f3fd a",
)


def strings() -> list[str]:
    """About 200 strings: those written out, and mixtures of a fixed seed."""
    chance = random.Random(0)
    mixed = ["".join(chance.choices(a, k=chance.randint(1, 60))) for a in ALPHABETS for _ in range(14)]
    pieces = [*WRITTEN, *mixed]
    joined = ["".join(chance.sample(pieces, 3)) for _ in range(70)]
    return [*pieces, *joined]


@cache
def ours() -> TextTokenizer:
    return load_tokenizer(resolve(SOURCE))


@cache
def peer() -> Any:
    path = resolve(SOURCE).path
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@cache
def peer_by_family() -> Any:
    """The peer with the family's own cut: transformers reads no `tokenizer.ggml.pre`, so its digits stay together."""
    tokenizer = copy.deepcopy(peer())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated", invert=False)
    cut = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    return tokenizer


def test_ids_are_those_of_transformers() -> None:
    # Its different cut shows only at numerals that are no ASCII digits: the vocabulary joins nothing with a digit.
    texts = [t for t in strings() if not re.search(r"[^\D0-9]|[\u00b2\u2167\u00bd]", t)]
    assert len(texts) >= 190
    for text in texts:
        expected = peer()(text, add_special_tokens=False)["input_ids"]
        assert ours().encode(text, add_special_tokens=False) == expected, repr(text)


def test_ids_are_those_of_transformers_with_the_familys_cut() -> None:
    assert len(strings()) >= 200
    for text in strings():
        expected = peer_by_family()(text, add_special_tokens=False)["input_ids"]
        assert ours().encode(text, add_special_tokens=False) == expected, repr(text)


def test_texts_are_those_of_transformers() -> None:
    for text in strings():
        ids = ours().encode(text, add_special_tokens=False)
        assert ours().decode(ids, skip_special_tokens=False) == text
        for skip in (False, True):
            expected = peer().decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours().decode(ids, skip_special_tokens=skip) == expected, repr(text)


def test_special_tokens_are_those_of_transformers() -> None:
    assert ours().vocab_size == len(peer())
    assert (ours().bos_id, ours().eos_ids[0]) == (peer().bos_token_id, peer().eos_token_id)
    assert ours().special_tokens["bos_token"] == peer().bos_token
    assert ours().chat_template == peer().chat_template


def test_a_chat_becomes_the_same_ids() -> None:
    messages = [
        {"role": "user", "content": "What is 2+2? \u00e9\U0001f600"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?"},
    ]
    template = ours().chat_template
    assert template
    options = {"add_generation_prompt": True, "special_tokens": ours().special_tokens}
    text = render(template, messages=messages, **options)
    expected = peer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == expected
    # This template begins with the model's BOS token: whoever encodes it, there is one.
    for add_special_tokens in (False, True):
        ids = ours().encode(text, add_special_tokens=add_special_tokens)
        assert ids[0] == ours().bos_id and ids[1] != ours().bos_id
        assert ids == peer()(expected, add_special_tokens=False)["input_ids"]


@given(
    ids=st.lists(st.integers(0, 49151), max_size=60), cuts=st.lists(st.integers(0, 60), max_size=5), skip=st.booleans()
)
@settings(deadline=None)
def test_streamed_ids_make_the_full_text(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(ours(), skip_special_tokens=skip)
    borders = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(borders)]
    text = "".join(pieces) + detokenizer.flush()
    assert text == ours().decode(ids, skip_special_tokens=skip)
    assert text == peer().decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


# The vocabulary has no token for these control characters and none for the bytes that begin planes 4 to 11;
# every tokenizer drops them.
in_vocabulary = st.characters(
    exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
)


@given(text=st.text(in_vocabulary, max_size=60))
@settings(deadline=None)
def test_any_text_streams_back_without_a_broken_character(text: str) -> None:
    ids = ours().encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(ours(), skip_special_tokens=False)
    pieces = [detokenizer.push((i,)) for i in ids]
    assert "".join(pieces) == text and detokenizer.flush() == ""
    assert ids == peer_by_family()(text, add_special_tokens=False)["input_ids"]


def their_cut(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "qwen2":
        return Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    pattern = Regex(inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default)  # Llama 3's
    cut = pre_tokenizers.Split(pattern, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_other_families_cut_text_as_in_transformers(name: str) -> None:
    mine, theirs = pre_tokenizer(name), their_cut(name)
    for text in strings():
        assert mine.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)
