"""What of a conversation is learnt: the assistant's words and its end of turn, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
from lmesh_kernels.text.loss_mask import MaskedIds, mask_chat, mask_completion, mask_text, renderer
from lmesh_kernels.text.tokenizer import TextTokenizer

from tests.small_tokenizers import byte_fallback, byte_level, with_bos_processor, wrap

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# A BOS once, roles in headers, the content trimmed; as Llama 3 has it.
HEADERS = (
    "<s>{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# Thoughts of earlier turns are dropped; the prompt for a new turn opens one.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}"
)
# Closes every conversation by itself: nothing can be told apart.
NOT_INCREMENTAL = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


def tokenizer(template: str | None) -> TextTokenizer:
    return wrap(byte_level(), chat_template=template)


def learnt(masked: MaskedIds, by: TextTokenizer) -> str:
    """The learnt tokens' text, with | where something lies between."""
    text, inside = "", False
    for token, trained in zip(masked.ids, masked.trained, strict=True):
        if trained:
            text += by.token_text(token)
        elif inside:
            text += "|"
        inside = trained
    return text


def turns(*contents: str, **of_last: Any) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    found: list[dict[str, Any]] = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    found[-1] |= of_last
    return found


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_every_turn_of_the_assistant_and_its_end(template: str) -> None:
    by = tokenizer(template)
    masked = mask_chat(by, turns("hi", "abc", "and?", "a b"), renderer(by))
    assert learnt(masked, by).strip("|") == "abc</s>|a b</s>"
    assert masked.skipped_turns == 0


def test_what_comes_before_is_the_prompt_that_is_served() -> None:
    by = tokenizer(CHATML)
    messages = turns("hi", "abc", "and?", "a b")
    masked = mask_chat(by, messages, renderer(by))
    for index in (1, 3):
        prompt = by.encode(renderer(by)(messages[:index], True), add_special_tokens=False)
        assert masked.ids[: len(prompt)] == prompt
        assert masked.trained[len(prompt)] and not masked.trained[len(prompt) - 1]


def test_a_message_may_be_left_out() -> None:
    by = tokenizer(CHATML)
    messages = turns("hi", "abc", "and?", "a b")
    messages[1]["train"] = False
    assert learnt(mask_chat(by, messages, renderer(by)), by) == "a b</s>|"


def test_a_prompt_that_says_more_than_a_turn_shows() -> None:
    by = tokenizer(THINKING)
    masked = mask_chat(by, turns("hi", "abc"), renderer(by))
    assert learnt(masked, by) == "abc</s>|"
    with_thought = mask_chat(by, turns("hi", "<think>\nso</think>abc"), renderer(by))
    assert learnt(with_thought, by) == "so</think>abc</s>|"


def test_a_turn_that_later_ones_change_is_left_out_and_counted() -> None:
    by = tokenizer(THINKING)
    masked = mask_chat(by, turns("hi", "<think>\nso</think>abc", "and?", "<think>\nno</think>a b"), renderer(by))
    assert learnt(masked, by) == "no</think>a b</s>|"
    assert masked.skipped_turns == 1


def test_nothing_is_learnt_where_turns_cannot_be_told_apart() -> None:
    by = tokenizer(NOT_INCREMENTAL)
    assert mask_chat(by, turns("hi", "abc"), renderer(by)).trained_tokens == 0


def test_characters_of_several_tokens_are_learnt_whole() -> None:
    by = tokenizer(CHATML)
    assert learnt(mask_chat(by, turns("\U0001f600", "\U0001f600\u00e9t\u00e9"), renderer(by)), by) != ""
    masked = mask_chat(by, turns("x", "\U0001f600"), renderer(by))
    assert by.decode([i for i, t in zip(masked.ids, masked.trained, strict=True) if t], skip_special_tokens=True) == (
        "\U0001f600"
    )


def test_tokenizers_without_bytes() -> None:
    by = wrap(byte_fallback(strip=False), chat_template=CHATML)
    masked = mask_chat(by, turns("a", "ab"), renderer(by))
    assert learnt(masked, by) == "ab</s>|"


def test_a_completion_follows_the_prompt_as_served() -> None:
    by = wrap(with_bos_processor(byte_level()), chat_template=None)
    masked = mask_completion(by, "ab", "abc")
    assert masked.ids[: len(by.encode("ab", add_special_tokens=True))] == by.encode("ab", add_special_tokens=True)
    assert learnt(masked, by) == "abc</s>"


def test_text_is_learnt_whole_but_for_its_start() -> None:
    by = wrap(with_bos_processor(byte_level()), chat_template=None)
    masked = mask_text(by, "abc")
    assert masked.trained[0] is False and all(masked.trained[1:])
    assert learnt(masked, by) == "abc</s>"
    assert learnt(mask_text(by, "abc</s>"), by) == "abc</s>"


def test_without_a_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        renderer(tokenizer(None))
