"""What the gateway refuses, field by field, and what it lets through."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lmesh_gateway.errors import ContextLengthExceededError, InvalidArgumentError
from lmesh_gateway.generation import (
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    Sampling,
    ServedModel,
    StopRules,
    TextPrompt,
    TokenPrompt,
)
from lmesh_gateway.validation import check_against_model, check_request, check_text_length
from lmesh_kernels.text.generation import GenerationDefaults

GOOD = GenerationRequest(model="m", prompt=TextPrompt(text="x"))
MODEL = ServedModel(
    id="m",
    base="m",
    digest="",
    max_model_len=8,
    vocab_size=100,
    created=0.0,
    workers=1,
    tokenizer=cast(Any, SimpleNamespace()),
    defaults=GenerationDefaults(),
)
NAN, INF = math.nan, math.inf

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": ""}),
    ("request_id", {"request_id": ""}),
    ("request_id", {"request_id": "has space"}),
    ("request_id", {"request_id": "x" * 129}),
    ("tokens.ids", {"prompt": TokenPrompt(ids=())}),
    ("chat.messages", {"prompt": ChatPrompt(messages=())}),
    ("chat.messages[1].role", {"prompt": ChatPrompt(messages=({"role": "user", "content": ""}, {"content": "x"}))}),
    *[("sampling.temperature", {"sampling": Sampling(temperature=t)}) for t in (NAN, INF, -INF, -0.1, 100.5)],
    *[("sampling.top_p", {"sampling": Sampling(top_p=p)}) for p in (NAN, INF, 0.0, -0.5, 1.01, 1e-60)],
    *[("sampling.top_k", {"sampling": Sampling(top_k=k)}) for k in (-1, 2**31)],
    *[("sampling.seed", {"sampling": Sampling(seed=s)}) for s in (-1, 2**64)],
    *[("sampling.n", {"sampling": Sampling(n=n)}) for n in (0, -1, 129)],
    *[("sampling.min_p", {"sampling": Sampling(min_p=p)}) for p in (NAN, INF, -0.1, 1.01)],
    *[
        ("sampling.repetition_penalty", {"sampling": Sampling(repetition_penalty=p)})
        for p in (NAN, INF, 0.0, -1.0, 100.5, 1e-60)
    ],
    *[("sampling.presence_penalty", {"sampling": Sampling(presence_penalty=p)}) for p in (NAN, INF, -2.1, 2.1)],
    *[("sampling.frequency_penalty", {"sampling": Sampling(frequency_penalty=p)}) for p in (NAN, -INF, -2.1, 2.1)],
    ("sampling.logit_bias", {"sampling": Sampling(logit_bias=tuple((i, 1.0) for i in range(301)))}),
    *[("sampling.logit_bias[7]", {"sampling": Sampling(logit_bias=((1, 0.5), (7, b)))}) for b in (NAN, INF, -100.5)],
    *[("stop.max_tokens", {"stops": StopRules(max_tokens=m)}) for m in (-1, 0, 2**31)],
    ("stop.stop", {"stops": StopRules(stop=("x",) * 17)}),
    ("stop.stop[1]", {"stops": StopRules(stop=("x", ""))}),
    ("stop.stop[0]", {"stops": StopRules(stop=("x" * 257,))}),
    ("stop.stop_token_ids", {"stops": StopRules(stop_token_ids=(1,) * 129)}),
    *[("output.logprobs", {"output": OutputOptions(logprobs=k)}) for k in (-1, 21)],
    *[("output.prompt_logprobs", {"output": OutputOptions(prompt_logprobs=k)}) for k in (-1, 21)],
    *[("queue_timeout", {"queue_timeout_s": s}) for s in (0.0, -1.0, NAN, INF)],
]


@pytest.mark.parametrize(("field", "change"), REFUSED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(REFUSED)])
def test_refused(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_request(replace(GOOD, **change))
    assert caught.value.field == field and field in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"request_id": "req-1.a:b_c~"},
        {"sampling": Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0, n=128)},
        {"sampling": Sampling(temperature=100.0, top_p=0.01, seed=2**64 - 1)},
        {"sampling": Sampling(min_p=0.0, repetition_penalty=1.0, presence_penalty=-2.0, frequency_penalty=2.0)},
        {"sampling": Sampling(min_p=1.0, repetition_penalty=100.0, logit_bias=tuple((i, -100.0) for i in range(300)))},
        {"stops": StopRules(max_tokens=0), "output": OutputOptions(prompt_logprobs=0)},
        {"stops": StopRules(max_tokens=1, stop=("x",) * 16)},
        {"output": OutputOptions(logprobs=20, prompt_logprobs=20)},
        {"queue_timeout_s": 0.001},
    ],
)
def test_let_through(change: dict[str, Any]) -> None:
    check_request(replace(GOOD, **change))


def test_prompt_that_leaves_no_room() -> None:
    check_against_model(GOOD, [1] * 7, MODEL)
    with pytest.raises(ContextLengthExceededError) as caught:
        check_against_model(GOOD, [1] * 8, MODEL)
    assert caught.value.metadata == {"prompt_tokens": "8", "max_model_len": "8"}
    assert "at most 7" in caught.value.message and caught.value.field == "text.prompt"
    scored = replace(GOOD, stops=StopRules(max_tokens=0), output=OutputOptions(prompt_logprobs=0))
    check_against_model(scored, [1] * 8, MODEL)  # nothing new is asked for
    with pytest.raises(ContextLengthExceededError):
        check_against_model(scored, [1] * 9, MODEL)


def test_ids_in_the_vocabulary() -> None:
    tokens = replace(GOOD, prompt=TokenPrompt(ids=(1, 99, 100)))
    with pytest.raises(InvalidArgumentError) as caught:
        check_against_model(tokens, (1, 99, 100), MODEL)
    assert caught.value.field == "tokens.ids[2]" and "[0, 100)" in caught.value.message
    with pytest.raises(InvalidArgumentError) as caught:
        check_against_model(replace(GOOD, stops=StopRules(stop_token_ids=(5, -1))), [1], MODEL)
    assert caught.value.field == "stop.stop_token_ids[1]"
    for token in (-1, 100):
        with pytest.raises(InvalidArgumentError) as caught:
            check_against_model(replace(GOOD, sampling=Sampling(logit_bias=((99, 1.0), (token, 1.0)))), [1], MODEL)
        assert caught.value.field == f"sampling.logit_bias[{token}]" and "[0, 100)" in caught.value.message


def test_prompt_without_tokens() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_against_model(GOOD, [], MODEL)
    assert caught.value.field == "text.prompt"


def test_text_that_cannot_fit_is_not_even_tokenized() -> None:
    known = replace(MODEL, longest_token_bytes=5)
    check_text_length("text.prompt", "x" * 80, known)
    with pytest.raises(ContextLengthExceededError) as caught:
        check_text_length("text.prompt", "x" * 81, known)
    assert "81 characters" in caught.value.message and caught.value.metadata["max_model_len"] == "8"
    check_text_length("text.prompt", "x" * 81, MODEL)  # nothing is known of its tokens
