"""The trainer's span: trainer.run for one lease of a job, from its order to its end."""

from __future__ import annotations

from lmesh_chassis import tracing
from opentelemetry.trace import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from lmesh_trainer.events import CheckpointSaved, Ended, Outcome, PhaseBegun, Reported


class RunSpan:
    """A root span: a job outlives the call that made it by hours. Phases and checkpoints are its events, never steps:
    of those there may be a hundred thousand.
    """

    def __init__(self, job_id: str, lease: int) -> None:
        attributes: dict[str, AttributeValue] = {"lmesh.job.id": job_id, "lmesh.job.lease": lease}
        self._span = tracing.start_span(tracing.TRAINER_RUN, attributes=attributes)

    def take(self, event: Reported) -> None:
        """What the run tells of itself."""
        match event:
            case PhaseBegun():
                self._span.add_event(event.phase.value)
            case CheckpointSaved():
                told = {"lmesh.job.step": event.global_step, "duration_us": round(event.seconds * 1e6)}
                self._span.add_event("checkpoint", told)
            case Ended():
                self._span.set_attribute("lmesh.job.outcome", event.outcome.value)
                if event.outcome is Outcome.FAILED:
                    self._span.set_status(Status(StatusCode.ERROR, event.reason))

    def end(self) -> None:
        """The run is over here; without an outcome it goes on elsewhere."""
        self._span.end()
