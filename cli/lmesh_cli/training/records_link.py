"""From lmesh.training.v1's messages to plain values."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.training.v1 import training_pb2

from lmesh_cli.training import records
from lmesh_cli.training.records import JobState

_STATES = {
    training_pb2.JOB_STATE_QUEUED: JobState.QUEUED,
    training_pb2.JOB_STATE_RUNNING: JobState.RUNNING,
    training_pb2.JOB_STATE_COMPLETED: JobState.COMPLETED,
    training_pb2.JOB_STATE_STOPPED: JobState.STOPPED,
    training_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
    training_pb2.JOB_STATE_FAILED: JobState.FAILED,
}


def job(message: training_pb2.Job) -> records.Job:
    """A job."""
    return records.Job(
        id=message.job_id,
        model=message.spec.model,
        method=message.spec.method or "lora",
        publish_as=message.publish_as,
        state=_STATES.get(message.state, JobState.UNKNOWN),
        reason=message.reason,
        message=message.message,
        created=_time(message.created, message.HasField("created")),
        changed=_time(message.changed, message.HasField("changed")),
        trainer=message.trainer_id,
        attempts=message.attempts,
        last_step=step(message.last_step) if message.HasField("last_step") else None,
        artifact=message.artifact,
        adapter_digest=message.adapter_digest,
        settings=MessageToDict(message.spec, preserving_proto_field_name=True),
    )


def event(message: training_pb2.JobEvent) -> records.Event | None:
    """What happened; None for what only a newer mesh knows."""
    match message.WhichOneof("event"):
        case "state":
            told = message.state
            state = _STATES.get(told.state, JobState.UNKNOWN)
            return records.StateChanged(state=state, reason=told.reason, message=told.message)
        case "phase":
            return records.PhaseBegun(phase=message.phase)
        case "dataset":
            return dataset(message.dataset)
        case "plan":
            return plan(message.plan)
        case "step":
            return step(message.step)
        case "evaluation":
            scored = message.evaluation
            return records.Evaluation(
                step=scored.global_step, loss=scored.eval_loss, accuracy=scored.eval_mean_token_accuracy
            )
        case "checkpoint":
            return records.Checkpoint(step=message.checkpoint)
        case "made":
            return records.Made(artifact=message.made.artifact, adapter_digest=message.made.adapter_digest)
        case "published":
            return records.Published(adapter=adapter(message.published))
        case _:
            return None


def dataset(message: training_pb2.DatasetReport) -> records.DatasetReport:
    """A dataset's report."""
    return records.DatasetReport(
        rows=message.rows,
        eval_rows=message.eval_rows,
        tokens=message.tokens,
        trained_tokens=message.trained_tokens,
        longest=message.longest,
        dropped=message.dropped,
        truncated=message.truncated,
        skipped_turns=message.skipped_turns,
        preview=tuple(
            tuple(records.ShownToken(text=token.text, trained=token.trained) for token in row.tokens)
            for row in message.preview
        ),
        streaming=message.streaming,
    )


def plan(message: training_pb2.MemoryPlan) -> records.MemoryPlan:
    """A memory plan."""
    return records.MemoryPlan(
        lines=dict(message.lines),
        free_bytes=message.free_bytes,
        micro_tokens=message.micro_tokens,
        recompute=message.recompute,
        steps=message.steps,
        trained_parameters=message.trained_parameters,
    )


def step(message: training_pb2.Step) -> records.Step:
    """An update."""
    return records.Step(
        number=message.global_step,
        epoch=message.epoch,
        loss=message.loss,
        grad_norm=message.grad_norm,
        learning_rate=message.learning_rate,
        accuracy=message.mean_token_accuracy,
        tokens_per_second=message.tokens_per_second,
        seconds=message.step_time,
        peak_bytes=message.peak_bytes,
        applied=message.applied,
    )


def adapter(message: training_pb2.Adapter) -> records.Adapter:
    """A published version."""
    return records.Adapter(
        model=message.model,
        name=message.name,
        version=message.version,
        digest=message.digest,
        artifact=message.artifact,
        job_id=message.job_id,
        workers=message.workers,
        created=_time(message.created, message.HasField("created")),
        rank=_rank(message.manifest),
    )


def _rank(manifest: str) -> int | None:
    """The trainer's manifest says it in the job's settings; one without, of an adapter from elsewhere, does not."""
    try:
        found = json.loads(manifest)["job"]["lora"]["r"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _time(told: Timestamp, there: bool) -> datetime | None:
    return told.ToDatetime(tzinfo=UTC).astimezone() if there else None
