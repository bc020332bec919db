"""What a job is told: read from what people write, refused with the field named."""

from __future__ import annotations

import pytest
from lmesh_trainer.errors import JobError
from lmesh_trainer.schedule import Course, rate_factor
from lmesh_trainer.spec import read_spec

LEAST = "model: m\ndataset: {source: d.jsonl}\n"


def test_yaml_as_people_write_it() -> None:
    spec = read_spec(LEAST + "optimiser: {learning_rate: 2e-4, adam_epsilon: 1E-8}\nlora: {target_modules: [q_proj]}\n")
    assert spec.optimiser.learning_rate == 2e-4 and spec.optimiser.adam_epsilon == 1e-8
    assert spec.lora.target_modules == ("q_proj",) and spec.dataset.source == "d.jsonl"


def test_json_is_yaml() -> None:
    assert read_spec('{"model": "m", "dataset": {"source": "d.jsonl"}, "seed": 3}').seed == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected `object`"),
        ("model: m\n", "missing required field `dataset`"),
        (LEAST + "epoch: 3\n", "unknown field `epoch`"),
        (LEAST + "optimiser: {learning_rate: fast}\n", "learning_rate"),
        (LEAST + "optimiser: {learning_rate: 0}\n", "learning_rate must be positive"),
        (LEAST + "lora: {r: 0}\n", "r must be at least 1"),
        (LEAST + "lora: {lora_dropout: 1.0}\n", "lora_dropout"),
        (LEAST + "method: qlora\n", "method"),
        (LEAST + "batch_size: 0\n", "batch_size must be at least 1"),
        (LEAST + "early_stop_patience: 2\n", "needs dataset.eval_rows"),
        (LEAST + "epochs: -1\n", "epochs must be positive"),
        ("model: m\ndataset: {source: d.jsonl, streaming: true}\n", "dataset.streaming needs max_steps"),
        ("model: m\ndataset: {source: d.jsonl, shuffle_buffer_size: 9}\n", "shuffle_buffer_size needs streaming"),
        ("model: m\ndataset: {source: d, streaming: true, shuffle_buffer_size: -1}\n", "must be at least 0"),
        ("a: [", "line 1"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(JobError, match="(?i)" + said.replace("(", r"\(")) as caught:
        read_spec(text)
    assert caught.value.reason == "BAD_SPEC"


class TestSchedule:
    def test_warm_up_is_a_straight_line(self) -> None:
        assert [rate_factor(Course.CONSTANT, s, warmup_steps=4, total_steps=8) for s in (0, 1, 4, 7)] == [0, 0.25, 1, 1]

    def test_ends(self) -> None:
        for course in (Course.LINEAR, Course.COSINE):
            assert rate_factor(course, 4, warmup_steps=4, total_steps=8) == 1.0
            assert rate_factor(course, 6, warmup_steps=4, total_steps=8) == pytest.approx(0.5)
            assert rate_factor(course, 8, warmup_steps=4, total_steps=8) == pytest.approx(0.0)
            assert rate_factor(course, 9, warmup_steps=4, total_steps=8) == pytest.approx(0.0)
