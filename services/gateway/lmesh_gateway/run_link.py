"""The Run link to one worker: one stream shared by all requests, opened again when it breaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import grpc
from lmesh.worker.v1 import run_pb2, run_pb2_grpc
from lmesh_chassis.channel import connect
from lmesh_chassis.errors import RemoteError
from lmesh_chassis.links import Link
from lmesh_chassis.tls import PLAIN, Tls

from lmesh_gateway.errors import DOMAIN
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.placement import Leg
from lmesh_gateway.plan import SequenceParams
from lmesh_gateway.run_session import RunBatch, RunSession, StepEntry
from lmesh_gateway.slots import SequenceFinish, SequenceListener, SequenceOutput, SequenceStart, SequenceTiming, Slot

_log = logging.getLogger(__name__)

# A worker that does not end its side must not hold up the process's exit.
_CLOSE_TIMEOUT_S = 2.0
# The worker holds nothing for us any more, or cannot go on where we are.
_SESSION_GONE = frozenset({grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED})
# It is not the worker that the placement meant.
_WRONG_WORKER = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT})


class RunLink:
    """All sequences of this gateway on one boot of one worker.

    A broken stream is resumed after the last step taken, within `grace_s`; after that the worker counts as lost.
    `on_gone(link, lost)` is called once, when the link has ended for good; `lost` says that the worker was given up.
    """

    def __init__(
        self,
        leg: Leg,
        gateway_id: str,
        *,
        grace_s: float,
        on_gone: Callable[[RunLink, bool], None],
        tls: Tls = PLAIN,
    ) -> None:
        self.worker_id = leg.worker_id
        self.epoch = leg.epoch
        self._gateway_id = gateway_id
        self._grace_s = grace_s
        self._on_gone = on_gone
        self._session = RunSession(leg.worker_id)
        self._gone = False
        self._grace: asyncio.TimerHandle | None = None
        self._channel = connect(leg.address, domain=DOMAIN, retries=False, tls=tls)
        self._link: Link[run_pb2.RunRequest, run_pb2.RunResponse] = Link(
            run_pb2_grpc.RunServiceStub(self._channel).Run,
            name=f"run:{leg.worker_id}",
            hello=self._hello,
            collect=self._collect,
            on_connected=self._on_connected,
            on_message=self._on_message,
            on_broken=self._on_broken,
        )
        self._task = asyncio.create_task(self._run())

    def start(self, start: SequenceStart, listener: SequenceListener) -> Slot:
        """Runs a sequence; the handle is for `abort`."""
        slot = self._session.start(start, listener)
        self._link.wake()
        return slot

    def abort(self, slot: Slot) -> None:
        """Drops a sequence; its listener hears nothing more. Nothing happens when it has ended."""
        self._session.abort(slot)
        self._link.wake()

    async def close(self) -> None:
        """Sends what is left to say and ends the stream well."""
        self._link.close()
        await asyncio.wait({self._task}, timeout=_CLOSE_TIMEOUT_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._link.run()
        finally:
            self._end(lost=False)
            await self._channel.close()

    def _end(self, *, lost: bool) -> None:
        if self._gone:
            return
        self._gone = True
        self._stop_grace()
        self._session.lose_all("is lost")
        self._on_gone(self, lost)

    def _give_up(self) -> None:
        _log.warning("worker lost", extra={"worker_id": self.worker_id, "epoch": self.epoch})
        self._end(lost=True)
        self._task.cancel()

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _hello(self) -> run_pb2.RunRequest:
        hello = run_pb2.RunHello(gateway_id=self._gateway_id, epoch=self.epoch, takes_later=True)
        hello.resume_after_step_seq = self._session.last_seq
        return run_pb2.RunRequest(hello=hello)

    def _on_connected(self, first: run_pb2.RunResponse) -> None:
        del first  # the hello held what it had to, or the worker would have refused ours
        self._stop_grace()
        self._session.connected()

    def _collect(self) -> run_pb2.RunRequest | None:
        batch = self._session.collect()
        return None if batch is None else _request(batch)

    def _on_message(self, response: run_pb2.RunResponse) -> None:
        for outputs in (response.outputs, *response.later):
            if not self._session.take(outputs.step_seq, _entries(outputs)):
                _log.error("steps are missing", extra={"worker_id": self.worker_id, "step_seq": outputs.step_seq})
                self._give_up()
                return
        if self._session.due:
            self._link.wake()

    def _on_broken(self, error: RemoteError | None) -> bool:
        code = grpc.StatusCode.OK if error is None else error.code
        if code in _WRONG_WORKER:
            self._end(lost=True)
        elif code in _SESSION_GONE:
            self._session.dropped_by_worker()
        if self._gone or self._session.idle:
            self._end(lost=False)
            return False
        if self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(self._grace_s, self._give_up)
        return True


def _request(batch: RunBatch) -> run_pb2.RunRequest:
    request = run_pb2.RunRequest(
        aborts=[run_pb2.Abort(slot=number, lease=lease) for number, lease in batch.aborts],
        acked_step_seq=batch.acked_step_seq,
    )
    for slot in batch.starts:
        _add_start(request, slot)
    return request


def _add_start(request: run_pb2.RunRequest, slot: Slot) -> None:
    start = slot.start
    request.starts.add(  # made in its place: one made apart is copied into it, ids and all
        slot=slot.number,
        lease=start.lease,
        request_id=start.request_id,
        choice=start.choice,
        ids=start.ids,
        prompt_len=start.prompt_len,
        params=_params(start.params),
        cache_salt=start.cache_salt,
        traceparent=start.traceparent,
        priority=start.priority,
        adapter=start.adapter,
    )


def _params(params: SequenceParams) -> run_pb2.SequenceParams:
    return run_pb2.SequenceParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=[run_pb2.LogitBias(id=token, bias=bias) for token, bias in params.logit_bias],
    )


def _entries(outputs: run_pb2.StepOutputs) -> Iterator[StepEntry]:
    entries = list(_columns(outputs))
    for logprobs in outputs.logprobs:
        output = entries[logprobs.entry].output
        if logprobs.prompt:
            output.prompt_logprobs = _logprobs(logprobs)
        else:
            output.logprobs = _logprobs(logprobs)
    for timing in outputs.timings:
        entries[timing.entry].output.timing = SequenceTiming(
            cached_tokens=timing.cached_tokens,
            queue_us=timing.queue_us,
            prefill_us=timing.prefill_us,
            preemptions=timing.preemptions,
        )
    for error in outputs.errors:
        entries[error.entry].error_reason = error.reason
        entries[error.entry].error_message = error.message
    return iter(entries)


def _columns(outputs: run_pb2.StepOutputs) -> Iterator[StepEntry]:
    # One slice of the whole is far cheaper than an index into the message for each id.
    ids, begin = list(outputs.ids), 0
    columns = zip(outputs.slot, outputs.lease, outputs.start_pos, outputs.n_new, outputs.finish, strict=True)
    for slot, lease, start_pos, n_new, finish in columns:
        output = SequenceOutput(ids=ids[begin : begin + n_new], finish=SequenceFinish(finish))
        begin += n_new
        yield StepEntry(slot=slot, lease=lease, start_pos=start_pos, output=output)


def _logprobs(logprobs: run_pb2.SlotLogprobs) -> LogprobColumns:
    return LogprobColumns(
        k=logprobs.k,
        chosen=list(logprobs.chosen),
        top_ids=list(logprobs.top_ids),
        top_logprobs=list(logprobs.top_logprobs),
    )
