"""The steps of an accelerator's engine, whole, with its kernels interpreted: ids are those of the CPU's own steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from lmesh_kernels.layers import attention as attention_layer
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.ops import attention_work, embedding, rms_norm, rope_kv, silu_mul
from lmesh_kernels.platforms import detect
from lmesh_kernels.text.resolve import local_files
from lmesh_worker.engine import device_steps, graphs
from lmesh_worker.engine.buffers import Arena, Layout
from lmesh_worker.engine.compute import StepOutputs
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.device_steps import DeviceSteps
from lmesh_worker.engine.engine import Engine
from lmesh_worker.engine.first_times import first_times
from lmesh_worker.engine.graphs import StepGraphs
from lmesh_worker.engine.plan import Row
from lmesh_worker.engine.slots import Slots
from lmesh_worker.engine.steady import Steady
from lmesh_worker.messages import Params, Start

from tests.random_adapter import adapter_of
from tests.tiny_model import save_tiny_llama

BLOCK = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def engine_of(tiny: Path) -> Engine:
    sizes = {"block_size": BLOCK, "kv_blocks": 40, "max_seqs": 5, "max_step_tokens": 48, "max_model_len": 128}
    sizes["max_adapter_bytes"] = 8 << 20
    return Engine(EngineConfig(device="cpu", dtype="float32", model_digest="tiny", **sizes), local_files(tiny))


def starts(*, more: int = 0) -> list[Start]:
    """Two that share 32 tokens, two of their own of which one is longer than a step, and one that samples."""
    common = [5 * i % 250 for i in range(32)]
    prompts = [[*common, 7, 8], [*common, 9], [3 * i % 250 for i in range(61)], [4, 5, 6]]
    found = [Start(k, str(k), 0, ids, len(ids), Params(max_tokens=4 + k + more)) for k, ids in enumerate(prompts)]
    sampled = Params(max_tokens=5 + more, temperature=0.8, top_p=0.9, seed=3, presence_penalty=0.5)
    return [*found, Start(9, "9", 0, [11, 12, 13], 3, sampled)]


def on_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> DeviceSteps:
    """Gives the engine's runner an accelerator's steps, on a CPU whose tensors the kernels take."""
    for module in (attention_layer, embedding, rms_norm, rope_kv, silu_mul):
        monkeypatch.setattr(module, "takes_triton", lambda x: True)
    monkeypatch.setattr(attention_work, "LEAST_SPLIT", 16)
    monkeypatch.setattr(device_steps, "shared_prefixes", partial(attention_work.shared_prefixes, least=BLOCK))
    runner, platform = engine._runner, detect("cpu")
    slots = Slots(platform, max_seqs=5, max_blocks=8, spare_block=engine.kv.num_blocks - 1, block_size=BLOCK)
    slots.device_tables = torch.from_numpy(slots.tables.copy())
    attention = PagedAttention(engine.kv)
    steps = DeviceSteps(
        engine.decoder,
        attention,
        slots,
        runner.tables,
        engine.adapters.bank,
        platform,
        block_size=BLOCK,
        max_tokens=48,
        max_seqs=5,
        depth=0,
        graphs=True,
    )
    runner._slots = slots
    runner.steps = steps
    return steps


def test_ids_are_those_of_the_cpu_s_own_steps(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine_of(tiny).generate(starts())
    engine = engine_of(tiny)
    steps = on_kernels(engine, monkeypatch)
    assert steps.graphs is None  # a CPU has none
    planned = []
    whole = device_steps.plan_pieces
    monkeypatch.setattr(
        device_steps, "plan_pieces", lambda *a, **o: planned.append((whole(*a, **o), o)) or planned[-1][0]
    )
    assert engine.generate(starts()) == expected
    assert any(options["groups"] for _, options in planned), "no prefix was shared"
    assert any(pieces.parts.any() for pieces, _ in planned), "no keys were split"
    assert engine.load().kv_blocks_used == 0


class Replayed:
    """Stands for a graph: computes anew, from wherever the columns stand, what was recorded."""

    def __init__(self, layout: Layout, compute: Callable[[], StepOutputs]) -> None:
        self.graph, self.layout, self._compute = self, layout, compute
        self.outputs: StepOutputs | None = None

    def replay(self) -> None:
        self.outputs = self._compute()


def replaying(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceSteps, list[Steady | None]]:
    """An accelerator's steps one ahead, with stand-ins for graphs; and the steps that followed one another."""
    steps = on_kernels(engine, monkeypatch)
    steps.graphs = StepGraphs(steps._shape, max_seqs=5, most_tokens=48)
    monkeypatch.setattr(steps.graphs, "_record", Replayed)
    engine.depth, engine._runner._out = 1, [*engine._runner._out, engine._runner._out[0].clone()]
    steps._arena = Arena(engine.platform, capacity=steps._arena.capacity, sets=2)
    followed: list[Steady | None] = []
    after = steps._after

    def noted(before: Steady, rows: list[Row]) -> Steady | None:
        followed.append(after(before, rows))
        return followed[-1]

    monkeypatch.setattr(steps, "_after", noted)
    return steps, followed


@pytest.mark.parametrize("few_rows", [0, 4])
def test_replayed_steps_give_the_same_ids(tiny: Path, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FEW_ROWS", few_rows)
    alone = starts(more=12)[1:4]  # nobody shares, nobody has penalties
    expected = engine_of(tiny).generate(alone)
    engine = engine_of(tiny)
    steps, followed = replaying(engine, monkeypatch)
    assert engine.generate(alone) == expected
    assert steps.graphs is not None
    assert steps.graphs.captures > 1 and len(followed) > 8, "nothing was replayed, or no step followed another"
    assert any(key.alone for key in steps.graphs._captured) == bool(few_rows)
    assert engine.load().kv_blocks_used == 0


def test_what_is_warmed_up_while_nobody_waits_is_captured_and_leaves_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = starts()  # decodes stand beside prompts, in graphs that were captured of prompts alone
    expected = engine_of(tiny).generate(told)
    engine = engine_of(tiny)
    steps, _ = replaying(engine, monkeypatch)
    assert steps.graphs is not None
    sizes = steps.graphs.sizes
    engine.cold = first_times(True, sizes, max_tokens=48, max_seqs=5, max_len=48)
    while engine.cold:
        engine.warm_next()
    captured = Counter((key.mode, key.has_wide) for key in steps.graphs._captured)
    assert sizes.mixed == (48,)
    decodes = len(sizes.decodes)
    assert captured == {("greedy", False): decodes, ("truncated", False): decodes, ("random", False): 1} | {
        ("greedy", True): 1,
        ("truncated", True): 1,
    }
    assert engine.load().kv_blocks_used == 0
    captures = steps.graphs.captures
    assert engine.generate(told) == expected
    assert steps.graphs.captures - captures <= 2, "what was met beforehand is not what comes"


def test_penalties_and_biases_ride_in_replayed_steps(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {},
        {"logit_bias": ((7, 9.0), (8, 8.0))},
        {"repetition_penalty": 1.8, "temperature": 0.7, "seed": 5},
        {"logit_bias": ((9, 9.5),), "presence_penalty": 2.0},
    )
    told = [Start(k, str(k), 0, [3 + k, 5, 7 * k], 3, Params(max_tokens=12 + k, **p)) for k, p in enumerate(asked)]
    bare = [msgspec.structs.replace(s, params=Params(max_tokens=s.params.max_tokens)) for s in told]
    expected, plain = engine_of(tiny).generate(told), engine_of(tiny).generate(bare)
    assert all((expected[k] == plain[k]) == (k == 1) for k in expected), "penalties and biases change nothing"
    engine = engine_of(tiny)
    steps, followed = replaying(engine, monkeypatch)
    # One after the other, so that the tables come into being while graphs are there already.
    assert {k: v for s in told[:3] for k, v in engine.generate([s]).items()} == {k: expected[k] for k in range(3)}
    assert engine.generate(told) == expected
    assert steps.graphs is not None and {key.tables for key in steps.graphs._captured} >= {None, (True, True)}
    assert len(followed) > 8, "no step followed another"


def test_adapters_ride_in_replayed_steps(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(engine: Engine) -> list[Start]:
        small, large = adapter_of(engine, 4, 3.0), adapter_of(engine, 40, 1.0)
        prompts = ([1, 2, 3], [9, 8, 7, 6, 5], [11] * 4, [12] * 6)
        adapters = (small, large, "", small)
        return [
            Start(k, str(k), 0, ids, len(ids), Params(max_tokens=10 + k), adapter=adapter)
            for k, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]

    engine = engine_of(tiny)
    starts_on_cpu = told(engine)
    expected = engine.generate(starts_on_cpu)
    base = engine.generate([msgspec.structs.replace(start, adapter="") for start in starts_on_cpu])
    assert all(expected[k] != base[k] for k in (0, 1, 3)) and expected[2] == base[2], "the adapters change nothing"
    engine = engine_of(tiny)
    again = told(engine)
    steps, followed = replaying(engine, monkeypatch)
    for _ in range(3):  # the prompts' step is captured when it comes again
        assert engine.generate(again) == expected
    assert steps.graphs is not None
    captured = [key for key in steps.graphs._captured if key.adapters is not None]
    assert {key.has_wide for key in captured} == {False, True}, "decodes and prompts"
    assert len(followed) > 4, "no step followed another"
