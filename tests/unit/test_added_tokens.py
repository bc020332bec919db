"""Tokens added to a vocabulary: their ids, what the tokenizer makes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmesh_kernels.text.added_tokens import AddedTokenError, AddedTokens, add_tokens
from lmesh_kernels.text.resolve import local_files
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer.errors import JobError
from lmesh_trainer.spec import JobSpec, make_spec
from tokenizers import Tokenizer, models

from tests.tiny_model import byte_tokenizer

ADDED = AddedTokens(plain=("<place>", "tide table"), special=("<|lamp|>",))


def folder(path: Path) -> Path:
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text("{}")
    return path


def spec(**told: object) -> JobSpec:
    return make_spec({"model": "m", "dataset": {"source": "x"}, **told})


def test_ids_follow_the_last_in_the_order_that_was_told() -> None:
    tokenizer = byte_tokenizer()
    assert add_tokens(tokenizer, ADDED) == range(258, 261)
    assert [tokenizer.token_to_id(text) for text in ADDED.all] == [258, 259, 260]


def test_text_around_them_is_as_it_was(tmp_path: Path) -> None:
    files = local_files(folder(tmp_path))
    plain, grown = load_tokenizer(files), load_tokenizer(files, ADDED)
    text = "see the tide table<|lamp|> h\u00e9re</s>"
    ids = grown.encode(text, add_special_tokens=False)
    assert ids.count(259) == ids.count(260) == 1 and grown.vocab_size == plain.vocab_size + 3
    before = plain.encode("see the ", add_special_tokens=False)
    assert ids[: len(before)] == before
    assert grown.decode(ids, skip_special_tokens=False) == text
    assert grown.decode(ids, skip_special_tokens=True) == "see the tide table h\u00e9re"
    assert grown.special_ids == plain.special_ids | {260}
    assert plain.encode("a</s>", add_special_tokens=False) == grown.encode("a</s>", add_special_tokens=False)


@pytest.mark.parametrize("text", ["</s>", "a"])
def test_a_token_that_is_there_is_named(text: str) -> None:
    with pytest.raises(AddedTokenError, match=f"already.*'{text}'"):
        add_tokens(byte_tokenizer(), AddedTokens(plain=("<new>", text)))


def test_ids_with_gaps() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    with pytest.raises(AddedTokenError, match="gaps"):
        add_tokens(tokenizer, AddedTokens(plain=("<new>",)))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"add_tokens": [" "]}, "more than spaces"),
        ({"add_tokens": ["<a>"], "add_special_tokens": ["<a>"]}, "once, not '<a>' twice"),
        ({"add_tokens": [3]}, "add_tokens"),
        ({"lora": {"modules_to_save": ["norm"]}}, r"modules_to_save"),
    ],
)
def test_settings_that_cannot_be(told: dict[str, object], said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        spec(**told)
    assert caught.value.reason == "BAD_SPEC"


def test_what_a_job_makes() -> None:
    assert spec().makes_adapter
    assert spec(lora={"modules_to_save": ["lm_head"]}).modules_to_save == {"lm_head"}
    added = spec(add_special_tokens=["<a>"])
    assert added.modules_to_save == {"embed_tokens", "lm_head"} and not added.makes_adapter
    assert not spec(method="full").makes_adapter
