"""The engine process from outside: whatever happens, the server is told, and nobody outlives the server."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lmesh_kernels.text.resolve import local_files
from lmesh_worker.engine import process
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.engine_client import EngineClient
from lmesh_worker.errors import EngineFailedError
from lmesh_worker.messages import Abort, Finish, Params, Progress, Ready, Start, StepReport

from tests.tiny_model import save_tiny_llama

TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def clients() -> Iterator[list[EngineClient]]:
    made: list[EngineClient] = []
    yield made
    for client in made:
        client.kill()


def config(**settings: object) -> EngineConfig:
    defaults = {"device": "cpu", "threads": 1, "kv_blocks": 64, "max_seqs": 8, "max_step_tokens": 64}
    return EngineConfig(**(defaults | settings))


async def boot(clients: list[EngineClient], source: Path, settings: object) -> tuple[EngineClient, Ready]:
    client = EngineClient.spawn(str(source), settings)
    clients.append(client)
    await client.connect()
    return client, await client.ready(TIMEOUT_S)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (config(kv_blocks=2, max_model_len=512), "max_model_len 512 needs 32 KV blocks"),
        ({"no": "settings", "block_size": "sixteen"}, "block_size"),
        pytest.param(
            config(device="cuda"),
            "'cuda' is not usable here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one"),
        ),
    ],
)
async def test_an_engine_that_cannot_start_says_why(
    clients: list[EngineClient], model: Path, settings: object, said: str
) -> None:
    with pytest.raises(EngineFailedError) as caught:
        await boot(clients, model, settings)
    assert caught.value.reason == "ENGINE_START_FAILED"
    assert said in str(caught.value)


async def test_an_unforeseen_failure_at_start_is_told_too(clients: list[EngineClient], tmp_path: Path) -> None:
    broken = save_tiny_llama(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(EngineFailedError) as caught:
        await boot(clients, broken, config())
    assert caught.value.reason == "ENGINE_START_FAILED"


async def test_it_serves_aborts_and_reports_while_idle(clients: list[EngineClient], model: Path) -> None:
    expected = Engine(config(), local_files(model)).generate([Start(1, "r1", 0, [1, 2, 3], 3, Params(max_tokens=6))])
    client, ready = await boot(clients, model, config())
    assert (ready.block_size, ready.kv_blocks, ready.max_seqs) == (16, 64, 8)
    client.send(Start(1, "r1", 0, [1, 2, 3], 3, Params(max_tokens=6)))
    client.send(Start(2, "r2", 0, [4, 5], 2, Params(max_tokens=500)))
    ids: dict[int, list[int]] = {1: [], 2: []}
    finishes: dict[int, int] = {}
    async with asyncio.timeout(TIMEOUT_S):
        async for report in client.reports():
            assert isinstance(report, StepReport)
            at = 0
            for key, count, finish in zip(report.keys, report.n_new, report.finish, strict=True):
                ids[key] += report.ids[at : at + count]
                at += count
                if finish:
                    finishes[key] = finish
            if 1 in finishes and 2 not in finishes:
                client.send(Abort(2))
            if len(finishes) == 2:
                assert report.load.kv_blocks_used == 0
                break
    assert ids[1] == expected[1]
    assert finishes == {1: Finish.LENGTH, 2: Finish.ABORTED}
    await client.stop(TIMEOUT_S)
    assert client._process.returncode == 0


@pytest.mark.parametrize("busy", [False, True])
async def test_it_leaves_when_the_server_hangs_up(clients: list[EngineClient], model: Path, busy: bool) -> None:
    client, _ = await boot(clients, model, config())
    if busy:
        client.send(Start(1, "r1", 0, [1], 1, Params(max_tokens=500)))
    assert client._writer is not None
    client._writer.close()
    await client._writer.wait_closed()
    try:
        assert await asyncio.to_thread(client._process.wait, TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        pytest.fail("the engine outlived its server")


def test_a_first_time_that_fails_costs_a_warning_and_nothing_else(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Said(list[object]):
        send = list.append

    def full(plan: object) -> None:
        raise torch.OutOfMemoryError("planted")

    engine = Engine(config(), local_files(model))
    told, said = [Start(1, "1", 0, [1, 2, 3], 3, Params(max_tokens=6))], Said()
    expected = engine.generate(told)
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "launch", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.warm_up()  # before it is ready it must not go on
        while engine.cold:
            process._warm_next(engine, said)  # type: ignore[arg-type]
    assert [change.progress for change in said] == [Progress.COMPILING, Progress.OK] * 2  # type: ignore[attr-defined]
    assert caplog.text.count("failed: OutOfMemoryError: planted") == 2
    assert engine.generate(told) == expected
