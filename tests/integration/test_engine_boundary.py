"""What goes wrong in one sequence stays there: poison by the dozen, glitches of the device, values no tensor takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_worker.engine.config import ConfigError, EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Finish, Params, Start, StepReport

from tests.tiny_model import save_tiny_llama

MAGIC = 251
Build = Callable[..., Engine]
Forward = Callable[[Any, Any], torch.Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return local_files(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def build(files: ModelFiles) -> Iterator[Build]:
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        defaults = {
            "device": "cpu",
            "dtype": "float32",
            "kv_blocks": 256,
            "max_seqs": 16,
            "max_step_tokens": 64,
            "max_model_len": 256,
            "model_digest": "tiny",
        }
        engines.append(Engine(EngineConfig(**(defaults | settings)), files))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def start(key: int, ids: list[int], **params: Any) -> Start:
    return Start(key, f"r{key}", 0, ids, len(ids), Params(**({"max_tokens": 8} | params)))


class Outcome:
    """What an engine said of each key."""

    def __init__(self) -> None:
        self.ids: dict[int, list[int]] = {}
        self.errors: list[tuple[int, str]] = []
        self.finish: dict[int, int] = {}
        self.prompt_scores: dict[int, list[float]] = {}
        self.preemptions: dict[int, int] = {}

    def take(self, report: StepReport | None) -> None:
        if report is None:
            return
        at = 0
        for key, count, finish in zip(report.keys, report.n_new, report.finish, strict=True):
            self.ids.setdefault(key, []).extend(report.ids[at : at + count])
            self.finish[key] = finish
            at += count
        self.errors += [(report.keys[error.entry], error.reason) for error in report.errors]
        self.preemptions |= {report.keys[timing.entry]: timing.preemptions for timing in report.timings}
        for scores in report.logprobs:
            if scores.prompt:
                assert report.keys[scores.entry] not in self.prompt_scores, "told once"
                self.prompt_scores[report.keys[scores.entry]] = scores.chosen


def drain(engine: Engine, outcome: Outcome | None = None) -> Outcome:
    outcome = outcome or Outcome()
    while engine.has_work:
        outcome.take(engine.step())
    return outcome


def wrap_forward(engine: Engine, monkeypatch: pytest.MonkeyPatch, wrapper: Callable[[Forward, Any, Any], Any]) -> None:
    plain = engine.decoder.forward

    def forward(batch: Any, attention: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
        return wrapper(partial(plain, rows=rows), batch, attention)

    monkeypatch.setattr(engine.decoder, "forward", forward)


def choke(plain: Forward, batch: Any, attention: Any) -> torch.Tensor:
    if bool((batch.ids == MAGIC).any()):
        raise RuntimeError("planted")
    return plain(batch, attention)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_long_sequence_outlives_any_number_of_poisoned_ones(
    build: Build, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    good = [start(key, [key + 3] * 5, max_tokens=90) for key in range(4)]
    healthy = build().generate(good)
    expected = {key: ids for key, ids in healthy.items() if MAGIC not in ids}
    assert len(expected) >= 2
    engine = build(pipeline_depth=depth)
    wrap_forward(engine, monkeypatch, choke)
    outcome = Outcome()
    for one in good:
        if one.key in expected:
            engine.add(one)
    for poison in range(100, 108):
        engine.add(start(poison, [MAGIC] * 3))
        for _ in range(9):
            outcome.take(engine.step())
    drain(engine, outcome)
    assert sorted(outcome.errors) == [(poison, "STEP_FAILED") for poison in range(100, 108)]
    assert {key: outcome.ids[key] for key in expected} == expected
    assert engine.load().kv_blocks_used == 0


def test_steps_that_fail_only_in_company_still_end(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """No culprit can be named, so nobody is failed: each goes on alone."""
    starts = [start(key, [key + 3] * 5, max_tokens=12) for key in range(4)]
    expected = build().generate(starts)

    def sociophobic(plain: Forward, batch: Any, attention: Any) -> torch.Tensor:
        if batch.num_seqs > 1:
            raise RuntimeError("planted")
        return plain(batch, attention)

    engine = build()
    wrap_forward(engine, monkeypatch, sociophobic)
    assert engine.generate(starts) == expected


def test_prompt_scores_are_told_once_and_whole_after_a_failed_step(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = start(1, [(3 * i) % 250 for i in range(150)], max_tokens=2, prompt_logprobs=2)
    expected = build()
    expected.add(scored)
    whole = drain(expected).prompt_scores[1]
    calls = iter(range(1_000))

    def fail_once(plain: Forward, batch: Any, attention: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise RuntimeError("planted")
        return plain(batch, attention)

    engine = build()
    wrap_forward(engine, monkeypatch, fail_once)
    engine.add(start(0, [1] * 4, max_tokens=40))
    engine.add(scored)
    outcome = drain(engine)
    assert outcome.errors == []
    assert len(whole) == 149
    assert outcome.prompt_scores[1] == pytest.approx(whole, abs=1e-4)


def test_prompt_scores_are_whole_after_a_preemption(build: Build) -> None:
    scored = Start(9, "r9", 0, [(3 * i) % 250 for i in range(60)], 60, Params(max_tokens=2, prompt_logprobs=0), "", 1)
    alone = build()
    alone.add(scored)
    whole = drain(alone).prompt_scores[9]
    engine = build(block_size=4, kv_blocks=28, max_model_len=96, max_step_tokens=8, max_seqs=8)
    for key in range(4):
        engine.add(start(key, [key + 1] * 4, max_tokens=60))
    outcome = Outcome()
    for _ in range(4):
        outcome.take(engine.step())
    engine.add(scored)  # in chunks of four, while the others grow
    drain(engine, outcome)
    assert outcome.preemptions[9] > 0, "it was meant to give way after some chunks"
    assert outcome.prompt_scores[9] == pytest.approx(whole, abs=1e-4)


def test_a_glitch_does_not_live_on_in_the_prefix_cache(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(64))
    expected = build().generate([start(2, ids)])[2]
    glitch = [True]

    def overflow(plain: Forward, batch: Any, attention: Any) -> torch.Tensor:
        hidden = plain(batch, attention)
        if glitch[0]:
            for layer in range(2):
                for cache in attention.kv.layer(layer):
                    cache.flatten(0, 1)[batch.kv_slots] = math.nan
            hidden[:] = math.nan
        return hidden

    engine = build()
    wrap_forward(engine, monkeypatch, overflow)
    engine.add(start(1, ids))
    assert drain(engine).errors == [(1, "NON_FINITE_LOGITS")]
    glitch[0] = False
    assert engine.generate([start(2, ids)])[2] == expected


def test_nan_left_in_memory_does_not_reach_its_next_holder(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [start(key, [key + 20] * 5, max_tokens=20) for key in range(3)]
    expected = build().generate(starts)
    engine = build(kv_blocks=16)
    engine.generate([start(50 + key, [key + 60] * 50, max_tokens=2) for key in range(4)])  # every block has been used
    for layer in range(2):
        for cache in engine.kv.layer(layer):
            cache.fill_(math.nan)
    for block in range(16):
        engine.pool.withdraw(block)
    assert engine.generate(starts) == expected


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1 << 31},
        {"top_k": -1},
        {"logprobs": 259},
        {"prompt_logprobs": 1_000_000},
        {"max_tokens": -1},
        {"max_tokens": -1, "prompt_logprobs": 1},
        {"temperature": math.inf},
        {"temperature": -0.5},
    ],
)
def test_parameters_that_no_step_can_take_are_refused_before_one(build: Build, params: dict[str, Any]) -> None:
    engine = build()
    engine.add(start(1, [1, 2], **params))
    assert drain(engine).errors == [(1, "INVALID_START")]
    assert engine.load().steps == 0


def test_negative_ids_are_refused(build: Build) -> None:
    engine = build()
    engine.add(start(1, [1, -2, 3]))
    assert drain(engine).errors == [(1, "INVALID_START")]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_launch_that_fails_on_the_host_is_a_failed_step(build: Build, depth: int) -> None:
    starts = [start(key, [key + 3] * 5, max_tokens=12) for key in range(3)]
    expected = build().generate(starts)
    engine = build(pipeline_depth=depth)
    for one in starts:
        engine.add(one)
    outcome = Outcome()
    for _ in range(4):
        outcome.take(engine.step())
    engine.add(Start(9, "r9", 1 << 70, [1, 2], 2, Params(max_tokens=4)))  # a choice that no int64 holds
    drain(engine, outcome)
    assert outcome.errors == [(9, "STEP_FAILED")]
    assert {key: outcome.ids[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("delivered", "params", "finish"),
    [
        ([7, 8], {"max_tokens": 2}, Finish.LENGTH),
        ([7, 9], {"max_tokens": 20, "stop_token_ids": (9,)}, Finish.STOP),
    ],
)
def test_a_continuation_that_had_ended_only_says_so(
    build: Build, delivered: list[int], params: dict[str, Any], finish: Finish
) -> None:
    engine = build()
    engine.add(Start(1, "r1", 0, [1, 2, 3, *delivered], 3, Params(**params)))
    reports = [engine.step()]
    assert reports[0] is not None
    assert (reports[0].ids, reports[0].finish, reports[0].start_pos) == ([], [finish], [5])
    assert not engine.has_work


def test_a_report_without_ids_stands_where_the_next_would_have_gone(build: Build) -> None:
    engine = build()
    engine.add(start(1, list(range(20)), max_tokens=0, prompt_logprobs=0))
    reports = []
    while engine.has_work:
        if (report := engine.step()) is not None:
            reports.append(report)
    assert [(r.start_pos, r.n_new) for r in reports] == [([20], [0])]


def test_rows_of_one_step_may_want_different_scores(build: Build) -> None:
    alone: dict[int, list[tuple[list[float], list[int], list[float]]]] = {}
    together: dict[int, list[tuple[list[float], list[int], list[float]]]] = {}
    starts = [start(key, [key + 3] * 5, max_tokens=3, logprobs=k) for key, k in enumerate((-1, 0, 5, 2))]
    engine = build(prefix_cache=False)
    for told, groups in ((together, [starts]), (alone, [[one] for one in starts])):
        for group in groups:
            for one in group:
                engine.add(one)
            while engine.has_work:
                report = engine.step()
                for scores in report.logprobs if report else []:
                    row = (scores.chosen, scores.top_ids, scores.top_logprobs)
                    told.setdefault(report.keys[scores.entry], []).append(row)
    assert sorted(together) == [1, 2, 3]
    for key, k in ((1, 0), (2, 5), (3, 2)):
        assert [len(ids) for _, ids, _ in together[key]] == [k] * 3
        for (chosen, ids, values), (chosen_alone, ids_alone, values_alone) in zip(
            together[key], alone[key], strict=True
        ):
            assert ids == ids_alone
            assert [*chosen, *values] == pytest.approx([*chosen_alone, *values_alone], abs=1e-4)


def test_warming_up_leaves_no_trace(build: Build) -> None:
    engine = build()
    before, free = engine.load(), engine.pool.num_free
    engine.warm_up()
    assert engine.load() == before
    assert engine.pool.num_free == free
    assert not engine.has_work


def test_a_context_without_room_for_a_new_token_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="max_model_len 1 has no place"):
        build(max_model_len=1)
