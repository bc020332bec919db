"""A job's numbers in TensorBoard's files, and a recorder whose package is not there."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lmesh_trainer import events
from lmesh_trainer.errors import JobError
from lmesh_trainer.recorders import Recorded, check_recorders
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def step(number: int, loss: float) -> events.StepDone:
    return events.StepDone(
        global_step=number,
        epoch=0.5,
        loss=loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        mean_token_accuracy=0.25,
        num_tokens=10 * number,
        tokens_per_second=5.0,
        step_time=2.0,
        peak_bytes=1,
    )


def record(folder: Path, kinds: tuple[str, ...], said: list[events.Event]) -> list[events.Event]:
    heard: list[events.Event] = []
    recorded = Recorded(heard.append, kinds, folder)
    for event in said:
        recorded(event)
    recorded.close()
    return heard


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


def test_event_files_have_what_was_told_and_a_resumed_job_replaces_its_steps(tmp_path: Path) -> None:
    evaluated = events.Evaluated(global_step=2, eval_loss=0.75, eval_mean_token_accuracy=0.5)
    said: list[events.Event] = [step(1, 4.0), step(2, 3.0), evaluated, step(3, 9.0)]
    assert record(tmp_path, ("tensorboard",), said) == said
    record(tmp_path, ("tensorboard",), [step(3, 2.0), step(4, 1.0)])
    assert scalars(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert scalars(tmp_path, "eval/loss") == [(2, 0.75)]
    assert scalars(tmp_path, "train/learning_rate")[0] == (1, 1e-3)


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    record(tmp_path, (), [step(1, 4.0)])
    assert not list(tmp_path.iterdir())


def test_a_run_of_weights_and_biases_has_the_job_s_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append(("log", (step, numbers["train/loss"])))

        def finish(self) -> None:
            calls.append(("finish", None))

    module = types.ModuleType("wandb")
    module.init = lambda **told: (calls.append(("init", told["id"])), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    record(tmp_path / "job-7", ("wandb",), [step(1, 4.0)])
    assert calls == [("init", "job-7"), ("log", (1, 4.0)), ("finish", None)]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(JobError, match=r"lmesh-trainer\[wandb\]") as caught:
        check_recorders(["tensorboard", "wandb"])
    assert caught.value.reason == "NOT_INSTALLED"
