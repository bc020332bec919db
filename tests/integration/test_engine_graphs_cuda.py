"""Captured steps on a CUDA device: as the same steps launched one by one; and bits that no neighbour changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lmesh_kernels.text.resolve import local_files
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.device_steps import DeviceSteps
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start

from tests.random_adapter import adapter_of
from tests.tiny_model import save_tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def engine_of(tiny: Path, dtype: str, **told: Any) -> Engine:
    sizes: dict[str, Any] = {"block_size": 16, "kv_blocks": 2000, "max_seqs": 64, "max_step_tokens": 256}
    sizes |= {"max_model_len": 256, "max_adapter_bytes": 8 << 20} | told
    return Engine(EngineConfig(device="cuda", dtype=dtype, model_digest="tiny", **sizes), local_files(tiny))


def starts(count: int, *, shared: int = 0, first: int = 0, **sampling: Any) -> list[Start]:
    """Requests of uneven lengths; those of one number are the same whatever their company."""
    found = []
    for key in range(first, first + count):
        own = random.Random(key)
        ids = [7 * i % 250 for i in range(shared)] + [own.randrange(250) for _ in range(own.randrange(5, 90))]
        params = Params(max_tokens=own.randrange(10, 60), seed=key, **sampling)
        found.append(Start(key, str(key), 0, ids, len(ids), params))
    return found


@pytest.mark.parametrize("shared", [0, 96], ids=["own", "shared prefix"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9},
        {"temperature": 0.9, "top_p": 0.8},
        {"presence_penalty": 1.0, "logit_bias": ((7, 3.0),)},
    ],
    ids=str,
)
def test_captured_steps_give_what_launched_ones_do(tiny: Path, shared: int, sampling: dict[str, Any]) -> None:
    found = []
    for eager in (True, False):
        engine = engine_of(tiny, "float32", enforce_eager=eager)
        found.append([engine.generate(starts(48, shared=shared, **sampling)) for _ in range(2)])
        steps = engine._runner.steps
        assert isinstance(steps, DeviceSteps)
        assert (steps.graphs is None) if eager else (steps.graphs is not None and steps.graphs.captures > 3)
        assert engine.load().kv_blocks_used == 0
        engine.close()
    assert found[0] == found[1]
    assert found[1][0] == found[1][1]


def test_adapters_ride_in_captured_steps(tiny: Path) -> None:
    found = []
    for eager in (True, False):
        engine = engine_of(tiny, "float32", enforce_eager=eager)
        adapters = (adapter_of(engine, 4, 3.0), "", adapter_of(engine, 40, 1.0))
        told = [msgspec.structs.replace(one, adapter=adapters[one.key % 3]) for one in starts(24)]
        found.append([engine.generate(told) for _ in range(3)])
        steps = engine._runner.steps
        assert isinstance(steps, DeviceSteps)
        if steps.graphs is not None:
            captured = [key for key in steps.graphs._captured if key.adapters is not None]
            assert {key.has_wide for key in captured} == {False, True}, "decodes and prompts"
        base = engine.generate(starts(24))
        assert sum(base[key] != found[-1][0][key] for key in base) >= 12, "the adapters change nothing"
        engine.close()
    assert found[0] == found[1]
    assert found[1][0] == found[1][1] == found[1][2]


def test_what_was_captured_while_nobody_waited_serves_requests(tiny: Path) -> None:
    found = []
    for eager in (True, False):
        engine = engine_of(tiny, "float32", enforce_eager=eager)
        while engine.cold and not eager:
            engine.warm_next()
        graphs = engine._runner.graphs
        if graphs is not None:
            assert {key.has_wide for key in graphs._captured} == {False, True}, "decodes and prompts"
        found.append(engine.generate(starts(48)))
        engine.close()
    assert found[0] == found[1]


def test_a_size_that_came_before_is_not_captured_again(tiny: Path) -> None:
    engine = engine_of(tiny, "float32", prefix_cache=False)
    for _ in range(2):
        engine.generate(starts(32))
    steps = engine._runner.steps
    assert isinstance(steps, DeviceSteps) and steps.graphs is not None
    captured = steps.graphs.captures
    engine.generate(starts(32))
    assert steps.graphs.captures == captured > 3
    engine.close()


def test_a_request_s_ids_do_not_depend_on_its_company(tiny: Path) -> None:
    engine = engine_of(tiny, "bfloat16", batch_invariant=True, max_seqs=256, kv_blocks=4000)
    together = engine.generate(starts(256))
    for one in starts(8):
        assert engine.generate([one])[one.key] == together[one.key]
    engine.close()
