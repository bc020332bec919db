"""The public gRPC API: lmesh.inference.v1 protos on one side, the generator and its values on the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis import tracing

from lmesh_gateway.authentication import caller
from lmesh_gateway.errors import InvalidArgumentError, RequestNotFoundError
from lmesh_gateway.generation import (
    DETACH_TTL_S,
    Accepted,
    ChatPrompt,
    Delta,
    Event,
    Finish,
    GenerationRequest,
    Generator,
    ModelDirectory,
    OutputOptions,
    Prompt,
    ResumeRequest,
    Sampling,
    ServedModel,
    StopRules,
    TextPrompt,
    TokenLogprob,
    TokenLogprobs,
    TokenPrompt,
)
from lmesh_gateway.placement import RequestRecord

SERVICE_NAME = "lmesh.inference.v1.InferenceService"

RpcContext = Any  # grpc's own type leaves its messages open

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class Registry(Protocol):
    """Where requests of the whole mesh are looked up and cancelled."""

    async def cancel(self, request_id: str, tenant: str) -> None:
        """Cancels a live request of the tenant's; RequestNotFoundError or RequestEndedError otherwise."""
        ...

    async def describe(self, request_id: str, tenant: str) -> RequestRecord:
        """A record of the tenant's; RequestNotFoundError when there is none."""
        ...


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates; decides nothing. Errors are raised as ServiceErrors, which the interceptors map."""

    def __init__(self, generator: Generator, directory: ModelDirectory, registry: Registry) -> None:
        self._generator = generator
        self._directory = directory
        self._registry = registry

    async def Generate(self, request: pb.GenerateRequest, context: RpcContext) -> None:  # type: ignore[override]
        """Streams a generation; a cancelled call cancels it.

        Writes through the context rather than yielding: then a cancellation arrives here, and what it must free is
        freed at once. One write is out at a time; what comes meanwhile joins the next.
        """
        wanted = _request(request, deadline_s=context.time_remaining())
        scored = request.output.HasField("prompt_logprobs")
        await _write(context, self._generator.generate(wanted), prompt_logprobs=scored)

    async def Resume(self, request: pb.ResumeRequest, context: RpcContext) -> None:  # type: ignore[override]
        """Streams the rest of a generation, as Generate does."""
        wanted = ResumeRequest(
            request_id=_known_id(request.request_id), cursor=tuple(request.cursor), tenant=caller.get()
        )
        await _write(context, self._generator.resume(wanted), prompt_logprobs=False)

    async def Cancel(self, request: pb.CancelRequest, context: RpcContext) -> pb.CancelResponse:
        """Cancels a request of any client of the same tenant."""
        await self._registry.cancel(_known_id(request.request_id), caller.get())
        return pb.CancelResponse()

    async def GetRequest(self, request: pb.GetRequestRequest, context: RpcContext) -> pb.GetRequestResponse:
        """A request's state and timeline."""
        return _record(await self._registry.describe(_known_id(request.request_id), caller.get()))

    async def ListModels(self, request: pb.ListModelsRequest, context: RpcContext) -> pb.ListModelsResponse:
        """The models that can be asked for now."""
        return pb.ListModelsResponse(models=[_model(model) for model in self._directory.list(caller.get())])


async def _write(context: RpcContext, events: AsyncGenerator[Event, None], *, prompt_logprobs: bool) -> None:
    async with aclosing(events):
        async for event in events:
            response = _response(event, prompt_logprobs)
            if response is not None:
                await context.write(response)


def _known_id(request_id: str) -> str:
    if not request_id:
        raise InvalidArgumentError("request_id: must name a request", field="request_id")
    if len(request_id) > 128:
        raise RequestNotFoundError("no request of that id is known", field="request_id")
    return request_id


def _request(request: pb.GenerateRequest, *, deadline_s: float | None) -> GenerationRequest:
    queue_timeout = request.queue_timeout.ToNanoseconds() / 1e9 if request.HasField("queue_timeout") else None
    return GenerationRequest(
        model=request.model,
        prompt=_prompt(request),
        request_id=request.request_id or None,
        sampling=_sampling(request.sampling),
        stops=_stops(request.stop),
        output=_output(request.output),
        deadline_s=deadline_s,
        queue_timeout_s=queue_timeout,
        priority=request.priority,
        detach_ttl_s=_detach_ttl_s(request),
        sync=request.durability == pb.DURABILITY_SYNC,
        tenant=caller.get(),
        traceparent=tracing.inject(),
    )


def _detach_ttl_s(request: pb.GenerateRequest) -> float | None:
    if request.on_disconnect != pb.ON_DISCONNECT_DETACH:
        if request.HasField("detach_ttl"):
            raise InvalidArgumentError("detach_ttl: is for on_disconnect DETACH alone", field="detach_ttl")
        return None
    return request.detach_ttl.ToNanoseconds() / 1e9 if request.HasField("detach_ttl") else DETACH_TTL_S


def _prompt(request: pb.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("input")
    if kind == "text":
        return TextPrompt(text=request.text.prompt)
    if kind == "tokens":
        return TokenPrompt(ids=tuple(request.tokens.ids[:]))  # of a slice: ids one by one take half as long again
    if kind != "chat":
        raise InvalidArgumentError("input: one of text, tokens and chat must be set", field="input")
    chat = request.chat
    return ChatPrompt(
        messages=tuple({"role": message.role, "content": message.content} for message in chat.messages),
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
    )


def _sampling(sampling: pb.SamplingParams) -> Sampling:
    return Sampling(
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        n=sampling.n if sampling.HasField("n") else 1,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if sampling.HasField("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if sampling.HasField("frequency_penalty") else None,
        logit_bias=tuple(sampling.logit_bias.items()),
    )


def _stops(stop: pb.StopParams) -> StopRules:
    return StopRules(
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        stop=tuple(stop.stop),
        stop_token_ids=tuple(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
    )


def _output(output: pb.OutputOptions) -> OutputOptions:
    return OutputOptions(
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        keep_special_tokens=output.keep_special_tokens,
    )


def _response(event: Event, prompt_logprobs: bool) -> pb.GenerateResponse | None:
    """None for a choice's end, which Finish repeats."""
    if isinstance(event, Delta):
        return pb.GenerateResponse(delta=_delta(event))
    if isinstance(event, Accepted):
        accepted = pb.Accepted(
            request_id=event.request_id,
            prompt_tokens=len(event.prompt_ids),
            seed=event.seed,
            prompt_logprobs_follow=prompt_logprobs,
        )
        return pb.GenerateResponse(accepted=accepted)
    return pb.GenerateResponse(finish=_finish(event)) if isinstance(event, Finish) else None


def _delta(delta: Delta) -> pb.Delta:
    return pb.Delta(
        choice=delta.choice,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_rows(delta.logprobs),
        prompt_logprobs=_rows(delta.prompt_logprobs),
    )


def _rows(rows: Sequence[TokenLogprobs] | None) -> Iterable[pb.TokenLogprobs]:
    return (pb.TokenLogprobs(token=_entry(row.token), top=map(_entry, row.top)) for row in rows or ())


def _entry(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(id=entry.id, logprob=entry.logprob, text=entry.text, raw=entry.raw)


def _finish(finish: Finish) -> pb.Finish:
    choices = [
        pb.ChoiceFinish(
            choice=end.choice,
            reason=_FINISH[end.reason],
            stop_string=end.stop_string or "",
            stop_token_id=end.stop_token_id,
        )
        for end in finish.choices
    ]
    usage = finish.usage
    return pb.Finish(
        choices=choices,
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ),
        durable=finish.durable,
    )


def _model(model: ServedModel) -> pb.Model:
    return pb.Model(
        id=model.id,
        max_model_len=model.max_model_len,
        digest=model.digest,
        created=_timestamp(model.created),
        workers=model.workers,
    )


def _record(record: RequestRecord) -> pb.GetRequestResponse:
    response = pb.GetRequestResponse(
        request_id=record.request_id,
        state=pb.RequestState.Value(f"REQUEST_STATE_{record.state}"),
        model=record.model,
        worker_id=record.worker_id,
        timeline=[
            pb.TimelineEvent(time=_timestamp(event.time), event=event.event, detail=event.detail)
            for event in record.timeline
        ],
        failure_reason=record.failure_reason,
        durable=record.durable,
    )
    if record.ended:
        response.usage.prompt_tokens = record.prompt_tokens
        response.usage.completion_tokens = record.completion_tokens
        response.usage.cached_tokens = record.cached_tokens
    return response


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp
