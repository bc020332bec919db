"""The Run service: protos on one side, sessions on the other. The only file that knows lmesh.worker.v1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from lmesh.worker.v1 import run_pb2, run_pb2_grpc

from lmesh_worker.errors import HelloRequiredError
from lmesh_worker.messages import Params
from lmesh_worker.outputs import SessionStep
from lmesh_worker.run_order import StartOrder
from lmesh_worker.run_sessions import RunSessions
from lmesh_worker.session import Session, Stream

SERVICE_NAME = "lmesh.worker.v1.RunService"

_HELLO_TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 20  # of the steps in one message, as `SessionStep.nbytes` counts

RpcContext = Any  # grpc's own type leaves its messages open


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """One call a gateway; a reader and a writer, of which neither waits for the other.

    `worker_id()` is asked at each hello: its default holds the bound port.
    """

    def __init__(self, sessions: RunSessions, *, worker_id: Callable[[], str], epoch: str) -> None:
        self._sessions = sessions
        self._worker_id = worker_id
        self._epoch = epoch

    # A coroutine that writes through its context, which the stubs do not foresee: a generator that is held up in a
    # yield could not be told that its session was dropped.
    async def Run(  # type: ignore[override]
        self, request_iterator: object, context: RpcContext
    ) -> None:
        """The link; ends when the gateway ends its side, when a newer stream takes over, or when the worker leaves."""
        first = await _first(context)
        hello = first.hello
        session, stream = self._sessions.attach(hello.gateway_id, hello.epoch, hello.resume_after_step_seq)
        try:
            await context.write(self._greeting(hello.resume_after_step_seq + 1))
            self._take(session, first)
            await self._serve(session, stream, context, _MOST_BYTES if hello.takes_later else 0)
        finally:
            if stream.ended.done():
                stream.ended.exception()  # seen, even when the call was cancelled meanwhile
            self._sessions.detach(session, stream)

    def _greeting(self, oldest: int) -> run_pb2.RunResponse:
        hello = run_pb2.WorkerRunHello(worker_id=self._worker_id(), epoch=self._epoch, oldest_step_seq=oldest)
        return run_pb2.RunResponse(hello=hello)

    async def _serve(self, session: Session, stream: Stream, context: RpcContext, most_bytes: int) -> None:
        reader = asyncio.create_task(self._read(session, context))
        writer = asyncio.create_task(self._write(session, stream, context, most_bytes))
        try:
            await asyncio.wait({reader, writer, stream.ended}, return_when=asyncio.FIRST_COMPLETED)
            if stream.ended.done():
                stream.ended.result()
            elif reader.done():
                reader.result()
                self._sessions.leave(session)
            else:
                writer.result()
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, session: Session, context: RpcContext) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            if request.HasField("hello"):
                raise HelloRequiredError("only the first message may be a hello", field="hello")
            self._take(session, request)

    def _take(self, session: Session, request: run_pb2.RunRequest) -> None:
        session.acknowledge(request.acked_step_seq)
        for start in request.starts:
            self._sessions.start(session, _order(start))
        for abort in request.aborts:
            self._sessions.abort(session, abort.slot, abort.lease)

    async def _write(self, session: Session, stream: Stream, context: RpcContext, most_bytes: int) -> None:
        """One message for all steps that gather while the one before is being written: a step costs far less than a
        message, and a worker of many gateways must not fall behind its engine."""
        while True:
            steps = await session.next_steps(stream, most_bytes)
            first, *later = map(_outputs, steps)
            await context.write(run_pb2.RunResponse(outputs=first, later=later))
            self._sessions.written(stream, steps[-1].step_seq)


async def _first(context: RpcContext) -> run_pb2.RunRequest:
    """The message with the hello."""
    try:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            first = await context.read()
    except TimeoutError:
        raise HelloRequiredError(f"no hello came within {_HELLO_TIMEOUT_S:g} s", field="hello") from None
    if first is grpc.aio.EOF or not first.HasField("hello"):
        raise HelloRequiredError("the first message must be a hello", field="hello")
    if not first.hello.gateway_id:
        raise HelloRequiredError("a gateway must name itself", field="hello.gateway_id")
    request: run_pb2.RunRequest = first
    return request


def _order(start: run_pb2.Start) -> StartOrder:
    return StartOrder(
        slot=start.slot,
        lease=start.lease,
        request_id=start.request_id,
        choice=start.choice,
        ids=start.ids[:],
        prompt_len=start.prompt_len,
        params=_params(start.params),
        cache_salt=start.cache_salt,
        traceparent=start.traceparent,
        priority=start.priority,
        adapter=start.adapter,
    )


def _params(params: run_pb2.SequenceParams) -> Params:
    return Params(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=tuple(params.stop_token_ids),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        min_p=params.min_p,
        # An older gateway does not send it, and 0 is no penalty.
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((entry.id, entry.bias) for entry in params.logit_bias),
    )


def _outputs(step: SessionStep) -> run_pb2.StepOutputs:
    outputs = run_pb2.StepOutputs(
        step_seq=step.step_seq,
        slot=step.slot,
        lease=step.lease,
        start_pos=step.start_pos,
        n_new=step.n_new,
        ids=step.ids,
        finish=step.finish,  # type: ignore[arg-type]  # the numbers are those of SequenceFinish
        weights_version=step.weights_version,
    )
    for logprobs in step.logprobs:
        outputs.logprobs.add(
            entry=logprobs.entry,
            prompt=logprobs.prompt,
            chosen=logprobs.chosen,
            k=logprobs.k,
            top_ids=logprobs.top_ids,
            top_logprobs=logprobs.top_logprobs,
        )
    for error in step.errors:
        outputs.errors.add(entry=error.entry, reason=error.reason, message=error.message)
    for timing in step.timings:
        outputs.timings.add(
            entry=timing.entry,
            cached_tokens=timing.cached_tokens,
            queue_us=timing.queue_us,
            prefill_us=timing.prefill_us,
            preemptions=timing.preemptions,
        )
    return outputs
