"""What a model's authors recommend for sampling: its generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lmesh_kernels.text.catalog import entry_of
from lmesh_kernels.text.resolve import ModelFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Defaults for fields that a request leaves open; None where the authors say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def load_generation_defaults(files: ModelFiles) -> GenerationDefaults:
    """The recommended sampling of a model: its generation_config.json, and what the catalog knows beyond that."""
    known = entry_of(files.source)
    path = files.path / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if files.format == "hf" and path.is_file() else {}
    longest = config.get("max_new_tokens")
    if config.get("do_sample") is False:
        return GenerationDefaults(
            temperature=0.0, repetition_penalty=config.get("repetition_penalty"), max_new_tokens=longest
        )
    return GenerationDefaults(
        temperature=config.get("temperature", known.temperature if known else None),
        top_p=config.get("top_p", known.top_p if known else None),
        top_k=config.get("top_k"),
        min_p=config.get("min_p"),
        repetition_penalty=config.get("repetition_penalty"),
        max_new_tokens=longest,
    )
