"""The scheduler's metrics, read from its core when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmesh_scheduler.journal import Journal
from lmesh_scheduler.scheduler import Scheduler
from lmesh_scheduler.training.jobs import JobState
from lmesh_scheduler.training.office import Office


class SchedulerCollector(Collector):
    """Gauges and counters of one scheduler."""

    def __init__(self, scheduler: Scheduler, journal: Journal, office: Office) -> None:
        self._scheduler, self._journal, self._office = scheduler, journal, office

    def collect(self) -> Iterator[Metric]:
        """The current values."""
        scheduler, journal = self._scheduler, self._journal
        yield _gauge("lmesh:scheduler_requests_queued", "Requests that wait for a worker.", scheduler.placements.queued)
        yield _gauge("lmesh:scheduler_requests_live", "Requests that have not ended.", len(scheduler.requests))
        yield _gauge("lmesh:scheduler_gateways", "Gateways linked.", len(scheduler.gateways))
        yield _gauge("lmesh:scheduler_workers", "Workers known.", len(scheduler.fleet.workers()))
        yield _gauge("lmesh:scheduler_journal_ok", "1 when the journal took the last write.", int(journal.ok))
        yield _counter("lmesh:scheduler_placements", "Placements made.", scheduler.placements.made)
        yield _by_label(
            "lmesh:scheduler_requests_ended",
            "Requests that ended.",
            "state",
            {state.value: count for state, count in scheduler.requests.ended_by_state.items()},
        )
        yield _by_label(
            "lmesh:scheduler_requests_refused", "Requests not admitted.", "reason", dict(scheduler.refused_by_reason)
        )
        refused = scheduler.requests.refused_transitions
        yield _counter("lmesh:scheduler_refused_transitions", "State changes that the table does not have.", refused)
        yield _counter("lmesh:scheduler_journal_dropped", "States pushed out of a full buffer.", journal.dropped)
        yield _counter("lmesh:scheduler_journal_conflicts", "Records not as they were left.", journal.conflicts)
        yield from self._training()

    def _training(self) -> Iterator[Metric]:
        office = self._office
        trainers = len(office.desk.trainers.all())
        yield _gauge("lmesh:scheduler_trainers", "Trainers known.", trainers)
        states = Counter(job.state.value for job in office.desk.jobs.all())
        jobs = GaugeMetricFamily("lmesh:scheduler_jobs", "Training jobs, by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], states[state.value])
        yield jobs
        yield _gauge("lmesh:scheduler_adapters", "Versions of adapters that are published.", len(office.adapters.all()))
        mismatches = office.publisher.recipe_mismatches
        text = "Adapters published on another quantisation than they were trained on, as asked for."
        yield _counter("lmesh:scheduler_recipe_mismatches", text, mismatches)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by_label(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


@contextmanager
def exposed(registry: CollectorRegistry, scheduler: Scheduler, journal: Journal, office: Office) -> Iterator[None]:
    """The scheduler's metrics are among a registry's for as long as this lasts."""
    collector = SchedulerCollector(scheduler, journal, office)
    registry.register(collector)
    try:
        yield
    finally:
        registry.unregister(collector)
