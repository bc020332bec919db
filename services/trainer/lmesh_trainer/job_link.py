"""Jobs as they go over the link: settings and questions in, events and answers out."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from google.protobuf.message import Message
from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2

from lmesh_trainer import events
from lmesh_trainer.messages import Wish
from lmesh_trainer.orders import Ask, ExportOrder, Gang, InspectOrder, QueryOrder, StartOrder, Told, ValidateOrder
from lmesh_trainer.outbox import Report
from lmesh_trainer.queries import questions

MOST_SHOWN = 8192  # tokens of a row of the preview; a longer row is shown to there
_NAME = re.compile(r"[\w.\-]+")
_WISHES = {trainers_pb2.WISH_STOP: Wish.STOP, trainers_pb2.WISH_CANCEL: Wish.CANCEL, trainers_pb2.WISH_DROP: None}
_STATES = {
    events.Outcome.COMPLETED: training_pb2.JOB_STATE_COMPLETED,
    events.Outcome.STOPPED: training_pb2.JOB_STATE_STOPPED,
    events.Outcome.CANCELLED: training_pb2.JOB_STATE_CANCELLED,
    events.Outcome.FAILED: training_pb2.JOB_STATE_FAILED,
}


def told(spec: training_pb2.JobSpec) -> Told:
    """The settings that the client set, by their names, which are those of `lmesh_trainer.spec.JobSpec`."""
    found = _plain(spec)
    for name in ("target_modules", "exclude_modules"):
        if modules := found.get("lora", {}).get(name):
            found["lora"][name] = _modules(modules)
    return found


def _plain(message: Message) -> Told:
    return {field.name: _value(value) for field, value in message.ListFields()}


def _value(value: Any) -> Any:  # noqa: ANN401 - of any field
    if isinstance(value, Message):
        return _plain(value)
    if isinstance(value, bool | int | float | str):
        return value
    return dict(value) if hasattr(value, "items") else list(value)


def _modules(names: list[str]) -> str | list[str]:
    """One element that is no module's name is all-linear or a regular expression, as PEFT has both as texts."""
    alone = names[0] if len(names) == 1 else ""
    return alone if alone == "all-linear" or (alone and not _NAME.fullmatch(alone)) else names


def start_order(start: trainers_pb2.StartRun) -> StartOrder:
    """A job to run."""
    gang = None
    if start.HasField("gang"):
        gang = Gang(node=start.gang.node, nodes=start.gang.nodes, rendezvous=start.gang.rendezvous)
    return StartOrder(job_id=start.job_id, lease=start.lease, told=told(start.spec), gang=gang)


def ask(asked: trainers_pb2.AskRun) -> Ask | None:
    """What a run is asked; None for a wish of a later version."""
    if asked.wish not in _WISHES:
        return None
    return Ask(job_id=asked.job_id, lease=asked.lease, wish=_WISHES[asked.wish])


def query_order(query: trainers_pb2.Query) -> QueryOrder | None:
    """A question; None for one of a later version."""
    match query.WhichOneof("question"):
        case "validate":
            return ValidateOrder(told=told(query.validate))
        case "inspect_artifact":
            return InspectOrder(artifact=query.inspect_artifact)
        case "export":
            names = [field.name for field in trainers_pb2.ExportOrder.DESCRIPTOR.fields]
            return ExportOrder(**{name: getattr(query.export, name) for name in names})
        case _:
            return None


def run_report(job_id: str, lease: int, report: Report) -> trainers_pb2.RunReport:
    """A report as it is sent."""
    event = training_pb2.JobEvent()
    event.time.FromNanoseconds(report.time_ns)
    _fill(event, report.event)
    return trainers_pb2.RunReport(job_id=job_id, lease=lease, seq=report.seq, event=event)


def _fill(event: training_pb2.JobEvent, happened: events.Reported) -> None:
    match happened:
        case events.PhaseBegun():
            event.phase = happened.phase.value
        case events.DatasetReady():
            event.dataset.CopyFrom(_dataset(happened))
        case events.PlanMade():
            event.plan.CopyFrom(training_pb2.MemoryPlan(**msgspec.structs.asdict(happened)))
        case events.StepDone():
            event.step.CopyFrom(training_pb2.Step(**msgspec.structs.asdict(happened)))
        case events.Evaluated():
            event.evaluation.CopyFrom(training_pb2.Evaluation(**msgspec.structs.asdict(happened)))
        case events.CheckpointSaved():
            event.checkpoint = happened.global_step
        case events.Stored():
            event.made.CopyFrom(training_pb2.Made(**msgspec.structs.asdict(happened)))
        case events.Ended():
            state = _STATES[happened.outcome]
            event.state.CopyFrom(
                training_pb2.StateChanged(state=state, reason=happened.reason, message=happened.message)
            )
        case events.Published():
            raise ValueError("a folder of this trainer's means nothing elsewhere: it is stored first")


def _dataset(found: events.DatasetReady) -> training_pb2.DatasetReport:
    counts = {name: value for name, value in msgspec.structs.asdict(found).items() if name != "preview"}
    report = training_pb2.DatasetReport(**counts)
    for row in found.preview:
        shown = [training_pb2.TokenShown(id=t.id, text=t.text, trained=t.trained) for t in row[:MOST_SHOWN]]
        report.preview.add(tokens=shown)
    return report


def answer(query_id: int, reply: questions.Reply) -> trainers_pb2.Answer:
    """An answer as it is sent."""
    found = trainers_pb2.Answer(query_id=query_id)
    match reply:
        case questions.Validated():
            found.validated.dataset.CopyFrom(_dataset(reply.dataset))
            found.validated.plan.CopyFrom(training_pb2.MemoryPlan(**msgspec.structs.asdict(reply.plan)))
        case questions.Exported():
            found.exported.CopyFrom(training_pb2.ExportResponse(artifact=reply.artifact, survival=reply.survival))
        case questions.Inspected():
            found.inspected.CopyFrom(training_pb2.Made(**msgspec.structs.asdict(reply)))
        case questions.Refused():
            found.failure.CopyFrom(trainers_pb2.Failure(reason=reply.reason, message=reply.message))
        case questions.Probed():
            raise ValueError("nobody outside asks for the device")
    return found
