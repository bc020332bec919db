"""Penalties and biases in the engine: transformers' ids, and the same ones however a sequence was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lmesh_kernels.ops.adjust import Adjustment, adjust_reference
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from tests.tiny_model import save_tiny_llama

PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.6,
    "logit_bias": ((5, 2.0), (200, -3.0)),
}
PROMPT = [1, 2, 3, 7, 7, 250]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return local_files(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def engine_of(files: ModelFiles) -> Iterator[Any]:
    """The module's engine with some settings."""
    engines: dict[str, Engine] = {}

    def get(**settings: Any) -> Engine:
        if repr(settings) not in engines:
            fixed: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_blocks": 256, "max_model_len": 256}
            config = EngineConfig(**(fixed | {"model_digest": "tiny"} | settings))
            engines[repr(settings)] = Engine(config, files)
        return engines[repr(settings)]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture
def run(engine_of: Any) -> Any:
    return lambda starts, **settings: engine_of(**settings).generate(starts)


def start(key: int, ids: list[int] = PROMPT, prompt_len: int = 0, **params: Any) -> Start:
    return Start(key, f"r{key}", 0, ids, prompt_len or len(ids), Params(**({"max_tokens": 40} | params)))


def test_greedy_repetition_is_transformers(run: Any, files: ModelFiles) -> None:
    model = LlamaForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    for penalty in (1.0, 1.2, 1.8, 0.7):
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=40,
            repetition_penalty=penalty,
            eos_token_id=None,
        )[0, len(PROMPT) :].tolist()
        assert run([start(1, repetition_penalty=penalty)])[1] == theirs, penalty


def test_all_of_them_greedily_are_the_definitions(run: Any, files: ModelFiles) -> None:
    """Step by step from a plain forward pass: counts taken anew from the ids each time."""
    model = LlamaForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    ids = list(PROMPT)
    for _ in range(40):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1]
        seen = torch.zeros(1, logits.shape[1], dtype=torch.int16)
        seen[0, PROMPT] = 1
        for token in ids[len(PROMPT) :]:
            seen[0, token] += 2
        bias = torch.zeros(logits.shape)
        bias[0, 5], bias[0, 200] = 2.0, -3.0
        zero = torch.zeros(1, dtype=torch.int64)
        adjustment = Adjustment(
            repetition=torch.tensor([1.3]),
            presence=torch.tensor([0.4]),
            frequency=torch.tensor([0.6]),
            seen_row=zero,
            bias_row=zero,
            seen=seen,
            bias=bias,
        )
        ids.append(int(adjust_reference(logits, adjustment).argmax()))
    plain = run([start(1)])[1]
    assert run([start(1, **PENALTIES)])[1] == ids[len(PROMPT) :] != plain


def test_sampled_ids_lie_where_transformers_warpers_allow(run: Any, files: ModelFiles) -> None:
    model = LlamaForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    warp = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.3)]
    )
    params = {"temperature": 1.5, "min_p": 0.3, "repetition_penalty": 1.4}
    drawn = run([start(seed, seed=seed, **params) for seed in range(8)])
    best = 0
    for ids in drawn.values():
        whole = torch.tensor([[*PROMPT, *ids]])
        with torch.inference_mode():
            logits = model(whole).logits[0]
        for i in range(len(PROMPT), whole.shape[1]):
            allowed = warp(whole[:, :i], logits[i - 1 : i].clone())[0]
            assert allowed[whole[0, i]] > -torch.inf
            best += int(allowed.argmax() == whole[0, i])
    assert 0 < best < 8 * 40  # others than the likeliest are drawn


@pytest.mark.parametrize(
    "params", [PENALTIES, PENALTIES | {"temperature": 0.9, "seed": 3, "min_p": 0.05, "top_p": 0.95}]
)
def test_a_continuation_is_the_unbroken_one(run: Any, params: dict[str, Any]) -> None:
    whole = run([start(1, **params)])[1]
    for cut in (1, 17, 39):
        assert run([start(2, [*PROMPT, *whole[:cut]], len(PROMPT), **params)])[2] == whole[cut:]
    # Where the output begins matters: taken for prompt, the same ids count otherwise.
    fresh = run([start(3, [*PROMPT, *whole[:17]], **(params | {"max_tokens": 23}))])[3]
    assert fresh != whole[17:]


@pytest.mark.parametrize("depth", [0, 1])
def test_company_preemption_and_slots_used_again_change_nothing(run: Any, engine_of: Any, depth: int) -> None:
    each = [
        PENALTIES,
        {},
        {"frequency_penalty": 2.0},
        {"logit_bias": ((9, 5.0),)},
        {"temperature": 1.0, "presence_penalty": -1.0},
    ]
    starts = [start(k, [k + 1] * 20, seed=k, **each[k % 5]) for k in range(15)]
    alone = {s.key: run([s])[s.key] for s in starts}
    small = {"kv_blocks": 40, "block_size": 4, "max_seqs": 6, "max_step_tokens": 24, "max_model_len": 128}
    engine = engine_of(pipeline_depth=depth, **small)
    assert engine.generate(starts) == alone
    assert engine.load().preemptions > 0


def test_log_probabilities_are_the_plain_ones(engine_of: Any, files: ModelFiles) -> None:
    engine = engine_of()
    engine.add(start(1, logprobs=0, max_tokens=6, temperature=0.7, **PENALTIES))
    reports = []
    while engine.has_work:
        if (report := engine.step()) is not None:
            reports.append(report)
    ids = [i for r in reports for i in r.ids]
    model = LlamaForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    with torch.inference_mode():
        plain = model(torch.tensor([[*PROMPT, *ids]])).logits[0].log_softmax(-1)
    expected = [plain[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(ids)]
    assert [x for r in reports for entry in r.logprobs for x in entry.chosen] == pytest.approx(expected, abs=1e-4)


def test_the_plan_counts_the_tables_and_none_is_there_before_it_is_needed(engine_of: Any) -> None:
    engine = engine_of(max_seqs=8)
    engine.generate([start(1)])
    assert engine.plan.lines["logit_tables"] == 8 * 258 * 6
    tables = engine._runner.tables
    assert (tables._seen, tables._bias) == (None, None)
    engine.generate([start(1, presence_penalty=1.0)])
    assert tables._seen.nbytes == 8 * 258 * 2 and tables._bias is None
    engine.generate([start(1, logit_bias=((1, 1.0),))])
    assert tables._bias.nbytes == 8 * 258 * 4


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": tuple((i % 258, 1.0) for i in range(301))}, "at most 300"),
        ({"logit_bias": ((258, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "once"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run: Any, params: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError, match=f"INVALID_START: .*{named}"):
        run([start(1, **params)])
