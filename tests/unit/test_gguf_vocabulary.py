"""GGUF metadata as the gguf package writes it, damaged files, and tokenizers of every kind that is built."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmesh_kernels.text.gguf_metadata import GgufError, read_metadata
from lmesh_kernels.text.gguf_tokenizer import UnsupportedTokenizerError, build_tokenizer
from lmesh_kernels.text.resolve import ModelFiles
from lmesh_kernels.text.tokenizer import load_tokenizer
from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, "ab", "abc", "<s>", "</s>", "<eot>", "[tool]", "the"]
TYPES = [1] * 258 + [3, 3, 3, 4, 1]
BOS, EOS, EOT, TOOL = 258, 259, 260, 261


def write(path: Path, *, pre: str = "gpt-2", model: str = "gpt2", **extra: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(EOT)
    writer.add_chat_template("{{ bos_token }}")
    if "add_bos" in extra:
        writer.add_add_bos_token(extra["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def loaded(path: Path) -> Any:
    return load_tokenizer(ModelFiles(source="", path=path, format="gguf"))


def test_every_type_of_value_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, tuple[str, Any]] = {
        "u8": ("add_uint8", 200),
        "i8": ("add_int8", -3),
        "u16": ("add_uint16", 60000),
        "i16": ("add_int16", -300),
        "u32": ("add_uint32", 2**32 - 1),
        "i32": ("add_int32", -(2**31)),
        "u64": ("add_uint64", 2**64 - 1),
        "i64": ("add_int64", -(2**63)),
        "f32": ("add_float32", 0.5),
        "f64": ("add_float64", 0.1),
        "yes": ("add_bool", True),
        "text": ("add_string", "h\u00e9 \U0001f600"),
        "texts": ("add_array", ["", "a", "\u20ac"]),
        "numbers": ("add_array", [-1, 2, 3]),
        "halves": ("add_array", [0.5, 1.5]),
        "nested": ("add_array", [[1, 2], [3]]),
    }
    for key, (method, value) in values.items():
        getattr(writer, method)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_metadata(path) == {"general.architecture": "llama", **{k: v for k, (_, v) in values.items()}}


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 40))])
    with pytest.raises(GgufError):
        read_metadata(cut)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4" * 10, b"GGUF\1\0\0\0" + b"\0" * 16, b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\xff" * 20],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError):
        read_metadata(path)


def test_ids_are_the_files_and_ends_are_all_found(tmp_path: Path) -> None:
    tokenizer = loaded(write(tmp_path / "a.gguf"))
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode("abc<s>[tool]", add_special_tokens=False) == [257, BOS, TOOL]
    assert tokenizer.bos_id == BOS and tokenizer.eos_ids == (EOS, EOT)
    assert tokenizer.special_ids == {BOS, EOS, EOT}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "{{ bos_token }}"


@pytest.mark.parametrize(
    ("pre", "said", "bos"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
    ],
)
def test_whether_a_bos_is_added(tmp_path: Path, pre: str, said: bool | None, bos: bool) -> None:
    extra = {} if said is None else {"add_bos": said}
    tokenizer = loaded(write(tmp_path / "a.gguf", pre=pre, **extra))
    assert tokenizer.encode("a", add_special_tokens=True)[:-1] == ([BOS] if bos else [])
    assert tokenizer.encode("<s>a", add_special_tokens=True).count(BOS) == 1


def test_only_llama3_takes_whole_words_past_the_merges(tmp_path: Path) -> None:
    # "the" is in the vocabulary and no merge makes it.
    counts = {
        pre: len(loaded(write(tmp_path / f"{pre}.gguf", pre=pre)).encode("the", add_special_tokens=False))
        for pre in ("llama-bpe", "qwen2", "gpt-2", "smollm")
    }
    assert counts == {"llama-bpe": 1, "qwen2": 3, "gpt-2": 3, "smollm": 3}


@pytest.mark.parametrize(("model", "pre", "named"), [("llama", "default", "'llama'"), ("gpt2", "odd-bpe", "'odd-bpe'")])
def test_other_kinds_are_refused_by_name(tmp_path: Path, model: str, pre: str, named: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=named):
        build_tokenizer(read_metadata(write(tmp_path / "a.gguf", model=model, pre=pre)))


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2", "smollm"])
@given(text=st.text(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_any_text_comes_back(tmp_path: Path, pre: str, text: str) -> None:
    path = tmp_path / "a.gguf"
    tokenizer = loaded(path if path.is_file() else write(path, pre=pre))
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
