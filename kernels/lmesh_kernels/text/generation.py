"""What a model's authors recommend for sampling: its generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lmesh_kernels.text.resolve import ModelFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Defaults for fields that a request leaves open; None where the authors say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None


def load_generation_defaults(files: ModelFiles) -> GenerationDefaults:
    """The recommended sampling of a model (a GGUF file carries none)."""
    path = files.path / "generation_config.json"
    if files.format == "gguf" or not path.is_file():
        return GenerationDefaults()
    config = json.loads(path.read_text(encoding="utf-8"))
    longest = config.get("max_new_tokens")
    if config.get("do_sample") is False:
        return GenerationDefaults(temperature=0.0, max_new_tokens=longest)
    return GenerationDefaults(
        temperature=config.get("temperature"),
        top_p=config.get("top_p"),
        top_k=config.get("top_k"),
        max_new_tokens=longest,
    )
