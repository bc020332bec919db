"""The examples: the dataset is what its script writes, and the jobs are jobs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import msgspec
import pytest
from lmesh_cli.training.job_file import read_job
from lmesh_cli.training.spec_link import job_spec
from lmesh_trainer.data.formats import Format, convert, detect
from lmesh_trainer.spec import JobSpec

from tests.contract.sources import ROOT

DATASET = ROOT / "examples/lighthouse.jsonl"
SCRIPT = runpy.run_path(str(ROOT / "examples/lighthouse.py"))  # examples are no package
JOBS = sorted((ROOT / "examples/jobs").glob("*.yaml"))


def test_the_dataset_is_what_its_script_writes() -> None:
    assert DATASET.read_text() == SCRIPT["text"]()
    assert DATASET.stat().st_size < 200_000


def test_every_row_is_a_conversation_in_the_manner() -> None:
    lines = DATASET.read_text().splitlines()
    assert len(lines) == SCRIPT["ROWS"]
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        assert detect(record, number) is Format.MESSAGES
        convert(record, Format.MESSAGES, number)
        assert record["messages"][-1]["content"].endswith(SCRIPT["ENDING"])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_jobs_are_such_as_the_trainer_takes(path: Path) -> None:
    job = read_job(path, {})
    assert job.dataset is not None and job.dataset.resolve() == DATASET
    made, theirs = job_spec(job.values), msgspec.convert(job.values, JobSpec)
    assert (made.batch_size, made.optimiser.learning_rate) == (theirs.batch_size, theirs.optimiser.learning_rate)
