"""Jobs over the wire: every field of the message is a field of the settings and back; events keep what they say."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor
from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2
from lmesh_trainer import events, job_link
from lmesh_trainer.errors import JobError
from lmesh_trainer.messages import Wish
from lmesh_trainer.orders import ExportOrder, InspectOrder, ValidateOrder
from lmesh_trainer.outbox import Report
from lmesh_trainer.queries import questions
from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec, OptimiserSpec, make_spec

PAIRS = [
    (training_pb2.JobSpec, JobSpec),
    (training_pb2.DatasetSpec, DatasetSpec),
    (training_pb2.LoraSpec, LoraSpec),
    (training_pb2.OptimiserSpec, OptimiserSpec),
]
OURS = {"device", "threads", "world"}  # the trainer's own settings, not a client's
# No value is its field's default.
EVERY: dict[str, Any] = {
    "model": "m",
    "dataset": {
        "source": "artifact:x/rows.csv",
        "split": "test",
        "format": "alpaca",
        "max_length": 77,
        "length_policy": "drop",
        "ignore_columns": ["a", "b"],
        "eval_rows": 3,
        "streaming": True,
        "shuffle_buffer_size": 64,
    },
    "method": "lora",
    "lora": {
        "r": 4,
        "lora_alpha": 9.5,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["o_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 2.5},
        "use_rslora": True,
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "start": "artifact:y",
    },
    "add_tokens": ["<place>", "<tide>"],
    "add_special_tokens": ["<|lamp|>"],
    "optimiser": {
        "optim": "adamw_8bit",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
    },
    "epochs": 2.5,
    "max_steps": 9,
    "batch_size": 3,
    "micro_tokens": 512,
    "load_in_4bit": True,
    "precision": "bf16",
    "recompute": "full",
    "seed": 11,
    "eval_steps": 4,
    "save_steps": 6,
    "keep_checkpoints": 5,
    "early_stop_patience": 2,
    "report_to": ["tensorboard", "wandb"],
    "parallelism": "ddp",
    "nodes": 2,
}


def message(values: dict[str, Any]) -> training_pb2.JobSpec:
    return training_pb2.JobSpec(**values)


def spec(**lora: Any) -> JobSpec:
    return make_spec(job_link.told(message({"model": "m", "dataset": {"source": "x"}, "lora": lora})))


@pytest.mark.parametrize(("sent", "ours"), PAIRS, ids=lambda pair: pair.__name__)
def test_the_names_are_the_same(sent: Any, ours: type[msgspec.Struct]) -> None:
    descriptor: Descriptor = sent.DESCRIPTOR
    assert {field.name for field in descriptor.fields} == set(ours.__struct_fields__) - OURS


def test_every_field_arrives() -> None:
    for sent, _ in PAIRS:  # nothing is left out of the example
        name = {"JobSpec": None}.get(sent.__name__, sent.__name__.removesuffix("Spec").lower())
        values = EVERY if name is None else EVERY[name]
        assert values.keys() == {field.name for field in sent.DESCRIPTOR.fields}
    found = json.loads(msgspec.json.encode(make_spec(job_link.told(message(EVERY)))))
    assert {name: value for name, value in found.items() if name not in OURS} == EVERY
    default = json.loads(msgspec.json.encode(make_spec({"model": "", "dataset": {"source": ""}})))
    same = [name for name in EVERY if default[name] == EVERY[name]]
    assert same == ["method", "parallelism"]  # neither full nor fsdp has NF4


def test_what_is_not_set_has_its_default_and_what_is_set_to_zero_is_zero() -> None:
    least = training_pb2.JobSpec(model="m", dataset=training_pb2.DatasetSpec(source="x"))
    assert make_spec(job_link.told(least)) == JobSpec(model="m", dataset=DatasetSpec(source="x"))
    least.optimiser.max_grad_norm = 0.0
    least.seed = 0
    least.lora.use_dora = False
    found = make_spec(job_link.told(least))
    assert found.optimiser.max_grad_norm == 0.0 and found.optimiser.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "all-linear"),
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["model.layers.0.self_attn.q_proj"], ("model.layers.0.self_attn.q_proj",)),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
    ],
)
def test_target_modules(names: list[str], found: object) -> None:
    assert spec(target_modules=names).lora.target_modules == found


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(JobError, match=r"\$\.lora\.|\$\.lora") as caught:
        spec(lora_dropout=1.5)
    assert caught.value.reason == "BAD_SPEC"
    with pytest.raises(JobError, match="dataset"):
        make_spec(job_link.told(training_pb2.JobSpec(model="m")))


def test_asks() -> None:
    wishes = {trainers_pb2.WISH_STOP: Wish.STOP, trainers_pb2.WISH_CANCEL: Wish.CANCEL, trainers_pb2.WISH_DROP: None}
    for sent, wish in wishes.items():
        found = job_link.ask(trainers_pb2.AskRun(job_id="j", lease=3, wish=sent))
        assert found is not None and (found.job_id, found.lease, found.wish) == ("j", 3, wish)
    assert job_link.ask(trainers_pb2.AskRun(job_id="j", lease=3)) is None


def test_queries() -> None:
    values = {field.name: field.name for field in trainers_pb2.ExportOrder.DESCRIPTOR.fields}
    export = trainers_pb2.Query(query_id=1, export=trainers_pb2.ExportOrder(**values))
    assert job_link.query_order(export) == ExportOrder(**values)
    assert job_link.query_order(trainers_pb2.Query(inspect_artifact="d")) == InspectOrder(artifact="d")
    validate = trainers_pb2.Query(validate=message(EVERY))
    assert job_link.query_order(validate) == ValidateOrder(told=EVERY)
    assert job_link.query_order(trainers_pb2.Query(query_id=4)) is None


class TestEvents:
    def sent(self, event: events.Reported) -> training_pb2.JobEvent:
        report = job_link.run_report("j", 7, Report(seq=3, time_ns=1_700_000_000_000_000_001, event=event))
        assert (report.job_id, report.lease, report.seq, report.event.seq) == ("j", 7, 3, 0)
        assert report.event.time.ToNanoseconds() == 1_700_000_000_000_000_001
        return report.event

    @pytest.mark.parametrize(
        ("ours", "sent"),
        [
            (events.StepDone, training_pb2.Step),
            (events.Evaluated, training_pb2.Evaluation),
            (events.PlanMade, training_pb2.MemoryPlan),
            (events.DatasetReady, training_pb2.DatasetReport),
            (events.TokenShown, training_pb2.TokenShown),
            (events.Stored, training_pb2.Made),
        ],
    )
    def test_the_names_are_the_same(self, ours: type[msgspec.Struct], sent: Any) -> None:
        assert set(ours.__struct_fields__) == {field.name for field in sent.DESCRIPTOR.fields}

    def test_values(self) -> None:
        assert self.sent(events.PhaseBegun(phase=events.Phase.TRAINING)).phase == "training"
        assert self.sent(events.CheckpointSaved(global_step=4, folder="/x")).checkpoint == 4
        made = self.sent(events.Stored(artifact="a", adapter_digest="d", manifest="{}")).made
        assert (made.artifact, made.adapter_digest, made.manifest) == ("a", "d", "{}")
        step = step_done(3, loss=float("nan"), applied=False)
        found = self.sent(step).step
        assert found.global_step == 3 and found.loss != found.loss and not found.applied

    @pytest.mark.parametrize("outcome", events.Outcome)
    def test_ends(self, outcome: events.Outcome) -> None:
        state = self.sent(events.Ended(outcome=outcome, reason="R", message="m")).state
        assert training_pb2.JobState.Name(state.state) == f"JOB_STATE_{outcome.name}"
        assert (state.reason, state.message) == ("R", "m")

    def test_a_long_preview_is_cut(self) -> None:
        row = [events.TokenShown(id=i, text="x", trained=i % 2 == 0) for i in range(20_000)]
        counts = dict.fromkeys(set(events.DatasetReady.__struct_fields__) - {"preview"}, 1)
        found = self.sent(events.DatasetReady(**counts, preview=[row, row[:2]])).dataset  # type: ignore[arg-type]
        assert [len(shown.tokens) for shown in found.preview] == [job_link.MOST_SHOWN, 2]
        assert [token.trained for token in found.preview[1].tokens] == [True, False]

    def test_folders_of_this_machine_are_not_told(self) -> None:
        with pytest.raises(ValueError, match="stored"):
            self.sent(events.Published(folder="/x", digest="d"))


def test_answers() -> None:
    refused = job_link.answer(9, questions.Refused(reason="R", message="m"))
    assert (refused.query_id, refused.failure.reason, refused.failure.message) == (9, "R", "m")
    exported = job_link.answer(9, questions.Exported(artifact="a", survival=0.5)).exported
    assert (exported.artifact, exported.survival) == ("a", 0.5)


def step_done(step: int, **values: Any) -> events.StepDone:
    numbers = dict.fromkeys(set(events.StepDone.__struct_fields__) - {"applied"}, 1)
    return events.StepDone(**{**numbers, "global_step": step, **values})
