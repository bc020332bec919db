"""What a mesh that went down knows when it is up again: published adapters, jobs, and the job that it was busy with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from lmesh.training.v1 import training_pb2 as pb

from tests import training_jobs
from tests.mesh import Mesh, running_mesh
from tests.training_client import TrainingClient

MODEL = "tiny"
IDS = [(7 * i) % 250 for i in range(30)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_jobs.save_model(tmp_path_factory.mktemp("base"))


@contextmanager
def up(folder: Path, base: Path) -> Iterator[tuple[Mesh, TrainingClient]]:
    env = {"LMESH_TRAINER_THREADS": "1", "LMESH_WORKER_THREADS": "1"}
    with running_mesh(folder, "--model", f"{MODEL}={base}", "--trainers", "1", **env) as mesh:
        client = TrainingClient(mesh.target)
        try:
            yield mesh, client
        finally:
            client.close()


def spec(dataset: str, steps: int) -> pb.JobSpec:
    return pb.JobSpec(
        model=MODEL,
        dataset=pb.DatasetSpec(source=dataset),
        optimiser=pb.OptimiserSpec(learning_rate=1e-2),
        max_steps=steps,
        save_steps=5,
        batch_size=5,
        micro_tokens=200,
    )


def served(client: TrainingClient) -> list[int]:
    """What the adapter answers, once the worker that has just joined holds it."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return client.generate(f"{MODEL}:mine", IDS, 24).ids
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE), error
            assert time.monotonic() < deadline, error
            time.sleep(0.1)


def test_adapters_and_jobs_outlive_the_mesh(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = training_jobs.save_dataset(tmp_path / "rows.jsonl")
    with up(run, base) as (_, client):
        dataset = client.upload(rows)
        first = client.create(spec(dataset, 20), "mine")
        assert client.ended(first).state == pb.JOB_STATE_COMPLETED
        unbroken = client.ended(client.create(spec(dataset, 150)))
        answer, plain = served(client), client.generate(MODEL, IDS, 24).ids
        assert answer != plain
        told = [event.seq for event in client.watch(first)]
        broken = client.create(unbroken.spec)
        for event in client.watch(broken):
            if event.checkpoint >= 10:
                break
    with up(run, base) as (mesh, client):
        assert served(client) == answer
        (adapter,) = client.training.ListAdapters(pb.ListAdaptersRequest(), timeout=30).adapters
        assert (adapter.name, adapter.version, adapter.job_id) == ("mine", 1, first)
        assert [event.seq for event in client.watch(first)] == told
        ended = client.ended(broken)  # drained with a checkpoint, and gone on with by itself
        assert ended.state == pb.JOB_STATE_COMPLETED, ended
        assert ended.adapter_digest == unbroken.adapter_digest
        assert client.losses(broken) == client.losses(unbroken.job_id)
        os.kill(int(str(mesh.state()["pid"])), signal.SIGKILL)  # its services go with it: nothing is said good-bye to
        time.sleep(1)
    with up(run, base) as (_, client):
        assert served(client) == answer
        assert client.training.GetJob(pb.GetJobRequest(job_id=broken), timeout=30).job.state == pb.JOB_STATE_COMPLETED
