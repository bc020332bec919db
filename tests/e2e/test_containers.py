"""The mesh as containers: what `docker compose up` promises, on a real engine. Building its images takes minutes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import httpx
import pytest
from lmesh.inference.v1 import inference_pb2 as pb

from tests.containers import ComposeMesh, docker, no_docker, running_containers
from tests.mesh import MODEL

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(no_docker()), reason=no_docker() or "docker answers"),
    pytest.mark.timeout(2000),
]
PROMPT = "The story of a mesh begins"
LENGTH = 160
LIST = "import importlib.metadata as m, json; print(json.dumps([d.name.lower() for d in m.distributions()]))"


@pytest.fixture(scope="module")
def running() -> Iterator[ComposeMesh]:
    with running_containers() as mesh:
        yield mesh


@pytest.fixture
def scaled(running: ComposeMesh) -> ComposeMesh:
    """Three workers, whatever the test before did to them."""
    running.compose("up", "--detach", "--wait", "--scale", "worker=3")
    return running


def long_request(request_id: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        text=pb.TextInput(prompt=PROMPT),
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=LENGTH, ignore_eos=True),
        request_id=request_id,
    )


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker", "trainer"])
class TestImage:
    def test_has_only_its_own_packages(self, running: ComposeMesh, service: str) -> None:
        names = set(json.loads(running.compose("exec", "-T", service, "python", "-c", LIST)))
        assert {n for n in names if n.startswith("lmesh")} == {
            "lmesh-protos",
            "lmesh-kernels",
            "lmesh-chassis",
            f"lmesh-{service}",
        }
        heavy = names & {"torch", "numpy", "gguf", "tokenizers", "datasets", "fastapi", "redis", "pytest", "hatchling"}
        assert (
            heavy
            == {
                "gateway": {"tokenizers", "fastapi", "redis"},
                "scheduler": {"redis"},
                "worker": {"torch", "numpy", "gguf", "tokenizers"},
                "trainer": {"torch", "numpy", "gguf", "tokenizers", "datasets"},
            }[service]
        )

    def test_runs_without_rights(self, running: ComposeMesh, service: str) -> None:
        tried = running.compose("exec", "-T", service, "sh", "-c", "id -u; touch /opt/lmesh/x 2>&1 || true")
        user, refusal = tried.splitlines()
        assert user == "10001"
        assert "Read-only file system" in refusal


def test_answers_over_http(running: ComposeMesh) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 20,
    }
    answer = httpx.post(f"{running.mesh.url}/v1/chat/completions", json=body, timeout=120).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_inner_services_are_not_published(running: ComposeMesh) -> None:
    for service in ("redis", "scheduler", "worker", "trainer"):
        (container, *_) = running.containers(service)
        assert not docker("port", container).strip()


def test_replicas_have_their_own_addresses(scaled: ComposeMesh) -> None:
    assert len(scaled.workers()) == 3


def test_a_killed_workers_stream_goes_on_elsewhere(scaled: ComposeMesh) -> None:
    request = long_request(str(uuid.uuid4()))
    ids: list[int] = []
    killed = ""
    with scaled.mesh.stub() as stub:
        undisturbed = [i for e in stub.Generate(long_request(), timeout=120) for i in e.delta.token_ids]
        for event in stub.Generate(request, timeout=120):
            ids += event.delta.token_ids
            if not killed and len(ids) >= LENGTH // 10:
                record = stub.GetRequest(pb.GetRequestRequest(request_id=request.request_id))
                killed = record.worker_id
                docker("kill", scaled.workers()[killed.removeprefix("worker-")])
        record = stub.GetRequest(pb.GetRequestRequest(request_id=request.request_id))
    assert killed
    assert ids == undisturbed
    assert record.state == pb.REQUEST_STATE_FINISHED
    assert record.worker_id != killed


def test_a_stopped_gateway_drains(scaled: ComposeMesh) -> None:
    """SIGTERM lets the streams end; the container then exits 0, before compose's patience ends."""
    (container,) = scaled.containers("gateway")
    with scaled.mesh.stub() as stub:
        call = stub.Generate(long_request(), timeout=120)
        first = next(e for e in call if e.delta.token_ids)
        docker("kill", "--signal", "TERM", container)
        ids = [*first.delta.token_ids, *(i for e in call for i in e.delta.token_ids)]
    assert len(ids) == LENGTH
    assert docker("wait", container).strip() == "0"
