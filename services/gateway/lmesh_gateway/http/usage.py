"""Token counts as OpenAI tells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmesh_gateway.generation import Usage


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    """The sum over the prompts of one call."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }
