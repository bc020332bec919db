"""The trainer's metrics: what its jobs do now, by job, and what this boot has done in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmesh_trainer.events import CheckpointSaved, Ended, Evaluated, Reported, StepDone

_SECOND_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Held:
    """What this trainer has in hand."""

    running: int  # jobs whose process is there
    waiting: int  # jobs that wait for a slot
    reports: int  # that the scheduler has not acknowledged
    left_out: int  # steps that were not kept for it, of the jobs in hand


class TrainerMetrics(Collector):
    """Counters and histograms are fed by what jobs say; a job's gauges are there for as long as it runs."""

    def __init__(self, held: Callable[[], Held], *, registry: CollectorRegistry = REGISTRY) -> None:
        self._held, self._registry = held, registry
        self._steps: dict[str, StepDone] = {}  # of a job, the latest
        self._evaluated: dict[str, Evaluated] = {}
        self._step_count = Counter("lmesh:trainer_steps", "Updates tried.", registry=registry)
        self._skipped = Counter("lmesh:trainer_skipped_updates", "Updates that were not finite.", registry=registry)
        self._tokens = Counter("lmesh:trainer_trained_tokens", "Trained tokens of all updates.", registry=registry)
        self._ended = Counter(
            "lmesh:trainer_jobs_ended",
            "Runs that ended, by outcome and reason.",
            ["outcome", "reason"],
            registry=registry,
        )
        self._removed = Counter("lmesh:trainer_job_folders_removed", "Old jobs' folders removed.", registry=registry)
        self._step_seconds = self._histogram("lmesh:trainer_step_seconds", "Duration of an update.")
        self._checkpoint_seconds = self._histogram(
            "lmesh:trainer_checkpoint_seconds", "Duration of writing a checkpoint, synced."
        )
        registry.register(self)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECOND_BUCKETS, registry=self._registry)

    def take(self, job_id: str, event: Reported) -> None:
        """Counts what a job has said."""
        match event:
            case StepDone():
                self._steps[job_id] = event
                self._step_count.inc()
                self._skipped.inc(not event.applied)
                self._tokens.inc(round(event.tokens_per_second * event.step_time))
                self._step_seconds.observe(event.step_time)
            case Evaluated():
                self._evaluated[job_id] = event
            case CheckpointSaved():
                self._checkpoint_seconds.observe(event.seconds)
            case Ended():
                self._ended.labels(event.outcome.value, event.reason).inc()

    def forget(self, job_id: str) -> None:
        """The job does not run here any more."""
        self._steps.pop(job_id, None)
        self._evaluated.pop(job_id, None)

    def removed(self, folders: int) -> None:
        """Old jobs' folders went."""
        self._removed.inc(folders)

    def describe(self) -> Iterable[Metric]:
        """The families, without asking anybody."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The gauges as they are now."""
        held, steps = self._held(), self._steps
        yield _gauge("lmesh:trainer_jobs_running", "Jobs with a process.", held.running)
        yield _gauge("lmesh:trainer_jobs_waiting", "Jobs that wait for a slot.", held.waiting)
        yield _gauge("lmesh:trainer_reports_waiting", "Reports not acknowledged yet.", held.reports)
        yield _gauge("lmesh:trainer_reports_left_out", "Steps not kept for a scheduler away.", held.left_out)
        yield _by_job("lmesh:trainer_step", "Updates of the job so far.", {j: s.global_step for j, s in steps.items()})
        yield _by_job("lmesh:trainer_loss", "Loss of the latest update.", {j: s.loss for j, s in steps.items()})
        evaluated = {j: e.eval_loss for j, e in self._evaluated.items()}
        yield _by_job("lmesh:trainer_eval_loss", "Loss of the held-out rows.", evaluated)
        norms = {j: s.grad_norm for j, s in steps.items()}
        yield _by_job("lmesh:trainer_grad_norm", "Gradients' norm before clipping.", norms)
        rates = {j: s.tokens_per_second for j, s in steps.items()}
        yield _by_job("lmesh:trainer_tokens_per_second", "Trained tokens a second, of the latest update.", rates)
        peaks = {j: s.peak_bytes for j, s in steps.items()}
        yield _by_job("lmesh:trainer_peak_bytes", "Most memory that the job's process has held.", peaks)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric((), value)
    return family


def _by_job(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("job_id",))
    for job_id, value in values.items():
        family.add_metric((job_id,), value)
    return family
