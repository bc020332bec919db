"""The trainer's service: jobs under leases, reports over a link that breaks, what is refused, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path

import pytest
from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2
from lmesh_chassis.artifacts.folders import put_folder, read_folder

from tests.trainer_scene import Place, running_trainer, scheduler, trainer_process
from tests.training_jobs import run, save_dataset, save_model
from tests.training_jobs import spec as plain_spec
from tests.worker_process import until

LONG = 100_000
COMPLETED, STOPPED = training_pb2.JOB_STATE_COMPLETED, training_pb2.JOB_STATE_STOPPED
CANCELLED, FAILED = training_pb2.JOB_STATE_CANCELLED, training_pb2.JOB_STATE_FAILED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, model, save_dataset(tmp_path / "chats.jsonl"))


def processes_in(place: Place, module: str = "lmesh_trainer.process") -> list[str]:
    """Processes that train, or answer a query, below a place."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if module in line and str(place.folder) in line]


async def test_a_job_runs_to_its_adapter(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        (hello,) = told.hellos
        assert (hello.trainer_id, hello.epoch, hello.device) == ("t", running.trainer.epoch, "a test's")
        assert hello.slots == 1 and not hello.held
        key = told.start("job", 5, place.spec())
        assert (await told.end(key)).state == COMPLETED
        alone = run(plain_spec(place.model, place.rows), place.folder / "alone")
        assert told.losses(key) == alone.losses
        assert next(told.of(key, "phase")) == "loading_dataset"
        (dataset,), (plan,) = told.of(key, "dataset"), told.of(key, "plan")
        assert dataset.rows == 24 and any(t.trained for t in dataset.preview[0].tokens) and plan.steps == 20
        (made,) = told.of(key, "made")
        names = {file.name for file in read_folder(place.store, made.artifact)}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "lmesh_manifest.json"}
        manifest = json.loads(made.manifest)
        assert manifest["digest"] == made.adapter_digest and manifest["steps"] == 20
        assert manifest["base"]["model"] == str(place.model) and manifest["base"]["quantisation"] == "none"
        source = "generation_config.json of the base"
        assert manifest["recommended_sampling"]["temperature"] == {"value": 0.6, "source": source}
        assert str(place.folder) not in json.dumps(manifest["job"])
        inspected = (await told.answer(1, inspect_artifact=made.artifact)).inspected
        assert inspected == made  # what the folder says of itself, without its model
        await until(lambda: not running.trainer.runs.held())


async def test_a_broken_link_loses_nothing_and_doubles_nothing(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        key = told.start("job", 1, place.spec(max_steps=60))
        await told.stepped(key, 5)
        told.acks = False
        await told.stepped(key, 12)
        await told.commands.put(None)
        await until(lambda: len(told.hellos) == 2)
        assert [(held.job_id, held.lease) for held in told.hellos[1].held] == [key]
        await until(lambda: told.again > 0)  # what was not acknowledged came again, and was the same
        told.acks = True
        assert (await told.end(key)).state == COMPLETED
        assert [step.global_step for step in told.of(key, "step")] == list(range(1, 61))


async def test_an_end_that_was_not_acknowledged_is_held(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        told.acks = False
        key = told.start("job", 1, place.spec(max_steps=1))
        await told.end(key)
        await told.commands.put(None)
        await until(lambda: len(told.hellos) == 2)
        assert [(held.job_id, held.lease) for held in told.hellos[1].held] == [key]
        told.acks = True
        await told.commands.put(None)
        await until(lambda: not running.trainer.runs.held())


@pytest.mark.parametrize(("wish", "state"), [(trainers_pb2.WISH_STOP, STOPPED), (trainers_pb2.WISH_CANCEL, CANCELLED)])
async def test_asked(place: Place, wish: int, state: int) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        key = told.start("job", 1, place.spec(max_steps=LONG, save_steps=LONG))
        await told.stepped(key, 2)
        told.ask(("job", 99), wish)  # another lease's wish is nobody's
        told.ask(key, wish)
        assert (await told.end(key)).state == state
        assert list(told.of(key, "checkpoint")) == ([len(told.losses(key))] if state == STOPPED else [])


async def test_dropped(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        key = told.start("job", 1, place.spec(max_steps=LONG))
        await told.stepped(key, 2)
        told.ask(key, trainers_pb2.WISH_DROP)
        await until(lambda: not processes_in(place))
        assert not running.trainer.runs.held() and not told.ended(key)
        before = len(told.taken[key])
        await asyncio.sleep(0.3)
        assert len(told.taken[key]) == before


async def test_a_newer_lease_takes_the_job_on_from_its_checkpoint(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        old = told.start("job", 1, place.spec(max_steps=40, save_steps=1))
        await told.stepped(old, 5)
        new = told.start("job", 2, place.spec(max_steps=40, save_steps=1))
        told.start("job", 2, place.spec(max_steps=3))  # said twice
        told.start("job", 1, place.spec(max_steps=3))  # of the past
        assert (await told.end(new)).state == COMPLETED
        assert not told.ended(old)
        first = next(told.of(new, "step")).global_step
        alone = run(plain_spec(place.model, place.rows, max_steps=40), place.folder / "alone")
        assert first >= 4 and told.losses(new) == alone.losses[first - 1 :]


async def test_killed_with_its_trainer_it_goes_on_in_the_next_boot(place: Place) -> None:
    job = place.spec(max_steps=200, save_steps=5)
    async with scheduler() as (told, address):
        async with trainer_process(place, address, id="one") as process:
            old = told.start("job", 1, job)
            await told.stepped(old, 12)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await until(lambda: not processes_in(place), 10)  # nobody is left to train for
        seen = told.losses(old)
        async with trainer_process(place, address, id="one"):
            await until(lambda: len(told.hellos) == 2, 60)
            assert not told.hellos[1].held and told.hellos[1].epoch != told.hellos[0].epoch
            assert told.hellos[1].device.startswith("cpu: ")
            new = told.start("job", 2, job)
            assert (await told.end(new)).state == COMPLETED
    first = next(told.of(new, "step")).global_step
    alone = run(plain_spec(place.model, place.rows, max_steps=200, save_steps=LONG), place.folder / "alone").losses
    assert first > 5 and seen == alone[: len(seen)]
    assert told.losses(new) == alone[first - 1 :]


async def test_a_drain_leaves_the_job_to_another_trainer(place: Place) -> None:
    job = place.spec(max_steps=300, save_steps=LONG)
    async with running_trainer(place) as running:
        told = running.scheduler
        old = told.start("job", 1, job)
        await told.stepped(old, 3)
        running.shutdown.request()
        await asyncio.wait_for(asyncio.shield(running.done), 60)
        assert any(request.draining for request in told.requests)
        assert not told.ended(old)
        assert list(told.of(old, "checkpoint")) == [len(told.losses(old))]
    async with running_trainer(place, id="other") as running:
        new = running.scheduler.start("job", 2, job)
        assert (await running.scheduler.end(new)).state == COMPLETED
        assert next(running.scheduler.of(new, "step")).global_step == len(told.losses(old)) + 1


async def test_a_full_model(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        key = told.start("job", 1, place.spec(method="full", max_steps=2))
        assert (await told.end(key)).state == COMPLETED
        (made,) = told.of(key, "made")
        names = {file.name for file in read_folder(place.store, made.artifact)}
        assert {"model.safetensors", "config.json", "lmesh_manifest.json"} <= names and not made.adapter_digest
        order = trainers_pb2.ExportOrder(model="no/such", model_artifact=made.artifact, format="gguf", dtype="q8_0")
        exported = (await told.answer(1, export=order)).exported
        assert exported.survival == 1.0
        assert [file.name for file in read_folder(place.store, exported.artifact)] == ["model.gguf"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "reason", "said"),
        [
            ({"precision": "float64"}, "BAD_SPEC", "$.precision"),
            ({"model": ""}, "BAD_SPEC", "model"),
            ({"dataset": training_pb2.DatasetSpec(source="/etc/passwd")}, "BAD_SPEC", "dataset.source"),
            ({"dataset": training_pb2.DatasetSpec(source="hub:a/b")}, "BAD_SPEC", "none of the hub"),
            ({"dataset": training_pb2.DatasetSpec(source=f"artifact:{'a' * 64}/../x")}, "BAD_SPEC", "dataset.source"),
            ({"dataset": training_pb2.DatasetSpec(source=f"artifact:{'a' * 64}/x")}, "UNKNOWN_ARTIFACT", "aaa"),
            ({"lora": training_pb2.LoraSpec(start="/models/secret")}, "BAD_SPEC", "lora.start"),
            ({"lora": training_pb2.LoraSpec(r=0)}, "BAD_SPEC", "$.lora"),
        ],
    )
    async def test_without_a_process(self, place: Place, options: dict[str, object], reason: str, said: str) -> None:
        async with running_trainer(place) as running:
            told = running.scheduler
            job = place.spec(**options)
            key = told.start("job", 1, job)
            state = await told.end(key)
            assert (state.state, state.reason) == (FAILED, reason)
            assert said in state.message and len(told.taken[key]) == 1
            failure = (await told.answer(1, validate=job)).failure
            assert (failure.reason, failure.message) == (reason, state.message)

    async def test_a_job_that_cannot_be_a_folder(self, place: Place) -> None:
        async with running_trainer(place) as running:
            key = running.scheduler.start("../up", 1, place.spec())
            assert (await running.scheduler.end(key)).reason == "BAD_SPEC"
            assert not (place.folder / "artifacts" / "up").exists()

    async def test_a_process_that_dies_is_said_to_have(self, place: Place) -> None:
        async with running_trainer(place) as running:
            told = running.scheduler
            key = told.start("job", 1, place.spec(max_steps=LONG))
            await told.stepped(key, 2)
            (run,) = running.trainer.runs
            await run._process.kill()  # type: ignore[union-attr]
            assert (await told.end(key)).reason == "JOB_DIED"


async def test_queries(place: Place, tmp_path: Path) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        validated = (await told.answer(1, validate=place.spec())).validated
        assert validated.dataset.rows == 24 and validated.plan.steps == 20 and validated.plan.lines
        missing = place.spec(model="/no/such/model")
        assert (await told.answer(2, validate=missing)).failure.reason == "MODEL_NOT_FOUND"
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "x.txt").write_text("no adapter")
        other = put_folder(place.store, tmp_path / "folder")
        assert (await told.answer(3, inspect_artifact=other)).failure.reason == "NO_CONFIG"
        assert (await told.answer(4, inspect_artifact="f" * 64)).failure.reason == "UNKNOWN_ARTIFACT"
        order = trainers_pb2.ExportOrder(model=str(place.model), format="gguf", dtype="q3")
        assert (await told.answer(5, export=order)).failure.reason == "BAD_EXPORT"
        key = told.start("job", 1, place.spec(max_steps=5))
        await told.end(key)
        (made,) = told.of(key, "made")
        order = trainers_pb2.ExportOrder(
            model=str(place.model), adapter_artifact=made.artifact, format="merged", dtype="float32"
        )
        exported = (await told.answer(6, export=order)).exported
        assert exported.survival == pytest.approx(1.0)
        assert "model.safetensors" in {file.name for file in read_folder(place.store, exported.artifact)}
        order.format = "peft"
        as_it_is = (await told.answer(7, export=order)).exported
        assert (as_it_is.artifact, as_it_is.survival) == (made.artifact, 1.0)
        start = training_pb2.LoraSpec(start=f"artifact:{made.artifact}")
        assert (await told.answer(8, validate=place.spec(lora=start))).validated.plan.trained_parameters > 0
        assert not list((place.folder / "artifacts/jobs/.queries").iterdir())


async def test_queries_end_with_the_stream_that_asked(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        query = trainers_pb2.Query(query_id=1, validate=place.spec())
        told.commands.put_nowait(trainers_pb2.JoinResponse(queries=[query]))
        await until(lambda: bool(processes_in(place, "lmesh_trainer.queries.process")))
        told.commands.put_nowait(None)
        await until(lambda: len(told.hellos) == 2 and not processes_in(place, "lmesh_trainer.queries.process"))
        assert (await told.answer(2, validate=place.spec(epochs=-1.0))).failure.reason == "BAD_SPEC"
        assert 1 not in told.answers


async def test_more_than_its_slots_wait(place: Place) -> None:
    async with running_trainer(place) as running:
        told = running.scheduler
        first = told.start("first", 1, place.spec(max_steps=LONG))
        second = told.start("second", 2, place.spec(max_steps=2))
        third = told.start("third", 3, place.spec(max_steps=2))
        await told.stepped(first, 2)
        assert not told.taken[second]
        told.ask(third, trainers_pb2.WISH_CANCEL)
        told.ask(first, trainers_pb2.WISH_CANCEL)
        assert (await told.end(second)).state == COMPLETED
        assert (await told.end(third)).state == CANCELLED and len(told.taken[third]) == 1


async def test_the_process_leaves_at_sigterm_and_says_what_it_cannot_use(place: Place) -> None:
    async with scheduler() as (told, address):
        async with trainer_process(place, address) as process:
            await until(lambda: bool(told.hellos), 60)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
        async with trainer_process(place, address, device="xpu") as process:
            assert await asyncio.wait_for(process.wait(), 60) == 1
        async with trainer_process(place, address, slots="0") as process:
            assert await asyncio.wait_for(process.wait(), 60) == 2
        assert len(told.hellos) == 1 and told.hellos[0].trainer_id.startswith("trainer-")


async def test_a_query_out_of_time(place: Place) -> None:
    async with running_trainer(place, query_timeout_s=0.1) as running:
        failure = (await running.scheduler.answer(1, validate=place.spec())).failure
        assert failure.reason == "QUERY_TIMEOUT"
