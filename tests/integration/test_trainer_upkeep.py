"""What a trainer tells of itself, and what it throws away: its metrics page, its span, old jobs' folders."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx
import pytest
from lmesh_trainer.events import Ended, Outcome, Phase, PhaseBegun
from lmesh_trainer.job_folders import note_begun, note_ended
from lmesh_trainer.spans import RunSpan
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.mesh import free_ports
from tests.trainer_scene import Place, running_trainer
from tests.training_jobs import save_dataset, save_model
from tests.worker_process import until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, model, save_dataset(tmp_path / "chats.jsonl"))


async def metrics(port: int) -> dict[str, float]:
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"http://127.0.0.1:{port}/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def test_metrics(place: Place) -> None:
    (port,) = free_ports(1)
    async with running_trainer(place, metrics_port=port) as running:
        told = running.scheduler
        idle = await metrics(port)
        assert idle["lmesh:trainer_jobs_running"] == idle["lmesh:trainer_steps_total"] == 0
        told.acks = False
        key = told.start("job", 1, place.spec(max_steps=100_000, save_steps=2))
        other = told.start("other", 1, place.spec(max_steps=3))
        await told.stepped(key, 5)
        busy = await metrics(port)
        assert (busy["lmesh:trainer_jobs_running"], busy["lmesh:trainer_jobs_waiting"]) == (1, 1)
        assert busy["lmesh:trainer_reports_waiting"] >= 7  # phases, the dataset, the plan and five steps
        assert busy['lmesh:trainer_step{job_id="job"}'] >= 5
        for gauge in ("loss", "grad_norm", "tokens_per_second", "peak_bytes"):
            assert busy[f'lmesh:trainer_{gauge}{{job_id="job"}}'] > 0, gauge
        told.acks = True
        await told.commands.put(None)  # a new stream, on which all is said again
        told.ask(key, 1)
        await told.end(key)
        assert (await told.end(other)).state
        await until(lambda: not running.trainer.runs.held())
        after = await metrics(port)
        steps = len(told.losses(key)) + len(told.losses(other))
        assert after["lmesh:trainer_steps_total"] == after["lmesh:trainer_step_seconds_count"] == steps
        saved = len([*told.of(key, "checkpoint"), *told.of(other, "checkpoint")])
        assert after["lmesh:trainer_checkpoint_seconds_count"] == saved >= 3
        assert after["lmesh:trainer_checkpoint_seconds_sum"] > 0
        assert after["lmesh:trainer_trained_tokens_total"] > steps
        assert after["lmesh:trainer_skipped_updates_total"] == 0
        assert after['lmesh:trainer_jobs_ended_total{outcome="completed",reason=""}'] == 1
        assert after["lmesh:trainer_reports_waiting"] == after["lmesh:trainer_jobs_running"] == 0
        assert not [name for name in after if "job_id" in name]  # what has ended leaves no series


def test_span(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    span = RunSpan("job", 3)
    span.take(PhaseBegun(phase=Phase.TRAINING))
    span.take(Ended(outcome=Outcome.FAILED, reason="DISK_FULL"))
    span.end()
    (told,) = exporter.get_finished_spans()
    assert told.name == "trainer.run" and told.parent is None
    assert told.attributes == {"lmesh.job.id": "job", "lmesh.job.lease": 3, "lmesh.job.outcome": "failed"}
    assert [event.name for event in told.events] == ["training"]
    assert told.status.description == "DISK_FULL"


async def test_old_jobs_folders_go(place: Place) -> None:
    jobs = place.folder / "jobs"
    for name, days in (("old", 8), ("young", 6), ("done", 1), ("done-newer", 0.5)):
        note_begun(jobs / name)
        if name.startswith("done"):
            note_ended(jobs / name, Ended(outcome=Outcome.COMPLETED))
        for path in (jobs / name / "ended.json", jobs / name):
            if path.exists():
                os.utime(path, (time.time() - days * 86_400,) * 2)
    async with running_trainer(place, jobs=jobs, keep_jobs_days=7, keep_completed_jobs=1) as running:
        key = running.scheduler.start("young", 1, place.spec(max_steps=2))
        await running.scheduler.end(key)
        await until(lambda: {path.name for path in jobs.iterdir()} == {"young", "done-newer"})
        assert (jobs / "young" / "ended.json").read_text() == '{"outcome": "completed", "reason": ""}'
