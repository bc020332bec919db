"""Recommended sampling from generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lmesh_kernels.text.generation import GenerationDefaults, load_generation_defaults
from lmesh_kernels.text.resolve import ModelFiles

NOTHING = GenerationDefaults()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 512},
            GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=512),
        ),
        ({"temperature": 0.6}, GenerationDefaults(temperature=0.6)),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, GenerationDefaults(repetition_penalty=1.05, min_p=0.1)),
        (
            {"do_sample": False, "repetition_penalty": 1.1, "min_p": 0.1},
            GenerationDefaults(temperature=0.0, repetition_penalty=1.1),
        ),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, GenerationDefaults(temperature=0.0)),
        ({"eos_token_id": 2}, NOTHING),
    ],
)
def test_what_the_authors_say_and_no_more(tmp_path: Path, config: dict[str, Any], expected: GenerationDefaults) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert load_generation_defaults(ModelFiles(source="", path=tmp_path, format="hf")) == expected


def test_no_file_and_gguf_recommend_nothing(tmp_path: Path) -> None:
    assert load_generation_defaults(ModelFiles(source="", path=tmp_path, format="hf")) == NOTHING
    assert load_generation_defaults(ModelFiles(source="", path=tmp_path / "a.gguf", format="gguf")) == NOTHING


def test_the_catalog_fills_what_the_files_leave_open(tmp_path: Path) -> None:
    packaged = ModelFiles(source="packaged:smollm2-135m-instruct", path=tmp_path / "a.gguf", format="gguf")
    assert load_generation_defaults(packaged) == GenerationDefaults(temperature=0.2, top_p=0.9)
    hub = ModelFiles(source="hub:HuggingFaceTB/SmolLM2-135M-Instruct@abc", path=tmp_path, format="hf")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    assert load_generation_defaults(hub) == GenerationDefaults(temperature=0.7, top_p=0.9)
