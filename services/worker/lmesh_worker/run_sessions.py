"""All gateways' sessions: (slot, lease) on their side, the engine's keys on the other."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection

from lmesh_chassis.errors import DrainingError, ServiceError

from lmesh_worker import errors
from lmesh_worker.errors import EngineDiedError, NotReadyError, ReplayGoneError, StaleEpochError
from lmesh_worker.messages import Abort, Command, Finish, SequenceError, Start, StepReport
from lmesh_worker.outputs import SessionStep, split
from lmesh_worker.revoked_leases import RevokedLeases
from lmesh_worker.run_order import SessionLimits, StartOrder
from lmesh_worker.session import Sequence, Session, Stream, too_slow
from lmesh_worker.spans import SequenceSpan
from lmesh_worker.start_check import Fault, Limits, find_fault

_log = logging.getLogger(__name__)


class RunSessions:
    """Owned by the event loop; nothing here waits for a gateway or for the engine.

    `send` hands a command to the engine, of which `engine_behind` says whether it has stopped taking them; `epoch` is
    this boot's id.
    """

    def __init__(
        self,
        *,
        epoch: str,
        limits: SessionLimits,
        send: Callable[[Command], None],
        engine_behind: Callable[[], bool] = lambda: False,
    ) -> None:
        self._epoch = epoch
        self._limits = limits
        self._send = send
        self._engine_behind = engine_behind
        self._revoked = RevokedLeases()
        self._sessions: dict[str, Session] = {}
        self._sequences: dict[int, Sequence] = {}  # by key
        self._keys = itertools.count(1)
        self._start_limits: Limits | None = None
        self._gone: ServiceError | None = None
        self._changed = asyncio.Event()
        self.weights_version = 0
        self.slow_consumers = 0  # sessions dropped so far
        self.revoked_sequences = 0  # dropped because the scheduler took their lease back

    @property
    def live(self) -> int:
        """Sequences given to the engine and not ended."""
        return len(self._sequences)

    def open(self, limits: Limits, weights_version: int) -> None:
        """The engine is ready: starts are taken from here on."""
        self._start_limits = limits
        self.weights_version = weights_version

    def attach(self, gateway_id: str, epoch: str, resume_after: int) -> tuple[Session, Stream]:
        """Attaches a gateway's stream to its session, new or kept; a ServiceError says why not."""
        if self._gone is not None:
            raise self._gone
        if self._start_limits is None:
            raise NotReadyError("the engine still loads", retry_after_ms=1000)
        if epoch != self._epoch:
            raise StaleEpochError(f"this worker's epoch is {self._epoch}", field="hello.epoch")
        session = self._sessions.get(gateway_id)
        if session is None:
            session = self._new_session(gateway_id, resume_after)
        try:
            return session, session.attach(resume_after)
        except ReplayGoneError as error:
            self._drop(session, error)
            raise

    def _new_session(self, gateway_id: str, resume_after: int) -> Session:
        if resume_after:
            raise ReplayGoneError("no session of this gateway is held; attach anew with resume_after_step_seq 0")
        session = Session(gateway_id, self._limits.max_unacked_steps, self._limits.max_unacked_bytes)
        self._sessions[gateway_id] = session
        return session

    def detach(self, session: Session, stream: Stream) -> None:
        """The stream is gone; the session waits for the gateway to come back, then its sequences are aborted."""
        if session.stream is not stream:
            return  # superseded, or the session was dropped
        session.stream = None
        self._changed.set()
        if self._sessions.get(session.gateway_id) is session:
            loop = asyncio.get_running_loop()
            session.expiry = loop.call_later(self._limits.grace_s, self._expire, session)

    def _expire(self, session: Session) -> None:
        if session.sequences:
            extra = {"gateway_id": session.gateway_id, "sequences": len(session.sequences)}
            _log.warning("gateway did not come back, its sequences are aborted", extra=extra)
        self._drop(session, None)

    def start(self, session: Session, order: StartOrder) -> None:
        """Runs a sequence; a faulty order ends at once with ERROR, as an output of its own."""
        fault = self._fault(session, order)
        if fault is not None:
            self._emit(session, order.slot, order.lease, len(order.ids), Finish.ERROR, fault)
            return
        if order.lease in self._revoked or self._engine_behind():
            # Not the request's fault, so no error: to its gateway this placement is lost.
            _log.warning("a start is not taken", extra={"request_id": order.request_id, "lease": order.lease})
            self._emit(session, order.slot, order.lease, len(order.ids), Finish.ABORTED, None)
            return
        span = SequenceSpan(
            order.traceparent, request_id=order.request_id, choice=order.choice, prompt_tokens=order.prompt_len
        )
        key = next(self._keys)
        sequence = Sequence(key, order.request_id, order.slot, order.lease, session, len(order.ids), span)
        session.sequences[order.slot] = sequence
        self._sequences[key] = sequence
        self._send(
            Start(
                key=key,
                request_id=order.request_id,
                choice=order.choice,
                ids=order.ids,
                prompt_len=order.prompt_len,
                params=order.params,
                cache_salt=order.cache_salt,
                priority=order.priority,
                adapter=order.adapter,
            )
        )

    def _fault(self, session: Session, order: StartOrder) -> Fault | None:
        if self._start_limits is None or self._gone is not None:
            return Fault(errors.ENGINE_DIED, "this worker has no engine now")
        if order.slot in session.sequences:
            return Fault(errors.SLOT_IN_USE, f"slot {order.slot} runs under another lease; choose a free one")
        return find_fault(order.ids, order.prompt_len, order.params, self._start_limits)

    def abort(self, session: Session, slot: int, lease: int) -> None:
        """Drops a sequence; ignored when the slot runs under another lease, or not at all."""
        sequence = session.sequences.get(slot)
        if sequence is None or sequence.lease != lease:
            return
        self._send(Abort(sequence.key))
        self._remove(sequence, Finish.ABORTED)
        # The slot is free at once: what the engine still says about this key finds nobody.
        self._emit(session, slot, lease, sequence.next_pos, Finish.ABORTED, None)

    def revoke(self, leases: Collection[int]) -> None:
        """The scheduler took these leases back: their sequences are dropped, and their gateways hear ABORTED.

        A start that was under way meanwhile will not be taken either.
        """
        self._revoked.add(leases)
        gone = frozenset(leases)
        for session in list(self._sessions.values()):
            step = SessionStep(self.weights_version)
            for sequence in [s for s in session.sequences.values() if s.lease in gone]:
                self._send(Abort(sequence.key))
                self._remove(sequence, Finish.ABORTED)
                self.revoked_sequences += 1
                step.add(sequence.slot, sequence.lease, sequence.next_pos, [], Finish.ABORTED)
            if step.slot:
                self._push(session, step)

    def held(self) -> dict[tuple[str, int], int]:
        """Placements that run, (request id, lease), and how many sequences of each."""
        return Counter((s.request_id, s.lease) for s in self._sequences.values())

    def take(self, report: StepReport) -> None:
        """Shares one engine step out among the gateways: at most one step each."""
        self.weights_version = report.weights_version
        steps, places = split(report, self._owner_of)
        for timing in report.timings:
            if timing.entry in places:
                self._sequences[report.keys[timing.entry]].span.first_output(timing, report.step_us)
        reasons = {error.entry: error.reason for error in report.errors}
        for index in places:
            sequence = self._sequences[report.keys[index]]
            sequence.next_pos = report.start_pos[index] + report.n_new[index]
            sequence.span.count(report.n_new[index])
            if report.finish[index] != Finish.RUNNING:
                self._remove(sequence, report.finish[index], reasons.get(index, ""))
        for session, step in steps.items():
            self._push(session, step)

    def _owner_of(self, key: int) -> tuple[Session, int, int] | None:
        sequence = self._sequences.get(key)
        return None if sequence is None else (sequence.session, sequence.slot, sequence.lease)

    def engine_died(self, message: str) -> None:
        """Every sequence ends with ERROR ENGINE_DIED, and no stream is taken any more."""
        self._gone = EngineDiedError("the worker's engine died; the worker is leaving")
        for session in list(self._sessions.values()):
            step = SessionStep(self.weights_version)
            for sequence in list(session.sequences.values()):
                entry = step.add(sequence.slot, sequence.lease, sequence.next_pos, [], Finish.ERROR)
                step.errors.append(SequenceError(entry, errors.ENGINE_DIED, message))
                self._remove(sequence, Finish.ERROR, errors.ENGINE_DIED)
            if step.slot:
                self._push(session, step)

    def _emit(
        self, session: Session, slot: int, lease: int, start_pos: int, finish: Finish, fault: Fault | None
    ) -> None:
        step = SessionStep(self.weights_version)
        entry = step.add(slot, lease, start_pos, [], finish)
        if fault is not None:
            step.errors.append(SequenceError(entry, fault.reason, fault.message))
        self._push(session, step)

    def _push(self, session: Session, step: SessionStep) -> None:
        if session.push(step):
            return
        self.slow_consumers += 1
        extra = {"gateway_id": session.gateway_id, "sequences": len(session.sequences)}
        _log.warning("gateway too slow, its session is dropped", extra=extra)
        self._drop(session, too_slow(session))

    def _remove(self, sequence: Sequence, finish: int, reason: str = "") -> None:
        del self._sequences[sequence.key]
        del sequence.session.sequences[sequence.slot]
        sequence.span.end(finish, reason)
        self._changed.set()

    def _drop(self, session: Session, error: ServiceError | None) -> None:
        for sequence in list(session.sequences.values()):
            self._send(Abort(sequence.key))
            self._remove(sequence, Finish.ABORTED)
        if session.expiry is not None:
            session.expiry.cancel()
        if self._sessions.get(session.gateway_id) is session:
            del self._sessions[session.gateway_id]
        session.end_stream(error)
        self._changed.set()

    def written(self, stream: Stream, step_seq: int) -> None:
        """gRPC has taken a step of this stream; whoever waits for the end looks again."""
        stream.written = step_seq
        self._changed.set()

    def leave(self, session: Session) -> None:
        """The gateway ended its side; a session without sequences is not kept for a return."""
        if not session.sequences:
            self._drop(session, None)

    async def drained(self) -> None:
        """Returns once no sequence lives and every attached stream was given all its outputs."""
        while self._sequences or any(s.stream is not None and not s.flushed for s in self._sessions.values()):
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Aborts what is left, ends all streams well and takes no new ones."""
        self._gone = self._gone or DrainingError("this worker is leaving")
        for session in list(self._sessions.values()):
            self._drop(session, None)
