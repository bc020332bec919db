"""The launcher's calls into the mesh: health, models, the fleet, generation; the only file here that knows protos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from lmesh.scheduler.v1 import fleet_pb2, fleet_pb2_grpc
from lmesh_chassis.errors import from_rpc_error

from lmesh_cli import access

_PROBE_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 10.0
# A server that stops cancels its streams.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_PROGRESS = {
    fleet_pb2.PROGRESS_OK: "ok",
    fleet_pb2.PROGRESS_COMPILING: "compiling",
    fleet_pb2.PROGRESS_STUCK: "stuck",
}


class MeshError(RuntimeError):
    """A call into the mesh failed; the message is for the person, `reason` is the service's UPPER_SNAKE word."""

    def __init__(self, reason: str, message: str, *, lost: bool = False) -> None:
        super().__init__(f"{reason}: {message}" if reason else message)
        self.reason = reason
        self.lost = lost  # nobody answered, or the connection broke: the same may work in a moment


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """One worker as the scheduler sees it."""

    id: str
    model: str
    device: str
    address: str
    state: str  # ok, compiling, stuck or draining
    running: int
    waiting: int
    placements: int
    kv_blocks_used: int
    kv_blocks: int
    cache_hit_rate: float | None  # share of prompt tokens found in the prefix cache; None before the first prompt
    generated_tokens: int
    preemptions: int
    steps: int
    heartbeat_age_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetView:
    """The scheduler's answer to `lmesh status`."""

    incarnation: int
    queued: int
    live: int
    gateways: int
    journal_ok: bool
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Sampling of a chat; None takes the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPiece:
    """Part of an answer: text as it comes, then once the counts."""

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False  # ended by max_tokens or the context's end
    last: bool = False


async def is_serving(address: str) -> bool:
    """Whether the gRPC server at host:port says that it serves."""
    try:
        async with access.aio_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_S)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def served_models(address: str) -> frozenset[str] | None:
    """Ids of the models that the gateway at host:port serves; none when it does not answer, None when it wants a key.

    A key that is set and refused counts as no answer.
    """
    try:
        async with access.aio_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.ListModelsRequest()
            answer = await stub.ListModels(request, timeout=_PROBE_TIMEOUT_S, metadata=access.api_key())
    except grpc.RpcError as error:
        # Without a key the question cannot be asked.
        return None if error.code() is grpc.StatusCode.UNAUTHENTICATED and not access.api_key() else frozenset()
    return frozenset(model.id for model in answer.models)


def list_models(address: str) -> list[str]:
    """Ids of the models that the gateway at host:port serves. Raises MeshError."""
    with reach(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
    return [model.id for model in answer.models]


def describe_fleet(address: str) -> FleetView:
    """What the scheduler at host:port knows. Raises MeshError."""
    with reach(address) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        answer = stub.DescribeFleet(fleet_pb2.DescribeFleetRequest(), timeout=_CALL_TIMEOUT_S)
    return FleetView(
        incarnation=answer.incarnation,
        queued=answer.queued,
        live=answer.live,
        gateways=answer.gateways,
        journal_ok=answer.journal_ok,
        workers=tuple(_worker(status) for status in answer.workers),
    )


def chat(
    address: str, model: str, messages: Sequence[tuple[str, str]], options: ChatOptions, timeout_s: float
) -> Iterator[ChatPiece]:
    """Streams the answer to (role, content) messages; closing the iterator cancels the call. Raises MeshError."""
    request = inference_pb2.GenerateRequest(
        model=model,
        chat=inference_pb2.ChatInput(
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
        ),
        sampling=inference_pb2.SamplingParams(
            temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed
        ),
        stop=inference_pb2.StopParams(max_tokens=options.max_tokens),
    )
    with reach(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request, timeout=timeout_s, metadata=access.api_key())
        try:
            for event in call:
                if event.HasField("delta"):
                    yield ChatPiece(text=event.delta.text)
                elif event.HasField("finish"):
                    yield _last_piece(event.finish)
        finally:
            call.cancel()


def _last_piece(finish: inference_pb2.Finish) -> ChatPiece:
    return ChatPiece(
        prompt_tokens=finish.usage.prompt_tokens,
        cached_tokens=finish.usage.cached_tokens,
        completion_tokens=finish.usage.completion_tokens,
        cut=any(choice.reason == inference_pb2.FINISH_REASON_LENGTH for choice in finish.choices),
        last=True,
    )


def _worker(status: fleet_pb2.WorkerStatus) -> WorkerView:
    hello, beat = status.hello, status.heartbeat
    queried = beat.prefix_query_tokens
    return WorkerView(
        id=hello.worker_id,
        model=hello.model.id,
        device=hello.device,
        address=hello.address,
        state="draining" if status.draining else _PROGRESS.get(beat.progress, "joining"),
        running=beat.running,
        waiting=beat.waiting,
        placements=status.placements,
        kv_blocks_used=beat.kv_blocks_used,
        kv_blocks=hello.capacity.kv_blocks,
        cache_hit_rate=beat.prefix_hit_tokens / queried if queried else None,
        generated_tokens=beat.generated_tokens,
        preemptions=beat.preemptions,
        steps=beat.steps,
        heartbeat_age_ms=status.heartbeat_age_ms,
    )


@contextmanager
def reach(address: str) -> Iterator[grpc.Channel]:
    """A channel for one piece of work; what fails in it is raised as MeshError."""
    with access.channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            remote = from_rpc_error(error)
            reason = remote.reason or remote.code.name
            lost = remote.code in _LOST
            raise MeshError(reason, remote.message or f"no answer from {address}", lost=lost) from error
