"""Parameters that are not built yet are refused by name, unless their value asks for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from lmesh_gateway.http.errors import UnknownParameterError, UnsupportedParameterError

# Values that mean "not used", by parameter; None always does.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "frequency_penalty": (0, 0.0),
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
    "logit_bias": ({},),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1, 1.0),
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


def check_extras(body: BaseModel) -> None:
    """Judges the fields that the body's model does not have.

    Raises UnsupportedParameterError or UnknownParameterError, naming the field and what would be right.
    """
    for name, value in (body.model_extra or {}).items():
        if value is None or name in INERT:
            continue
        if name == _STORE and value is False:
            continue
        if name not in NOT_BUILT and name != _STORE:
            raise UnknownParameterError(f"{name}: there is no such parameter", field=name)
        neutral = NOT_BUILT.get(name, (False,))
        if not any(type(value) is type(n) and value == n for n in neutral):
            raise UnsupportedParameterError(f"{name}: is not supported yet; {_without(neutral)}", field=name)


def _without(neutral: Iterable[Any]) -> str:
    named = " or ".join(repr(n) for n in neutral)
    return f"leave it out, or pass {named}" if named else "leave it out"
