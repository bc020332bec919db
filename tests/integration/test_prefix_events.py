"""What a real engine says of its prefix cache is what anyone else computes from the model's descriptor and the ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lmesh.scheduler.v1 import fleet_pb2
from lmesh.worker.v1 import run_pb2_grpc
from lmesh_chassis.channel import connect
from lmesh_kernels.blocks import granule_blocks, granule_hashes, root_hash
from lmesh_kernels.text.resolve import local_files
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.kv_changes import split_hashes
from lmesh_worker.messages import Params, Start

from tests.tiny_model import save_tiny_llama
from tests.worker_process import Gateway, start, until, worker_process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    settings = {"device": "cpu", "threads": 1, "kv_blocks": 12, "max_seqs": 4, "max_step_tokens": 64}
    made = Engine(EngineConfig(**settings, model_digest="d", weights_version=7), local_files(model))
    yield made
    made.close()


class Mirror:
    """Applies reports."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.steps: list[int] = []

    def run(self, engine: Engine, first: Start) -> list[int]:
        """Runs one sequence to its end; all its ids."""
        engine.add(first)
        ids = list(first.ids)
        while engine.has_work:
            if (report := engine.step()) is not None:
                added, removed = split_hashes(report.kv_added), split_hashes(report.kv_removed)
                self.known = (self.known | set(added)) - set(removed)
                self.steps.append(report.load.steps)
                ids += report.ids
        return ids


def granules(engine: Engine, ids: list[int], salt: str = "") -> set[bytes]:
    """What the scheduler computes; the last id's K and V are never computed."""
    root = root_hash(model_digest="d", weights_version=7, cache_salt=salt, kv_format=engine.kv_format)
    return set(granule_hashes(root, ids[:-1], block_size=16, granule=granule_blocks(16)))


@pytest.mark.parametrize(("block_size", "blocks"), [(1, 64), (8, 8), (16, 4), (24, 2), (32, 2), (64, 1), (128, 1)])
def test_a_granule_is_64_tokens_or_as_near_as_blocks_allow(block_size: int, blocks: int) -> None:
    assert granule_blocks(block_size) == blocks


def test_granules_come_and_go_with_their_blocks(engine: Engine) -> None:
    mirror = Mirror()
    assert engine.kv_format == "float32/16/nhd"
    ids = mirror.run(engine, Start(1, "r", 0, list(range(100)), 100, Params(max_tokens=40), "tenant-a"))
    assert len(ids) == 140
    first = granules(engine, ids, "tenant-a")
    assert mirror.known == first
    assert len(first) == 2  # 64 of the prompt, 128 with what was generated
    again = mirror.run(engine, Start(2, "r", 0, list(range(100)), 100, Params(max_tokens=2), "tenant-b"))
    assert mirror.known >= granules(engine, again, "tenant-b")
    assert not granules(engine, again, "tenant-a") & granules(engine, again, "tenant-b")
    # 12 blocks hold no third prompt of ten: the oldest go, and that is told.
    last = mirror.run(engine, Start(3, "r", 0, list(range(90, 250)), 160, Params(max_tokens=2)))
    assert granules(engine, last) <= mirror.known
    assert not first <= mirror.known
    everything = first | granules(engine, again, "tenant-b") | granules(engine, last)
    assert mirror.known == {found for found in everything if engine.pool.find(found) is not None}


def test_a_long_prompt_shows_progress_before_its_first_id(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps give nothing; silence would be taken for a stuck engine."""
    monkeypatch.setattr("lmesh_worker.engine.engine._QUIET_S", 0.0)
    mirror = Mirror()
    mirror.run(engine, Start(1, "r", 0, [i % 250 for i in range(180)], 180, Params(max_tokens=1)))
    assert mirror.steps == [1, 2, 3]


async def test_a_workers_deltas_are_what_its_descriptor_gives(model: Path) -> None:
    async with worker_process(model) as (scheduler, process):
        await until(lambda: bool(scheduler.hellos) or process.returncode is not None, timeout_s=90)
        (hello,) = scheduler.hellos
        async with connect(hello.address, retries=False) as channel:
            gateway = Gateway(run_pb2_grpc.RunServiceStub(channel).Run(timeout=120))
            await gateway.attach(hello.epoch)
            prompts = {1: list(range(70)), 2: list(range(70)), 3: list(range(200))}
            salts = {1: "", 2: "another", 3: ""}
            await gateway.start(
                *(start(slot, ids=ids, max_tokens=70, cache_salt=salts[slot]) for slot, ids in prompts.items())
            )
            await gateway.read_until_finished(*((slot, 100 + slot) for slot in prompts))
        expected = set()
        for slot, ids in prompts.items():
            root = root_hash(
                model_digest=hello.model.digest,
                weights_version=hello.model.weights_version,
                cache_salt=salts[slot],
                kv_format=hello.model.kv_format,
            )
            everything = [*ids, *gateway.received[slot, 100 + slot].ids][:-1]
            size, granule = hello.model.block_size, hello.model.kv_granule_blocks
            expected |= set(granule_hashes(root, everything, block_size=size, granule=granule))
        assert len(expected) == 2 + 2 + 4 - 1  # the first 64 tokens of 1 and 3 are the same granule
        await until(lambda: known(scheduler.deltas) == expected)


def known(deltas: list[fleet_pb2.KvDelta]) -> set[bytes]:
    held: set[bytes] = set()
    for delta in deltas:
        held = (set() if delta.snapshot else held) | set(split_hashes(delta.added))
        held -= set(split_hashes(delta.removed))
    return held
