"""The trainer as a container, beside the mesh of `docker compose up`: it trains, is killed, and the mesh goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from lmesh.training.v1 import training_pb2 as pb

from tests.containers import ComposeMesh, docker, no_docker, running_containers
from tests.mesh import MODEL
from tests.training_client import TrainingClient

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(no_docker()), reason=no_docker() or "docker answers"),
    pytest.mark.timeout(2000),
]
IDS = [504 + 37 * i for i in range(24)]
STEPS = 8


@pytest.fixture(scope="module")
def running() -> Iterator[ComposeMesh]:
    with running_containers() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(running: ComposeMesh) -> Iterator[TrainingClient]:
    client = TrainingClient(running.mesh.target)
    yield client
    client.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    told = [{"prompt": f"{i} and one are", "completion": f" {i + 1}, said the keeper."} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


@pytest.fixture(scope="module")
def trained(client: TrainingClient, rows: Path) -> pb.Job:
    """A job that nothing disturbed, and what it made published as `keeper`."""
    job = client.ended(client.create(spec(client.upload(rows)), "keeper"))
    assert job.state == pb.JOB_STATE_COMPLETED, job
    return job


def spec(dataset: str) -> pb.JobSpec:
    return pb.JobSpec(
        model=MODEL,
        dataset=pb.DatasetSpec(source=dataset),
        lora=pb.LoraSpec(r=4),
        optimiser=pb.OptimiserSpec(learning_rate=2e-3),
        max_steps=STEPS,
        save_steps=1,
        batch_size=4,
    )


def kill(container: str) -> None:
    """As a crash does it: `docker kill` would count as a wish, and the container would stay down."""
    os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)


def at_step(client: TrainingClient, job_id: str, step: int) -> None:
    """Returns when the job has a checkpoint of that step."""
    assert any(event.checkpoint >= step for event in client.watch(job_id))


def holder(running: ComposeMesh, job_id: str) -> str:
    """The container whose process trains that job."""
    for container in running.containers("trainer"):
        seen = docker("exec", container, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        if f"/jobs/{job_id}" in seen:
            return container
    raise AssertionError(f"nobody trains {job_id}")


def test_one_command_trains_and_the_adapter_serves(running: ComposeMesh, rows: Path, client: TrainingClient) -> None:
    command = [sys.executable, "-P", "-m", "lmesh_cli.app", "train", "--model", MODEL, "--dataset", str(rows)]
    command += ["--name", "cli", "--max-steps", "2", "--address", running.mesh.target]
    done = subprocess.run(command, env=running.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{MODEL}:cli@1" in done.stdout
    assert len(client.generate(f"{MODEL}:cli", IDS, 8).ids) == 8


def test_the_adapter_changes_the_answers(client: TrainingClient, trained: pb.Job) -> None:
    assert client.generate(f"{MODEL}:keeper", IDS, 24).ids != client.generate(MODEL, IDS, 24).ids


def test_a_crashed_trainer_s_job_goes_on_by_itself(
    running: ComposeMesh, client: TrainingClient, trained: pb.Job
) -> None:
    """The container is started again, and its job given to it again, with the checkpoint that it left."""
    job = client.create(trained.spec)
    at_step(client, job, 2)
    kill(holder(running, job))
    ended = client.ended(job)
    assert ended.state == pb.JOB_STATE_COMPLETED and ended.attempts == 2, ended
    assert client.losses(job) == client.losses(trained.job_id)
    assert ended.adapter_digest == trained.adapter_digest


def test_another_trainer_goes_on_with_the_job_of_one_that_stays_away(
    running: ComposeMesh, client: TrainingClient, trained: pb.Job
) -> None:
    running.compose("up", "--detach", "--wait", "--scale", "trainer=2")
    assert len(running.containers("trainer")) == 2
    job = client.create(trained.spec)
    at_step(client, job, 2)
    gone = holder(running, job)
    docker("kill", gone)
    ended = client.ended(job)
    assert ended.state == pb.JOB_STATE_COMPLETED and ended.attempts == 2, ended
    assert client.losses(job) == client.losses(trained.job_id)
    assert gone not in running.containers("trainer")
    running.compose("up", "--detach", "--wait", "--scale", "trainer=1")


def test_adapters_serve_without_a_scheduler_and_after_it(
    running: ComposeMesh, client: TrainingClient, trained: pb.Job
) -> None:
    """Streams that run go on without it; new requests are told to try again, until the next one knows the adapter."""
    (scheduler,) = running.containers("scheduler")
    wanted = client.generate(f"{MODEL}:keeper", IDS, 96).ids
    call = client.stream(f"{MODEL}:keeper", IDS, 96)
    first = next(event for event in call if event.delta.token_ids)
    docker("kill", scheduler)
    assert [*first.delta.token_ids, *(i for event in call for i in event.delta.token_ids)] == wanted
    with pytest.raises(grpc.RpcError, match="try again") as caught:
        client.generate(f"{MODEL}:keeper", IDS, 96)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    docker("start", scheduler)
    assert answered(client, 30) == wanted


def answered(client: TrainingClient, timeout_s: float) -> list[int]:
    """What the adapter answers, as soon as it does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return client.generate(f"{MODEL}:keeper", IDS, 96).ids
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
