"""The losses of small jobs as they were when somebody last looked: a change of training's numbers is seen as one.

tests/results/training-losses.json has them. Where a change is meant to move them,
`LMESH_WRITE_LOSSES=1 python -P -m pytest tests/integration/test_training_losses.py` writes them anew, and the commit
that does so says why they moved.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_trainer.events import Evaluated, Outcome, StepDone
from lmesh_trainer.spec import DatasetSpec, LoraSpec, OptimiserSpec

from tests.training_jobs import run, save_dataset, save_model, spec

RESULT = Path(__file__).parents[1] / "results" / "training-losses.json"
WRITING = os.environ.get("LMESH_WRITE_LOSSES") == "1"
STEPS = 10
# Another kind of CPU adds up in another order. Relative: with the instructions of AVX-512, AVX2 and SSE 4 losses were
# within 1.5e-7 of each other, and norms of gradients within 2.3e-6.
BOUND = 1e-5
COURSE = OptimiserSpec(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with dropout": {"lora": LoraSpec(r=4, lora_dropout=0.2)},
    "dora": {"lora": LoraSpec(r=4, use_dora=True)},
    "full": {"method": "full"},
    "nf4": {"load_in_4bit": True},
    "added tokens": {"add_tokens": ("surely",)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, dict[str, list[float]]]]:
    found: dict[str, dict[str, list[float]]] = {}
    yield found
    if WRITING and found.keys() == KINDS.keys():
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
        told = {"written with": versions, "relative bound": BOUND, "jobs": found}
        RESULT.write_text(json.dumps(told, indent=1) + "\n")


def course(model: Path, dataset: Path, folder: Path, kind: str) -> dict[str, list[float]]:
    """Losses, norms and evaluations of one job, in order."""
    rows = DatasetSpec(source=str(dataset), eval_rows=4)
    options = {"dataset": rows, "optimiser": COURSE, "max_steps": STEPS, "eval_steps": 5, "precision": "float32"}
    heard = run(spec(model, dataset, **(options | KINDS[kind])), folder)
    assert heard.ended.outcome is Outcome.COMPLETED, heard.ended
    return {
        "loss": heard.losses,
        "grad_norm": [step.grad_norm for step in heard.of(StepDone)],
        "eval_loss": [found.eval_loss for found in heard.of(Evaluated)],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_what_they_were(
    model: Path, dataset: Path, tmp_path: Path, kind: str, record: dict[str, dict[str, list[float]]]
) -> None:
    found = record[kind] = course(model, dataset, tmp_path / "job", kind)
    if WRITING:
        return
    wanted = json.loads(RESULT.read_text())["jobs"][kind]
    assert found.keys() == wanted.keys() and len(wanted["loss"]) == STEPS and wanted["eval_loss"]
    for name, numbers in wanted.items():
        assert found[name] == pytest.approx(numbers, rel=BOUND), (kind, name)


@pytest.mark.skipif(WRITING, reason="they are being written")
def test_what_is_written_tells_kinds_apart() -> None:
    """A bound that all of them met would see nothing: between any two kinds some number is far outside of it."""
    told = json.loads(RESULT.read_text())["jobs"]
    assert told.keys() == KINDS.keys()
    courses = {kind: told[kind]["loss"] + told[kind]["grad_norm"] for kind in KINDS}
    for kind, numbers in courses.items():
        assert told[kind]["loss"][-1] < told[kind]["loss"][0]
        for other in courses.keys() - {kind}:
            assert numbers != pytest.approx(courses[other], rel=30 * BOUND), (kind, other)
