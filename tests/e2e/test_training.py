"""From a dataset to a served adapter through the public API, on real processes: parity, many at once, crashes, ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lmesh.training.v1 import training_pb2 as pb
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.resolve import local_files

from tests import training_jobs
from tests.mesh import Mesh, running_mesh
from tests.training_client import TrainingClient

CPU = torch.device("cpu")
MODEL = "tiny"
NAMES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_jobs.save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def mesh(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    run = tmp_path_factory.mktemp("run")
    env = {"LMESH_TRAINER_THREADS": "1", "LMESH_WORKER_THREADS": "1"}
    with running_mesh(run, "--model", f"{MODEL}={base}", "--trainers", "1", **env) as running:
        yield running


@pytest.fixture
def client(mesh: Mesh) -> Iterator[TrainingClient]:
    client = TrainingClient(mesh.target)
    yield client
    client.close()


@pytest.fixture(scope="module")
def dataset(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = training_jobs.save_dataset(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    client = TrainingClient(mesh.target)
    try:
        return client.upload(rows)
    finally:
        client.close()


@pytest.fixture(scope="module")
def adapters(mesh: Mesh, dataset: str) -> dict[str, pb.Adapter]:
    """Four adapters of different ranks, trained and published one after the other."""
    client = TrainingClient(mesh.target)
    try:
        jobs = {name: client.create(spec(dataset, rank=2 + 3 * i, seed=i), name) for i, name in enumerate(NAMES)}
        for name, job_id in jobs.items():
            job = client.ended(job_id)
            assert job.state == pb.JOB_STATE_COMPLETED, f"{name}: {job.reason} {job.message}"
        found = client.training.ListAdapters(pb.ListAdaptersRequest(model=MODEL), timeout=30).adapters
        return {adapter.name: adapter for adapter in found}
    finally:
        client.close()


def spec(dataset: str, *, rank: int = 8, steps: int = 20, **fields: Any) -> pb.JobSpec:
    return pb.JobSpec(
        model=MODEL,
        dataset=pb.DatasetSpec(source=dataset),
        lora=pb.LoraSpec(r=rank),
        optimiser=pb.OptimiserSpec(learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2),
        max_steps=steps,
        batch_size=5,
        micro_tokens=200,
        **fields,
    )


def prompt(key: int, length: int) -> list[int]:
    return [(11 * key + 5 * i + i * i) % 250 for i in range(length)]


def reason_of(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None, error
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    raise AssertionError(f"no ErrorInfo in {status}")


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), reason_of(caught.value)


def folder_of(client: TrainingClient, artifact: str, target: Path) -> Path:
    """A folder artifact's files."""
    for file in json.loads(client.download(artifact))["files"]:
        path = target / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.download(file["digest"]))
    return target


def trainer_pid(mesh: Mesh) -> int:
    """Of the trainer's server process."""
    pid = int(mesh.state()["pid"])  # type: ignore[call-overload]
    (found,) = [p for p in psutil.Process(pid).children(recursive=True) if _runs(p, "lmesh_trainer")]
    return found.pid


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def test_trained_and_served_alike(
    client: TrainingClient, base: Path, adapters: dict[str, pb.Adapter], tmp_path: Path
) -> None:
    """Ten prompts in chunks and 64 decoded tokens each, by the trainer's code and by the worker's, through the API."""
    adapter = adapters["three"]
    folder = folder_of(client, adapter.artifact, tmp_path / "adapter")
    decoder = load_model(local_files(base), dtype=torch.float32, device=CPU)
    live = TrainableAdapter(
        read_adapter(folder, decoder.config), decoder.config, precision=Precision.FLOAT32, device=CPU
    )
    moved = []
    for key in range(10):
        ids = prompt(key, 40 + 20 * key)
        served = client.generate(f"{MODEL}:three", ids, 64, scored=True)
        whole = ids + served.ids
        batch = pack_batch([Segment(row=0, ids=whole, weights=[1.0] * len(whole))], CPU)
        trained = TrainingPass(decoder, adapters=live.products).logprobs(batch)[:-1]
        plain = TrainingPass(decoder, adapters={}).logprobs(batch)[:-1]
        assert len(served.ids) == 64 and len(served.logprobs) == len(trained)
        assert float((trained - torch.tensor(served.logprobs)).abs().max()) < 1e-4
        moved.append(float((trained - plain).mean()))
    assert abs(sum(moved) / len(moved)) > 0.1


def test_the_manifest_says_where_it_comes_from(adapters: dict[str, pb.Adapter]) -> None:
    told = json.loads(adapters["one"].manifest)
    assert told["base"]["digest"] == adapters["one"].base_digest
    assert told["job"]["lora"]["r"] == 2 and len(told["data_digest"]) == 64


def test_sixteen_chats_over_four_adapters_and_the_base(client: TrainingClient, adapters: dict[str, pb.Adapter]) -> None:
    models = [MODEL, *(f"{MODEL}:{name}" for name in adapters)]
    asked = [(models[i % len(models)], prompt(i, 10 + 7 * i)) for i in range(16)]
    alone = [client.generate(model, ids, 24).ids for model, ids in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: client.generate(*one, 24).ids, asked))
    assert together == alone
    same = prompt(99, 64)
    assert len({tuple(client.generate(model, same, 24).ids) for model in models}) == len(models)


def test_no_prefix_is_shared_between_adapters(client: TrainingClient, adapters: dict[str, pb.Adapter]) -> None:
    ids = prompt(77, 128)
    for model in [MODEL, *(f"{MODEL}:{name}" for name in adapters)]:
        assert client.generate(model, ids, 1).cached_tokens == 0
        assert client.generate(model, ids, 1).cached_tokens == 112


def test_a_new_version_under_load(client: TrainingClient, adapters: dict[str, pb.Adapter]) -> None:
    """Streams that run keep their version; what comes after the publication has the new one; nothing is dropped."""
    job, length = adapters["one"].job_id, 300  # tokens: a publication is to come amid them
    prompts = [prompt(200 + i, 20) for i in range(8)]
    before = [client.generate(f"{MODEL}:two", ids, length).ids for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        calls = [client.stream(f"{MODEL}:two", ids, length) for ids in prompts]
        first = [next(iter(call)) for call in calls]
        assert all(event.WhichOneof("event") == "accepted" for event in first)
        running = [pool.submit(lambda c=call: [i for e in c for i in e.delta.token_ids]) for call in calls]
        published = client.training.PublishAdapter(pb.PublishAdapterRequest(name="two", job_id=job), timeout=60).adapter
        still = [not one.done() for one in running]
        assert any(still), f"streams had ended before the publication: {still}"
        assert (published.version, published.workers) == (2, 1)
        after = client.generate(f"{MODEL}:two", prompts[0], 32).ids
        told = [one.result() for one in running]
    assert told == before and {len(ids) for ids in told} == {length}
    assert client.generate(f"{MODEL}:two@1", prompts[0], 32).ids == before[0][:32]
    assert client.generate(f"{MODEL}:two@2", prompts[0], 32).ids == after
    assert after != before[0][:32]


def test_the_models_list_has_adapters(mesh: Mesh, client: TrainingClient, adapters: dict[str, pb.Adapter]) -> None:
    listed = {model["id"]: model for model in httpx.get(f"{mesh.url}/v1/models", timeout=10).json()["data"]}
    assert {MODEL, *(f"{MODEL}:{name}" for name in adapters)} <= set(listed)
    body = {"model": f"{MODEL}:one", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=30).json()
    assert answer["model"] == f"{MODEL}:one" and answer["usage"]["completion_tokens"] > 0


def test_the_same_job_twice_is_one(client: TrainingClient, dataset: str) -> None:
    wanted = spec(dataset, steps=2)
    assert client.create(wanted, job_id="twice") == client.create(wanted, job_id="twice") == "twice"
    other = lambda: client.create(spec(dataset, steps=3), job_id="twice")  # noqa: E731
    assert refused(other) == (grpc.StatusCode.ALREADY_EXISTS, "JOB_EXISTS")
    client.training.CancelJob(pb.CancelJobRequest(job_id="twice"), timeout=30)
    assert client.ended("twice").state == pb.JOB_STATE_CANCELLED


@pytest.fixture(scope="module")
def unbroken(mesh: Mesh, dataset: str) -> pb.Job:
    client = TrainingClient(mesh.target)
    try:
        return client.ended(client.create(spec(dataset, steps=60, save_steps=5)))
    finally:
        client.close()


def test_a_killed_trainer_s_job_goes_on_by_itself(mesh: Mesh, client: TrainingClient, unbroken: pb.Job) -> None:
    job = client.create(unbroken.spec)
    for event in client.watch(job):
        if event.checkpoint >= 10:
            break
    os.kill(trainer_pid(mesh), signal.SIGKILL)
    ended = client.ended(job)
    assert ended.state == pb.JOB_STATE_COMPLETED and ended.attempts == 2, ended
    assert client.losses(job) == client.losses(unbroken.job_id)
    seqs = [event.seq for event in client.watch(job)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert ended.adapter_digest == unbroken.adapter_digest


def test_stop_resume_and_cancel(client: TrainingClient, dataset: str, unbroken: pb.Job) -> None:
    job = client.create(unbroken.spec)
    for event in client.watch(job):
        if event.step.global_step >= 3:
            client.training.StopJob(pb.StopJobRequest(job_id=job), timeout=30)
            break
    assert client.ended(job).state == pb.JOB_STATE_STOPPED
    client.training.ResumeJob(pb.ResumeJobRequest(job_id=job), timeout=30)
    assert client.ended(job).state == pb.JOB_STATE_COMPLETED
    assert client.losses(job) == client.losses(unbroken.job_id)
    again = lambda: client.training.ResumeJob(pb.ResumeJobRequest(job_id=job), timeout=30)  # noqa: E731
    assert refused(again) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    third = client.create(spec(dataset, steps=5000))
    client.training.CancelJob(pb.CancelJobRequest(job_id=third), timeout=30)
    assert client.ended(third).state == pb.JOB_STATE_CANCELLED


def test_a_course_that_blows_up_is_named(client: TrainingClient, dataset: str) -> None:
    wanted = spec(dataset, save_steps=1)
    wanted.optimiser.learning_rate = 1e38
    ended = client.ended(client.create(wanted, "never"))
    assert (ended.state, ended.reason, ended.attempts) == (pb.JOB_STATE_FAILED, "NON_FINITE_LOSS", 1), ended
    steps = [event.step for event in client.watch(ended.job_id) if event.WhichOneof("event") == "step"]
    assert [step.applied for step in steps[-3:]] == [False] * 3
    listed = client.training.ListAdapters(pb.ListAdaptersRequest(), timeout=30).adapters
    assert "never" not in {adapter.name for adapter in listed}


def test_a_job_goes_on_from_a_published_adapter(
    client: TrainingClient, dataset: str, adapters: dict[str, pb.Adapter]
) -> None:
    first = client.losses(adapters["one"].job_id)
    wanted = spec(dataset, steps=3)
    wanted.lora.start = "one@1"
    job = client.create(wanted)
    assert client.ended(job).state == pb.JOB_STATE_COMPLETED
    assert client.losses(job)[1] < first[1] / 2
    wanted.lora.start = "nobody"
    assert refused(lambda: client.create(wanted)) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


def test_what_is_wrong_is_said_before_anything_runs(client: TrainingClient, dataset: str, tmp_path: Path) -> None:
    validate = lambda wanted: client.training.ValidateJob(pb.ValidateJobRequest(spec=wanted), timeout=120)  # noqa: E731
    found = validate(spec(dataset))
    assert found.dataset.rows == 24 and found.plan.steps == 20 and found.plan.trained_parameters > 0
    assert any(token.trained for token in found.dataset.preview[0].tokens)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"text": "other"}\n')
    bad_rows = client.upload(broken)
    bad_rank = spec(dataset)
    bad_rank.lora.r = 0
    for wanted in (spec(bad_rows), bad_rank, spec("/etc/passwd")):
        code, reason = refused(lambda w=wanted: validate(w))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and reason
    job = client.ended(client.create(wanted))  # unasked, it fails with the same
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, reason) and job.message
    path = spec(dataset)
    path.model = "/models/secret"
    for wanted in (pb.JobSpec(model=MODEL), path):
        create = lambda w=wanted: client.create(w)  # noqa: E731
        assert refused(create) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


def test_a_model_with_added_tokens_is_served(mesh: Mesh, client: TrainingClient, dataset: str, tmp_path: Path) -> None:
    """Tokens that the base does not have: shown, trained, exported, served by another mesh as they were trained."""
    wanted = spec(dataset, add_tokens=["surely"], add_special_tokens=["please"])
    shown = client.training.ValidateJob(pb.ValidateJobRequest(spec=wanted), timeout=120).dataset.preview[0].tokens
    assert [(token.id, token.text, token.trained) for token in shown if token.id > 257] == [(258, "surely", True)]
    named = lambda: client.create(wanted, "adapter")  # noqa: E731
    assert refused(named) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    job = client.ended(client.create(wanted))
    assert job.state == pb.JOB_STATE_COMPLETED and job.artifact and not job.adapter_digest, job.message
    as_adapter = lambda: client.training.PublishAdapter(  # noqa: E731
        pb.PublishAdapterRequest(name="none", job_id=job.job_id), timeout=60
    )
    assert refused(as_adapter) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE")
    made = local_files(folder_of(client, job.artifact, tmp_path / "made"))
    trained = TrainingPass(load_model(made, dtype=torch.float32, device=CPU))
    out = tmp_path / "out"
    told = mesh.cli("export", "--job", job.job_id, "--format", "merged", "--dtype", "float32", "--out", str(out))
    assert told.returncode == 0, told.stderr
    with running_mesh(tmp_path / "run", "--model", f"grown={out}", LMESH_WORKER_THREADS="1") as other:
        theirs = TrainingClient(other.target)
        for key in range(4):
            ids = [258, *prompt(key, 50), 259, 258]
            served = theirs.generate("grown", ids, 32, scored=True)
            whole = ids + served.ids
            batch = pack_batch([Segment(row=0, ids=whole, weights=[1.0] * len(whole))], CPU)
            found = trained.logprobs(batch)[:-1]
            assert float((found - torch.tensor(served.logprobs)).abs().max()) < 1e-4
        theirs.close()
        body = {"model": "grown", "prompt": "please, surely", "max_tokens": 2, "temperature": 0}
        answer = httpx.post(f"{other.url}/v1/completions", json=body, timeout=30).json()
        assert answer["usage"]["prompt_tokens"] == 4  # two letters between two added tokens


def test_a_deleted_adapter_is_gone(client: TrainingClient, adapters: dict[str, pb.Adapter]) -> None:
    long = client.stream(f"{MODEL}:four", prompt(1, 30), 300)
    next(iter(long))
    client.training.DeleteAdapter(pb.DeleteAdapterRequest(model=MODEL, name="four"), timeout=30)
    assert len([i for event in long for i in event.delta.token_ids]) == 300  # what runs ends as it would have
    deadline = time.monotonic() + 10
    while True:
        code, reason = refused(lambda: client.generate(f"{MODEL}:four", prompt(1, 30), 4))
        if code is grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
            break
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
