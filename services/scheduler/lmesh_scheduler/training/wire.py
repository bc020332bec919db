"""lmesh.training.v1 and the trainers' link on one side, jobs and events on the other."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2 as pb

from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.catalog_wire import timestamp
from lmesh_scheduler.training.desk import Ended, Made, Report
from lmesh_scheduler.training.jobs import LIVE, Job, JobState, Place, StoredEvent
from lmesh_scheduler.training.trainers import Ack, Order, Query, RunAsk, Told, TrainerHello

_STATES = {state: pb.JobState.Value(f"JOB_STATE_{state.value}") for state in JobState}
_ENDS = {number: state for state, number in _STATES.items() if state not in LIVE}


def state_event(state: JobState, reason: str, message: str) -> bytes:
    """A change of state as an event."""
    changed = pb.StateChanged(state=_STATES[state], reason=reason, message=message)
    return pb.JobEvent(state=changed).SerializeToString()


def published_event(entry: Published, workers: int) -> bytes:
    """A publication as an event of the job that made it."""
    return pb.JobEvent(published=adapter_message(entry, workers)).SerializeToString()


def event_message(event: StoredEvent) -> pb.JobEvent:
    """An event as watchers get it."""
    message = pb.JobEvent.FromString(event.body)
    message.seq = event.seq
    if not message.HasField("time"):
        message.time.CopyFrom(timestamp(event.time))
    return message


def job_message(job: Job) -> pb.Job:
    """A job as clients get it."""
    return pb.Job(
        job_id=job.id,
        spec=pb.JobSpec.FromString(job.spec),
        publish_as=job.publish_as,
        state=_STATES[job.state],
        reason=job.reason,
        message=job.message,
        created=timestamp(job.created),
        changed=timestamp(job.changed),
        trainer_id=job.trainer_id,
        attempts=job.attempts,
        last_event=job.last_event,
        last_step=pb.Step.FromString(job.last_step) if job.last_step else None,
        artifact=job.artifact,
        adapter_digest=job.adapter_digest,
    )


def adapter_message(entry: Published, workers: int) -> pb.Adapter:
    """An adapter as clients get it; `workers` hold it now."""
    created: Timestamp = timestamp(entry.created)
    return pb.Adapter(
        name=entry.name,
        model=entry.model,
        version=entry.version,
        digest=entry.digest,
        artifact=entry.artifact,
        manifest=entry.manifest,
        job_id=entry.job_id,
        created=created,
        workers=workers,
        base_digest=entry.base_digest,
    )


def order_spec(job: Job) -> bytes:
    """The spec that a trainer is sent."""
    return placed(pb.JobSpec.FromString(job.spec), Place(job.source, job.start)).SerializeToString()


def placed(spec: pb.JobSpec, place: Place) -> pb.JobSpec:
    """The spec with the model and the adapter to go on from as a trainer finds them."""
    made = pb.JobSpec()
    made.CopyFrom(spec)
    made.model = place.source
    if place.start:
        made.lora.start = place.start
    return made


def hello_of(hello: trainers_pb2.TrainerHello) -> TrainerHello:
    """A trainer as it joins."""
    return TrainerHello(
        trainer_id=hello.trainer_id,
        epoch=hello.epoch,
        device=hello.device,
        slots=hello.slots,
        held=tuple((run.job_id, run.lease) for run in hello.held),
        rendezvous=hello.rendezvous,
    )


def report_of(report: trainers_pb2.RunReport) -> Report:
    """One report of a run."""
    event, kind = report.event, report.event.WhichOneof("event")
    made = Made(event.made.artifact, event.made.adapter_digest, event.made.manifest) if kind == "made" else None
    ended = None
    if kind == "state":
        state = _ENDS.get(event.state.state, JobState.FAILED)
        ended = Ended(state, event.state.reason, event.state.message)
    return Report(
        job_id=report.job_id,
        lease=report.lease,
        seq=report.seq,
        body=b"" if ended else event.SerializeToString(),
        step=event.step.SerializeToString() if kind == "step" else b"",
        made=made,
        ended=ended,
    )


def join_response(told: list[Told]) -> trainers_pb2.JoinResponse:
    """What a trainer is told, in one message."""
    response = trainers_pb2.JoinResponse()
    for one in told:
        if isinstance(one, Order):
            start = response.starts.add(job_id=one.job_id, lease=one.lease, spec=pb.JobSpec.FromString(one.spec))
            if one.gang is not None:
                start.gang.CopyFrom(trainers_pb2.Gang(**one.gang._asdict()))
        elif isinstance(one, RunAsk):
            wish = trainers_pb2.Wish.Value(f"WISH_{one.ask.value}")
            response.asks.add(job_id=one.job_id, lease=one.lease, wish=wish)
        elif isinstance(one, Ack):
            response.acks.add(job_id=one.job_id, lease=one.lease, seq=one.seq)
        elif isinstance(one, Query):
            response.queries.append(trainers_pb2.Query.FromString(one.body))
    return response
