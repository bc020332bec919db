"""A worker with a real engine holds the adapters that its scheduler orders, from the artifact store."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmesh.scheduler.v1 import fleet_pb2
from lmesh_chassis.artifacts.folders import put_folder
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_kernels.lora.factors import content_digest
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.models.hf_config import hf_config
from transformers import AutoModelForCausalLM

from tests.kernels.training_peer import with_adapter
from tests.tiny_model import save_tiny_llama
from tests.worker_process import until, worker_process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stored(model: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """The store's folder, an adapter's content digest and its artifact."""
    with_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    digest = content_digest(read_adapter(tmp_path / "adapter", hf_config(model)))
    return tmp_path / "store", digest, put_folder(FolderStore(tmp_path / "store"), tmp_path / "adapter")


async def test_orders_are_obeyed_and_told(model: Path, stored: tuple[Path, str, str], tmp_path: Path) -> None:
    store, digest, artifact = stored
    async with worker_process(model, artifacts=str(store)) as (scheduler, _):
        await until(lambda: scheduler.hellos, timeout_s=60)
        assert not scheduler.hellos[0].adapters
        states = lambda: [state for request in scheduler.requests for state in request.adapters]  # noqa: E731
        loads = [
            fleet_pb2.LoadAdapter(digest=digest, artifact=artifact),
            fleet_pb2.LoadAdapter(digest="0" * 64, artifact=artifact),
            fleet_pb2.LoadAdapter(digest="1" * 64, artifact="2" * 64),
        ]
        await scheduler.commands.put(fleet_pb2.FleetResponse(load_adapters=loads))
        await until(lambda: len(states()) == 3, timeout_s=60)
        found = {state.digest: (state.held, state.reason) for state in states()}
        assert found == {
            digest: (True, ""),
            "0" * 64: (False, "ADAPTER_DIGEST_MISMATCH"),
            "1" * 64: (False, "UNKNOWN_ARTIFACT"),
        }
        await scheduler.commands.put(None)  # the link breaks: a new scheduler hears what is held
        await until(lambda: len(scheduler.hellos) == 2)
        assert scheduler.hellos[1].adapters == [digest]
        await scheduler.commands.put(fleet_pb2.FleetResponse(drop_adapters=[digest]))
        await until(lambda: len(states()) == 4)
        assert (states()[-1].digest, states()[-1].held) == (digest, False)


async def test_without_a_store_it_says_so(model: Path, stored: tuple[Path, str, str]) -> None:
    _, digest, artifact = stored
    async with worker_process(model) as (scheduler, _):
        await until(lambda: scheduler.hellos, timeout_s=60)
        load = fleet_pb2.LoadAdapter(digest=digest, artifact=artifact)
        await scheduler.commands.put(fleet_pb2.FleetResponse(load_adapters=[load]))
        await until(lambda: any(request.adapters for request in scheduler.requests))
        (state,) = [state for request in scheduler.requests for state in request.adapters]
        assert (state.held, state.reason) == (False, "ARTIFACTS_DISABLED")
