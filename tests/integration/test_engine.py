"""The engine's promises on a tiny real checkpoint: sharing, aborts, seeds, scores, and the error boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_worker.engine.config import ConfigError, EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Finish, Params, Start, StepReport

from tests.tiny_model import save_tiny_llama

MAGIC = 251  # an id that a sabotaged decoder chokes on
Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return local_files(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def build(files: ModelFiles) -> Iterator[Build]:
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        defaults: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "block_size": 16,
            "kv_blocks": 256,
            "max_seqs": 32,
            "max_step_tokens": 512,
            "max_model_len": 512,
            "model_digest": "tiny",
        }
        engines.append(Engine(EngineConfig(**(defaults | settings)), files))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def start(key: int, ids: list[int], salt: str = "", choice: int = 0, **params: Any) -> Start:
    return Start(key, f"r{key}", choice, ids, len(ids), Params(**({"max_tokens": 8} | params)), salt)


def test_random_weights_serve_without_a_checkpoint(tmp_path: Path, files: ModelFiles) -> None:
    (tmp_path / "config.json").write_bytes((files.path / "config.json").read_bytes())
    config = EngineConfig(device="cpu", load_format="dummy", kv_blocks=64, max_model_len=256)
    engine = Engine(config, local_files(tmp_path))
    try:
        first = engine.generate([start(1, [1, 2, 3]), start(2, [4] * 40)])
        assert {key: len(ids) for key, ids in first.items()} == {1: 8, 2: 8}
        assert engine.generate([start(3, [1, 2, 3])])[3] == first[1]
    finally:
        engine.close()
    with pytest.raises(ConfigError, match="load_format must be auto or dummy, not 'random'"):
        EngineConfig(load_format="random")


def drain(engine: Engine) -> list[StepReport]:
    reports = []
    while engine.has_work:
        if (report := engine.step()) is not None:
            reports.append(report)
    return reports


def spy_on_plans(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Token counts of the steps that are launched."""
    counts: list[int] = []
    plain = engine._runner.launch
    monkeypatch.setattr(engine._runner, "launch", lambda plan: counts.append(plan.num_tokens) or plain(plan))
    return counts


@pytest.mark.parametrize("depth", [0, 1])
def test_a_burst_computes_its_shared_prefix_once(build: Build, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    engine = build(pipeline_depth=depth, max_model_len=512, kv_blocks=512)
    counts = spy_on_plans(engine, monkeypatch)
    prefix = [i % 250 for i in range(448)]
    engine.generate([start(k, [*prefix, *((k + j) % 250 for j in range(32))], max_tokens=1) for k in range(32)])
    assert sum(counts) == 448 + 32 * 32
    assert engine.load().prefix_hit_tokens == 31 * 448


def test_sharing_within_one_step(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    counts = spy_on_plans(engine, monkeypatch)
    prefix = [i % 250 for i in range(64)]
    starts = [start(k, [*prefix, k], max_tokens=4) for k in range(8)]
    together = engine.generate(starts)
    assert counts[0] == 64 + 8  # one step computes the prefix once, and each sequence's own id
    alone = build(prefix_cache=False)
    assert together == {s.key: alone.generate([s])[s.key] for s in starts}


def test_without_prefix_cache_nothing_is_reused(build: Build) -> None:
    engine = build(prefix_cache=False)
    ids = list(range(100))
    engine.generate([start(1, ids)])
    engine.generate([start(2, ids)])
    assert engine.load().prefix_hit_tokens == 0


def test_another_salt_is_never_a_hit(build: Build) -> None:
    engine = build()
    ids = list(range(100))
    first = engine.generate([start(1, ids, "tenant-a")])
    hits = engine.load().prefix_hit_tokens
    second = engine.generate([start(2, ids, "tenant-b")])
    assert engine.load().prefix_hit_tokens == hits
    engine.generate([start(3, ids, "tenant-a")])
    assert engine.load().prefix_hit_tokens == hits + 96
    assert first[1] == second[2]


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_frees_blocks_within_two_steps(build: Build, depth: int) -> None:
    engine = build(pipeline_depth=depth)
    for key in range(4):
        engine.add(start(key, [key] * 40, max_tokens=200))
    for _ in range(6):
        engine.step()
    held = engine.load().kv_blocks_used
    engine.abort(2)
    reports = [engine.step(), engine.step()]
    told = [r for r in reports if r is not None and 2 in r.keys]
    assert len(told) == 1
    assert told[0].finish[told[0].keys.index(2)] == Finish.ABORTED
    assert engine.load().kv_blocks_used < held
    assert engine.load().running == 3
    later = drain(engine)
    assert not [r for r in later if 2 in r.keys], "nothing is said of an aborted sequence any more"
    assert engine.load().kv_blocks_used == 0


def test_an_abort_while_idle_or_waiting_is_told_at_once(build: Build) -> None:
    engine = build(max_seqs=1, max_step_tokens=16)
    engine.add(start(1, [1] * 8, max_tokens=50))
    engine.add(start(2, [2] * 8, max_tokens=50))
    engine.step()
    engine.abort(2)
    engine.abort(99)  # unknown: it may just have ended
    finishes = {k: f for r in drain(engine) for k, f in zip(r.keys, r.finish, strict=True) if f}
    assert finishes == {1: Finish.LENGTH, 2: Finish.ABORTED}


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9}])
def test_same_seed_alone_and_among_31_others(build: Build, sampling: dict[str, Any]) -> None:
    engine = build()
    starts = [start(k, [7, 8, 9 + k % 5], max_tokens=24, temperature=1.0, seed=k, **sampling) for k in range(32)]
    crowd = engine.generate(starts)
    for k in (0, 13, 31):
        assert build().generate([starts[k]])[k] == crowd[k]
    assert len({tuple(ids) for ids in crowd.values()}) > 20


def test_choices_of_one_seed_differ(build: Build) -> None:
    out = build().generate([start(k, [1, 2, 3], choice=k, temperature=1.0, seed=5, max_tokens=16) for k in range(4)])
    assert len({tuple(ids) for ids in out.values()}) == 4


def test_a_continuation_is_the_same_text(build: Build) -> None:
    """What failover will rest on: prompt plus delivered ids go on exactly where the sequence was."""
    params = {"temperature": 0.9, "seed": 11, "max_tokens": 30}
    whole = build().generate([start(1, [1, 2, 3], **params)])[1]
    resumed = Start(2, "r2", 0, [1, 2, 3, *whole[:12]], 3, Params(**params))
    assert build().generate([resumed])[2] == whole[12:]


@pytest.mark.parametrize("chunk", [16, 512])
def test_prompt_and_token_logprobs(build: Build, files: ModelFiles, chunk: int) -> None:
    from transformers import LlamaForCausalLM

    engine = build(max_step_tokens=chunk, max_seqs=8)
    ids = [(5 * i) % 250 for i in range(50)]
    engine.generate([start(0, ids)])  # the cache holds the prompt, and must not swallow its scores
    engine.add(start(1, ids, max_tokens=4, logprobs=3, prompt_logprobs=2))
    reports = drain(engine)
    new = [i for r in reports for i in r.ids]
    prompt = [lp for r in reports for lp in r.logprobs if lp.prompt]
    tokens = [lp for r in reports for lp in r.logprobs if not lp.prompt]
    assert len(prompt) == 1
    model = LlamaForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    with torch.inference_mode():
        scores = model(torch.tensor([[*ids, *new]])).logits[0].log_softmax(-1)
    assert prompt[0].chosen == pytest.approx([scores[i, ids[i + 1]].item() for i in range(49)], abs=1e-4)
    assert len(prompt[0].top_ids) == 49 * 2
    assert [c for t in tokens for c in t.chosen] == pytest.approx(
        [scores[49 + i, new[i]].item() for i in range(4)], abs=1e-4
    )
    assert all(t.top_ids[0] == new[i] for i, t in enumerate(tokens)), "greedy takes the best"


def test_scoring_only(build: Build) -> None:
    engine = build()
    engine.add(start(1, list(range(20)), max_tokens=0, prompt_logprobs=0))
    reports = drain(engine)
    assert [i for r in reports for i in r.ids] == []
    assert [f for r in reports for f in r.finish] == [Finish.LENGTH]
    assert len(reports[-1].logprobs[0].chosen) == 19


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (start(9, []), "INVALID_START"),
        (start(9, [258]), "INVALID_START"),
        (start(9, [1] * 512), "PROMPT_TOO_LONG"),
        (start(9, [1], temperature=math.nan), "INVALID_START"),
        (start(9, [1], top_p=0.0), "INVALID_START"),
        (start(9, [1], max_tokens=0), "INVALID_START"),
    ],
)
def test_a_faulty_start_fails_alone(build: Build, faulty: Start, reason: str) -> None:
    expected = build().generate([start(1, [1, 2, 3])])
    engine = build()
    engine.add(start(1, [1, 2, 3]))
    engine.add(faulty)
    reports = drain(engine)
    assert [(e.reason, r.keys[e.entry]) for r in reports for e in r.errors] == [(reason, 9)]
    ids = [i for r in reports for i in r.ids]
    assert ids == expected[1]


def sabotage(engine: Engine, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Makes the decoder raise on, or give NaN for, a step that holds the magic id."""
    plain = engine.decoder.forward

    def forward(batch: Any, attention: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
        hit = batch.ids == MAGIC
        if how == "raise" and bool(hit.any()):
            raise RuntimeError("planted")
        hidden = plain(batch, attention, rows)
        if how == "nan":
            hidden[hit if rows is None else hit[rows]] = math.nan
        return hidden

    monkeypatch.setattr(engine.decoder, "forward", forward)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("how", "reason"), [("raise", "STEP_FAILED"), ("nan", "NON_FINITE_LOGITS")])
def test_a_poisoned_sequence_harms_nobody_else(
    build: Build, monkeypatch: pytest.MonkeyPatch, depth: int, how: str, reason: str
) -> None:
    shared = [3] * 40
    good = [start(k, [*shared, k], max_tokens=20, stop_token_ids=()) for k in range(6)]
    expected = build().generate(good)
    got: dict[int, list[int]] = {k: [] for k in range(6)}
    engine = build(pipeline_depth=depth)
    sabotage(engine, monkeypatch, how)
    for one in (*good[:3], start(66, [*shared, MAGIC], max_tokens=20), *good[3:]):
        engine.add(one)
    errors = []
    for report in drain(engine):
        errors += [(e.reason, report.keys[e.entry]) for e in report.errors]
        at = 0
        for key, count in zip(report.keys, report.n_new, strict=True):
            got.setdefault(key, []).extend(report.ids[at : at + count])
            at += count
    assert errors == [(reason, 66)]
    assert {k: got[k] for k in expected} == expected
    assert engine.load().kv_blocks_used == 0


def test_plan_refuses_what_cannot_fit(build: Build) -> None:
    with pytest.raises(ConfigError, match="max_model_len 512 needs 32 KV blocks"):
        build(kv_blocks=8)
    assert build(kv_blocks=8, max_model_len=0).plan.max_model_len == 128
    with pytest.raises(ConfigError, match="does not fit"):
        build(kv_blocks=1 << 40)
    with pytest.raises(ConfigError, match="max_seqs 32 exceeds max_step_tokens 16"):
        build(max_step_tokens=16)


def test_every_id_is_reported_once_with_its_position(build: Build) -> None:
    engine = build(kv_blocks=40, block_size=4, max_model_len=128, max_step_tokens=32)
    for key in range(12):
        engine.add(start(key, [key + 1] * 20, max_tokens=24))
    seen: dict[int, int] = {}
    for report in drain(engine):
        for key, at, count in zip(report.keys, report.start_pos, report.n_new, strict=True):
            if count:
                assert at == seen.get(key, 20)
                seen[key] = at + count
    assert engine.load().preemptions > 0
    assert seen == dict.fromkeys(range(12), 44)
