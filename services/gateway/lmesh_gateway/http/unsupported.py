"""Parameters that are not built yet are refused by name, unless their value asks for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmesh_gateway.http.errors import MalformedBodyError, UnknownParameterError, UnsupportedParameterError
from lmesh_gateway.http.schemas import ChatMessage, ContentPart, SamplingBody

# Values that mean "not used", by parameter; None always does.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# They change nothing in what is computed here, whatever their value.
INERT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "user",
    }
)
_STORE = "store"  # nothing is stored, so only false is right
_BEST_OF = "best_of"  # as many candidates as answers asks for nothing more
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"continuous_usage_stats": (False,)}
_MESSAGE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}
_PARTS = frozenset({"audio_url", "file", "image_url", "input_audio", "input_image", "refusal", "video_url"})


def check_extras(body: SamplingBody) -> None:
    """Judges the fields that the body's model does not have.

    Raises UnsupportedParameterError or UnknownParameterError, naming the field and what would be right.
    """
    for name, value in (body.model_extra or {}).items():
        if name in INERT or (name == _STORE and value is False) or (name == _BEST_OF and value == (body.n or 1)):
            continue
        _judge(name, value, {**NOT_BUILT, _STORE: (False,)}.get(name), name)
    for name, value in ((body.stream_options and body.stream_options.model_extra) or {}).items():
        _judge(name, value, _STREAM_OPTIONS.get(name), f"stream_options.{name}")


def check_message(message: ChatMessage, place: str) -> None:
    """Judges the fields of a message beside role, content and name; errors as check_extras'."""
    for name, value in (message.model_extra or {}).items():
        _judge(name, value, _MESSAGE.get(name), f"{place}.{name}")


def check_part(part: ContentPart, place: str) -> None:
    """Judges a part of a message's content: text is read, nothing else yet; errors as check_extras'."""
    if part.type in _PARTS:
        raise UnsupportedParameterError(f"{place}: {part.type} is not supported yet; send text", field=place)
    if part.type != "text":
        raise MalformedBodyError(f"{place}.type: must be text, not {part.type[:64]!r}", field=f"{place}.type")
    for name, value in (part.model_extra or {}).items():
        _judge(name, value, None, f"{place}.{name}")


def _judge(name: str, value: object, neutral: tuple[Any, ...] | None, field: str) -> None:
    if value is None:
        return
    if neutral is None:
        raise UnknownParameterError(f"{field}: there is no such parameter", field=field)
    if not any(type(value) is type(n) and value == n for n in neutral):
        raise UnsupportedParameterError(f"{field}: is not supported yet; {_without(neutral)}", field=field)


def _without(neutral: Iterable[Any]) -> str:
    named = " or ".join(repr(n) for n in neutral)
    return f"leave it out, or pass {named}" if named else "leave it out"
