"""The engine with SmolLM2-135M-Instruct: one step ahead or not, alone or in a crowd, the ids are the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start

SOURCE = "packaged:smollm2-135m-instruct"
NEW_TOKENS = 10
TEXTS = ("The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):")


@cache
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resolve(SOURCE))
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def build(depth: int) -> Engine:
    config = EngineConfig(
        device="cpu", dtype="float32", kv_blocks=160, max_seqs=32, max_model_len=256, pipeline_depth=depth
    )
    return Engine(config, resolve(SOURCE))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = build(1)
    yield engine
    engine.close()


def start(key: int, ids: list[int], **params: float) -> Start:
    return Start(key, f"r{key}", 0, ids, len(ids), Params(max_tokens=NEW_TOKENS, **params))


def test_ids_do_not_depend_on_the_pipeline(engine: Engine) -> None:
    """Greedy ones of an engine that is not ahead equal transformers': test_greedy_parity.py."""
    greedy = [start(key, ids) for key, ids in enumerate(prompts())]
    sampled = [start(10 + key, ids, temperature=0.9, seed=key) for key, ids in enumerate(prompts())]
    plain = build(0)
    try:
        assert plain.generate([*greedy, *sampled]) == engine.generate([*greedy, *sampled])
    finally:
        plain.close()


def test_same_seed_alone_and_among_31_others(engine: Engine) -> None:
    ways = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50})
    starts = [start(key, prompts()[key % 3], seed=1_000 + key, **ways[key % 2]) for key in range(32)]
    crowd = engine.generate(starts)
    for key in (0, 1, 16, 31):
        assert engine.generate([starts[key]])[key] == crowd[key]
    assert len({tuple(ids) for ids in crowd.values()}) > 16
