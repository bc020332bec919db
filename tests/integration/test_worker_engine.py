"""The worker as it is deployed: `python -m lmesh_worker` with the real engine on a tiny random Llama."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from lmesh.worker.v1 import run_pb2_grpc
from lmesh_chassis.channel import connect
from lmesh_kernels.text.digests import model_digest, text_digest
from lmesh_kernels.text.resolve import resolve
from transformers import LlamaForCausalLM

from tests.tiny_model import save_tiny_llama
from tests.worker_process import ABORTED, LENGTH, Gateway, child_of, start, until, worker_process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def greedy(model: Path, ids: list[int], count: int) -> list[int]:
    """What transformers continues with."""
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for _ in range(count):
            ids = [*ids, int(network(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


async def test_real_tokens_abort_and_drain(model: Path) -> None:
    files = resolve(str(model))
    async with worker_process(model) as (scheduler, process):
        await until(lambda: bool(scheduler.hellos) or process.returncode is not None, timeout_s=90)
        (hello,) = scheduler.hellos
        assert (hello.model.id, hello.model.digest, hello.model.text_digest) == (
            "tiny",
            model_digest(files),
            text_digest(files),
        )
        assert (hello.model.max_model_len, hello.model.vocab_size, hello.capacity.kv_blocks) == (512, 258, 64)
        async with connect(hello.address, retries=False) as channel:
            gateway = Gateway(run_pb2_grpc.RunServiceStub(channel).Run(timeout=120))
            await gateway.attach(hello.epoch)
            prompts = {1: [72, 101, 108, 108, 111], 2: list(range(100))}
            long = start(3, ids=[5, 6, 7], max_tokens=500)
            await gateway.start(long, *(start(slot, ids=ids, max_tokens=12) for slot, ids in prompts.items()))
            await gateway.read()
            await gateway.abort(3, 103)
            await gateway.read_until_finished((1, 101), (2, 102), (3, 103))
            assert gateway.received[3, 103].finish == ABORTED
            for slot, ids in prompts.items():
                assert gateway.received[slot, 100 + slot].ids == greedy(model, ids, 12)
                assert gateway.received[slot, 100 + slot].finish == LENGTH
            await until(lambda: scheduler.heartbeat.running == 0 and scheduler.heartbeat.kv_blocks_used == 0)
            await gateway.start(start(4, ids=[9, 9], max_tokens=300))
            await gateway.read()
            process.send_signal(signal.SIGTERM)
            await gateway.read_until_finished((4, 104))
            assert len(gateway.received[4, 104].ids) == 300
            assert await gateway.read() is None
        assert process.stderr
        log = (await asyncio.wait_for(process.stderr.read(), 60)).decode()
        assert await asyncio.wait_for(process.wait(), 60) == 0
    records = [json.loads(line) for line in log.splitlines()]  # the engine's lines too
    assert "memory plan" in [r["message"] for r in records if r.get("process") == "engine"]
    assert [r["address"] for r in records if r["message"] == "ready"] == [hello.address]


async def test_the_death_of_the_real_engine(model: Path) -> None:
    async with worker_process(model) as (scheduler, process):
        await until(lambda: bool(scheduler.hellos) or process.returncode is not None, timeout_s=90)
        (hello,) = scheduler.hellos
        async with connect(hello.address, retries=False) as channel:
            gateway = Gateway(run_pb2_grpc.RunServiceStub(channel).Run(timeout=120))
            await gateway.attach(hello.epoch)
            await gateway.start(start(1, ids=[1], max_tokens=500))
            await gateway.read()
            os.kill(child_of(process.pid), signal.SIGKILL)
            await gateway.read_until_finished((1, 101))
            assert gateway.received[1, 101].reason == "ENGINE_DIED"
            assert await gateway.read() is None
        assert await asyncio.wait_for(process.wait(), 60) == 1


async def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async with worker_process(tmp_path / "nowhere") as (_, process):
        assert process.stderr
        log = (await asyncio.wait_for(process.stderr.read(), 90)).decode()
        assert await process.wait() == 2
    assert "nowhere" in log
