"""The engine on a CUDA device: the same ids as on the CPU in float32, and a pipelined run in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.text.resolve import local_files
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start

from tests.tiny_model import save_tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def run(tiny: Path, device: str, dtype: str, **sampling: float) -> dict[int, list[int]]:
    config = EngineConfig(
        device=device,
        dtype=dtype,
        block_size=8,
        kv_blocks=200,
        max_seqs=16,
        max_step_tokens=48,
        max_model_len=256,
        model_digest="tiny",
    )
    engine = Engine(config, local_files(tiny))
    shared = [(7 * i) % 250 for i in range(40)]
    starts = [
        Start(k, str(k), 0, [*shared, *(range(k + 1))], 41 + k, Params(max_tokens=40, seed=k, **sampling))
        for k in range(24)
    ]
    try:
        out = engine.generate(starts)
        assert engine.load().prefix_hit_tokens > 0
        assert engine.load().kv_blocks_used == 0
        return out
    finally:
        engine.close()


def test_greedy_ids_equal_the_cpus_in_float32(tiny: Path) -> None:
    assert run(tiny, "cuda", "float32") == run(tiny, "cpu", "float32")


def test_sampled_ids_equal_the_cpus_in_float32(tiny: Path) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    assert run(tiny, "cuda", "float32", **sampling) == run(tiny, "cpu", "float32", **sampling)


def test_bfloat16_runs_to_the_end(tiny: Path) -> None:
    out = run(tiny, "cuda", "bfloat16")
    assert all(len(ids) == 40 for ids in out.values())
