"""TextTokenizer: one BOS at most, ends of sequence from every config, bytes of single ids, many threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError
from lmesh_kernels.text.template import render
from lmesh_kernels.text.tokenizer import TextTokenizer, load_tokenizer

from tests.small_tokenizers import byte_fallback, byte_level, metaspace, with_bos_processor, wrap

# The three ways in which a tokenizer comes by its BOS.
BOS_WAYS: dict[str, TextTokenizer] = {
    "processor": wrap(with_bos_processor(byte_level())),
    "setting": wrap(byte_level(), add_bos=True),
    "both": wrap(with_bos_processor(byte_level()), add_bos=True),
}
NO_BOS = wrap(byte_level())


def folder(path: Path, **texts: Any) -> ModelFiles:
    """A model folder of a byte-level tokenizer; `texts` are further JSON files by stem."""
    byte_level().save(str(path / "tokenizer.json"))
    for stem, content in texts.items():
        (path / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return ModelFiles(source=str(path), path=path, format="hf")


@pytest.mark.parametrize("way", BOS_WAYS)
@settings(deadline=None)
@given(text=st.text(alphabet="ab<s>/", max_size=12))
def test_special_tokens_put_exactly_one_bos_in_front(way: str, text: str) -> None:
    tokenizer = BOS_WAYS[way]
    bos = tokenizer.bos_id
    assert bos is not None
    written = tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == (written if written[:1] == [bos] else [bos, *written])


@pytest.mark.parametrize("way", BOS_WAYS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_template_that_writes_the_bos_does_not_double_it(way: str, add_special_tokens: bool) -> None:
    tokenizer = BOS_WAYS[way]
    text = render(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        messages=[{"role": "user", "content": "ab"}],
        add_generation_prompt=True,
        special_tokens=tokenizer.special_tokens,
    )
    assert text.startswith("<s>")
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


def test_a_tokenizer_without_bos_adds_none() -> None:
    assert NO_BOS.encode("ab", add_special_tokens=True) == NO_BOS.encode("ab", add_special_tokens=False)


def test_written_special_tokens_become_their_ids() -> None:
    ids = NO_BOS.encode("a<s>b</s>", add_special_tokens=False)
    assert ids[1] == NO_BOS.bos_id and ids[3] == NO_BOS.eos_ids[0]
    assert {ids[1], ids[3]} < NO_BOS.special_ids
    assert NO_BOS.decode(ids, skip_special_tokens=True) == "ab"
    assert NO_BOS.decode(ids, skip_special_tokens=False) == "a<s>b</s>"


@settings(deadline=None)
@given(st.text(max_size=30))
def test_bytes_of_ids_join_to_the_text(text: str) -> None:
    ids = NO_BOS.encode(text, add_special_tokens=False)
    assert b"".join(NO_BOS.token_bytes(i) for i in ids) == text.encode()


def test_added_tokens_stand_for_their_own_text() -> None:
    # Every character of this one is also some byte's stand-in, which it must not be taken for.
    ids = NO_BOS.encode("\u00e9t\u00e9", add_special_tokens=False)
    assert len(ids) == 1 and NO_BOS.decode(ids, skip_special_tokens=False) == "\u00e9t\u00e9"


def test_byte_tokens_and_space_signs() -> None:
    tokenizer = wrap(byte_fallback())
    ids = tokenizer.encode("a \u20ac", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " a \u20ac".encode()
    assert tokenizer.token_text(ids[-1]) == "\ufffd" and tokenizer.token_text(ids[0]) == " a"


def test_ids_outside_the_vocabulary_stand_for_nothing() -> None:
    for tokenizer in (NO_BOS, wrap(byte_fallback()), wrap(metaspace())):
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert tokenizer.decode([tokenizer.vocab_size + 7], skip_special_tokens=False) == ""


def test_many_threads_get_what_one_gets() -> None:
    texts = [f"a b {n} \u20ac" * 50 for n in range(64)]
    expected = [NO_BOS.encode(text, add_special_tokens=False) for text in texts]
    fresh = wrap(byte_level())

    def there_and_back(text: str) -> tuple[list[int], str]:
        ids = fresh.encode(text, add_special_tokens=False)
        return ids, fresh.decode(ids, skip_special_tokens=False)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, texts)) == list(zip(expected, texts, strict=True))


def test_ends_of_sequence_come_from_all_configs(tmp_path: Path) -> None:
    files = folder(
        tmp_path,
        tokenizer_config={"eos_token": "</s>"},
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 9},
    )
    tokenizer = load_tokenizer(files)
    assert tokenizer.eos_ids == (NO_BOS.eos_ids[0], 7, 9)


def test_named_tokens_are_read_in_both_forms_and_from_both_files(tmp_path: Path) -> None:
    files = folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None},
        special_tokens_map={"bos_token": "<s>"},
    )
    assert load_tokenizer(files).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", ["{{ 'caf\u00e9' }}", None])
def test_the_template_beside_the_config_wins(tmp_path: Path, template: str | None) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    files = folder(tmp_path, tokenizer_config={"chat_template": named})
    if template:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert load_tokenizer(files).chat_template == (template or "plain")


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(ModelFiles(source="x", path=tmp_path, format="hf"))


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    files = folder(tmp_path)
    raw = byte_level()
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(files).encode("bbbb", add_special_tokens=False)) == 4
