"""One gateway's session: its sequences, and the outputs that it has not acknowledged yet."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from lmesh_chassis.errors import ServiceError

from lmesh_worker.errors import ReplayGoneError, SlowConsumerError, SupersededError
from lmesh_worker.outputs import SessionStep
from lmesh_worker.spans import SequenceSpan
from lmesh_worker.step_parts import parts


@dataclass(slots=True, eq=False)
class Sequence:
    """One live sequence as the server sees it."""

    key: int  # the engine's name for it
    request_id: str
    slot: int
    lease: int
    session: Session
    next_pos: int  # absolute position of its next new id
    span: SequenceSpan


@dataclass(slots=True, eq=False)
class Stream:
    """One attachment of a gateway; a later one replaces it."""

    cursor: int  # the last step_seq taken for this stream
    written: int  # the last one that gRPC has taken
    ended: asyncio.Future[None]  # resolves when the stream should end well, fails when with an error


@dataclass(slots=True, eq=False)
class Session:
    """Outlives its stream for a grace period; numbers steps from 1 without a gap."""

    gateway_id: str
    max_unacked_steps: int
    max_unacked_bytes: int
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by slot
    stream: Stream | None = None
    expiry: asyncio.TimerHandle | None = None
    _unacked: deque[tuple[SessionStep, int]] = field(default_factory=deque)  # with the bytes that count for each
    _unacked_bytes: int = 0
    _last_seq: int = 0
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def oldest_step_seq(self) -> int:
        """The oldest step that can still be sent again (the next one, if none is held)."""
        return self._unacked[0][0].step_seq if self._unacked else self._last_seq + 1

    @property
    def flushed(self) -> bool:
        """Whether gRPC has taken all that there is."""
        return self._last_seq == 0 or (self.stream is not None and self.stream.written == self._last_seq)

    def push(self, step: SessionStep) -> bool:
        """Numbers and holds an engine step; False when the gateway is too far behind and must be dropped.

        A step too large for one message is numbered as several. However large, it counts for a quarter of the bound at
        most: whoever asks for a long prompt's log-probabilities is not slow by that.
        """
        pieces = parts(step)
        share = self.max_unacked_bytes // 4 // len(pieces)
        for piece in pieces:
            self._last_seq += 1
            piece.step_seq = self._last_seq
            counted = min(piece.nbytes, share)
            self._unacked.append((piece, counted))
            self._unacked_bytes += counted
        self._woken.set()
        return len(self._unacked) <= self.max_unacked_steps and self._unacked_bytes <= self.max_unacked_bytes

    def acknowledge(self, step_seq: int) -> None:
        """Steps up to `step_seq` need not be held any more."""
        while self._unacked and self._unacked[0][0].step_seq <= step_seq:
            self._unacked_bytes -= self._unacked.popleft()[1]

    def attach(self, resume_after: int) -> Stream:
        """A new stream, which continues after step `resume_after`; ReplayGoneError when that is not possible."""
        if not self.oldest_step_seq - 1 <= resume_after <= self._last_seq:
            raise ReplayGoneError(
                f"steps {self.oldest_step_seq} to {self._last_seq} are held, not those after {resume_after}; "
                "attach anew with resume_after_step_seq 0",
                metadata={"oldest_step_seq": str(self.oldest_step_seq)},
            )
        self.end_stream(SupersededError("a newer stream of this gateway took over"))
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        self.acknowledge(resume_after)
        self.stream = Stream(resume_after, resume_after, asyncio.get_running_loop().create_future())
        return self.stream

    def end_stream(self, error: ServiceError | None) -> None:
        """Ends the attached stream, if any, with `error` or (None) well."""
        stream, self.stream = self.stream, None
        if stream is None or stream.ended.done():
            return
        if error is None:
            stream.ended.set_result(None)
        else:
            stream.ended.set_exception(error)

    async def next_steps(self, stream: Stream, most_bytes: int) -> list[SessionStep]:
        """The stream's next steps, in order: as many as there are, up to `most_bytes`; waits for one."""
        while stream.cursor >= self._last_seq:
            self._woken.clear()
            await self._woken.wait()
        # Steps are contiguous, so the place follows from the number (acknowledged ones have left at the front).
        place = max(0, stream.cursor + 1 - self.oldest_step_seq)
        steps = [self._unacked[place][0]]
        size = steps[0].nbytes
        for step, _ in islice(self._unacked, place + 1, None):
            if (size := size + step.nbytes) > most_bytes:
                break
            steps.append(step)
        stream.cursor = steps[-1].step_seq
        return steps


def too_slow(session: Session) -> SlowConsumerError:
    """The error for a session whose `push` said False."""
    return SlowConsumerError(
        f"more than {session.max_unacked_steps} steps or {session.max_unacked_bytes} bytes were not acknowledged; "
        "its sequences here were aborted"
    )
