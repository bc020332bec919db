"""The Fleet link and the worker's life: joining, heartbeats, health, progress, draining, and what it leaves behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lmesh.scheduler.v1 import fleet_pb2
from lmesh_chassis import tracing
from lmesh_chassis.channel import connect
from lmesh_worker.servicer import SERVICE_NAME
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.scripted_engine import READY, VOCAB
from tests.worker_process import ENGINE, LENGTH, RunningWorker, running_worker, start, until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


async def health_of(running: RunningWorker) -> int:
    async with connect(running.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)).status


async def test_the_hello_says_who_it_is_and_what_it_holds() -> None:
    async with running_worker() as running:
        (hello,) = running.scheduler.hellos
        assert (hello.worker_id, hello.epoch, hello.address) == ("w", running.epoch, running.address)
        model = hello.model
        assert (model.id, model.source, model.digest, model.text_digest) == ("scripted", "normal", "d1", "d2")
        assert (model.max_model_len, model.vocab_size, model.block_size) == (512, VOCAB, 16)
        assert (model.weights_version, model.kv_format, model.kv_granule_blocks) == (1, "float32/16/nhd", 4)
        assert not hello.held
        capacity = hello.capacity
        assert (capacity.max_seqs, capacity.max_step_tokens, capacity.kv_blocks) == (32, 512, READY.kv_blocks)
        assert hello.device == "scripted"
        assert await health_of(running) == SERVING


async def test_nothing_is_announced_before_the_engine_is_ready() -> None:
    async with running_worker("slow", wait=False) as running:
        await until(lambda: running.worker.server.port != 0)
        assert await health_of(running) == NOT_SERVING
        running.shutdown.request()  # a worker that loads can be stopped
        assert await asyncio.wait_for(running.done, 30) == 0
        assert running.scheduler.hellos == []


async def test_an_engine_that_cannot_start_ends_the_worker() -> None:
    async with running_worker("broken") as running:
        assert await asyncio.wait_for(running.done, 30) == 1
        assert running.scheduler.hellos == []


async def test_heartbeats_come_at_the_told_interval_with_load_and_progress() -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=9), start(2, max_tokens=5))
        await gateway.read_until_finished((2, 102))
        await until(lambda: running.scheduler.heartbeat.generated_tokens == 6)
        beat = running.scheduler.heartbeat
        assert (beat.running, beat.kv_blocks_used, beat.prefix_query_tokens, beat.prefix_hit_tokens) == (1, 2, 6, 4)
        assert beat.progress == fleet_pb2.PROGRESS_OK
        assert beat.steps >= 5  # the first start may have had a step of its own
        count = len(running.scheduler.requests)
        await until(lambda: len(running.scheduler.requests) >= count + 3)  # without anything happening
        await gateway.abort(1, 101)


async def test_metrics_have_the_engines_counts() -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=9), start(2, max_tokens=5))
        await gateway.read_until_finished((2, 102))
        assert running.metric("vllm:num_requests_running") == 1
        assert running.metric("vllm:kv_cache_usage_perc") == 2 / READY.kv_blocks
        assert running.metric("lmesh:kv_blocks_used") == 2
        assert running.metric("vllm:prompt_tokens_total") == 6
        assert running.metric("vllm:generation_tokens_total") == 6
        assert running.metric("vllm:prefix_cache_queries_total") == 6
        assert running.metric("vllm:prefix_cache_hits_total") == 4
        assert running.metric("vllm:num_preemptions_total") == 0
        assert running.metric("vllm:iteration_tokens_total_count") == running.metric("lmesh:engine_steps_total")
        assert running.metric("vllm:iteration_tokens_total_sum") == 12
        assert running.metric("vllm:request_queue_time_seconds_count") == 2
        await gateway.abort(1, 101)


async def test_a_stuck_engine_is_told_to_all_and_recovers_with_the_work_gone() -> None:
    async with running_worker(step_bound_s=0.2) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "stall"))
        await until(lambda: running.scheduler.heartbeat.progress == fleet_pb2.PROGRESS_STUCK)
        await until(lambda: not running.worker.server.serving())
        assert await health_of(running) == NOT_SERVING
        await gateway.abort(1, 101)
        await until(lambda: running.scheduler.heartbeat.progress == fleet_pb2.PROGRESS_OK)
        await until(lambda: running.worker.server.serving())


async def test_a_lost_scheduler_is_joined_again_and_streams_go_on() -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, max_tokens=200))
        await gateway.read()
        await running.scheduler.commands.put(None)
        await until(lambda: len(running.scheduler.hellos) == 2)
        await gateway.read_until_finished((1, 101))
        assert [hello.epoch for hello in running.scheduler.hellos] == [running.epoch] * 2
        assert len(gateway.received[1, 101].ids) == 200
        assert running.worker.server.serving()


@pytest.mark.parametrize("by_command", [True, False])
async def test_a_drain_lets_sequences_finish(by_command: bool) -> None:
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, max_tokens=300))
        await gateway.read()
        if by_command:
            await running.scheduler.commands.put(fleet_pb2.FleetResponse(drain=True))
        else:
            running.shutdown.request()
        await until(lambda: running.scheduler.requests[-1].draining)
        assert not running.worker.server.serving()
        await gateway.read_until_finished((1, 101))
        assert await gateway.read() is None  # the stream ends well
        assert await asyncio.wait_for(running.done, 30) == 0
        assert (gateway.received[1, 101].finish, len(gateway.received[1, 101].ids)) == (LENGTH, 300)
        assert running.engine._process.returncode == 0  # it left by itself


async def test_a_drain_ends_at_its_timeout() -> None:
    async with running_worker(drain_timeout_s=0.3) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=300))
        await gateway.read()
        running.shutdown.request()
        assert await gateway.read() is None
        assert await asyncio.wait_for(running.done, 30) == 0


async def test_a_sequence_leaves_a_span_and_one_for_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("test"))
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running_worker() as running:
        gateway = await running.attached()
        await gateway.start(start(1, "count-1", traceparent=traceparent), start(2, "count-2"))
        await gateway.read_until_finished((1, 101), (2, 102))
    step, generate = exporter.get_finished_spans()
    assert (generate.name, step.name) == ("worker.generate", "engine.step")
    assert f"{generate.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{generate.parent.span_id:016x}" == "b7ad6b7169203331"
    assert step.parent.span_id == generate.context.span_id
    assert [event.name for event in generate.events] == ["queue", "prefill", "decode"]
    assert generate.attributes["gen_ai.usage.output_tokens"] == 5
    assert generate.attributes["gen_ai.response.finish_reasons"] == ("length",)


async def test_the_engine_dies_with_its_server() -> None:
    """A server killed outright takes the engine along."""
    code = (
        "import sys, time\n"
        "from lmesh_worker.engine.config import EngineConfig\n"
        "from lmesh_worker.engine_client import EngineClient\n"
        "engine = EngineClient.spawn('slow', EngineConfig(), sys.argv[1:])\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    server = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", code, *ENGINE, stdout=-1)
    assert server.stdout
    pid = int(await server.stdout.readline())
    server.kill()
    await server.wait()
    await until(lambda: _gone(Path(f"/proc/{pid}/stat")))


def _gone(stat: Path) -> bool:
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"  # dead; whoever inherited it may not have reaped it
    except FileNotFoundError:
        return True


async def test_gateways_are_refused_until_the_engine_is_ready() -> None:
    async with running_worker("slow", wait=False) as running:
        await until(lambda: running.worker.server.port != 0)
        gateway = running.gateway()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.attach(running.epoch)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
