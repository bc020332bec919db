"""One gateway's session with one boot of one worker: what to send, what has come, what a broken stream costs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from lmesh_chassis.errors import ServiceError
from lmesh_chassis.interceptors import internal_error

from lmesh_gateway.errors import WorkerFailedError, WorkerLostError
from lmesh_gateway.metrics import DROPPED_OUTPUTS
from lmesh_gateway.slots import SequenceFinish, SequenceListener, SequenceOutput, SequenceStart, Slot, SlotTable

_log = logging.getLogger(__name__)

# Prompt ids in one batch; at up to 5 bytes an id this stays well below the message size limit.
_MAX_IDS = 1_000_000
# The worker keeps steps for a resume until they are acknowledged; once every so many steps is enough.
_ACK_EVERY = 16
# A sequence that had not begun when its session was dropped is begun anew this often.
_MOST_RESTARTS = 2
# What a worker says of itself rather than of the sequence: another worker, or the same one later, can run it.
_NOT_THE_REQUESTS = {
    "ENGINE_DIED": "lost its engine",
    "ADAPTER_NOT_LOADED": "does not hold the request's adapter",
}


@dataclass(slots=True, kw_only=True)
class StepEntry:
    """One sequence's part of a step."""

    slot: int
    lease: int
    start_pos: int
    output: SequenceOutput
    error_reason: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBatch:
    """What goes to the worker in one message: sequences to start, (slot, lease) to drop, last step taken."""

    starts: tuple[Slot, ...]
    aborts: tuple[tuple[int, int], ...]
    acked_step_seq: int


class RunSession:
    """Pure bookkeeping, no sockets. Outputs reach listeners in order and exactly once, or their loss is told."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.last_seq = 0
        self._acked_seq = 0
        self._connected_before = False
        self._slots = SlotTable()
        self._starts: list[Slot] = []
        self._aborts: list[tuple[int, int]] = []

    @property
    def idle(self) -> bool:
        """No sequence lives."""
        return not len(self._slots)

    @property
    def due(self) -> bool:
        """Whether `collect` has something to send."""
        unacked = self.last_seq - self._acked_seq
        return bool(self._starts or self._aborts or unacked >= _ACK_EVERY or (unacked and self.idle))

    def start(self, start: SequenceStart, listener: SequenceListener) -> Slot:
        """Takes a sequence; the handle is for `abort`."""
        slot = self._slots.open(start, listener)
        self._starts.append(slot)
        return slot

    def abort(self, slot: Slot) -> None:
        """Drops a sequence; its listener hears nothing more. Nothing happens when it has ended."""
        if slot.listener is None:
            return
        slot.listener = None
        if self._slots.find(slot.number, slot.start.lease) is not slot:
            return
        if slot.sent:
            self._aborts.append((slot.number, slot.start.lease))
        else:
            self._starts.remove(slot)
            self._slots.close(slot)

    def collect(self) -> RunBatch | None:
        """The next batch to send, or None."""
        if not self.due:
            return None
        aborts = tuple(self._aborts)
        self._aborts.clear()
        self._acked_seq = self.last_seq
        return RunBatch(starts=self._next_starts(), aborts=aborts, acked_step_seq=self.last_seq)

    def _next_starts(self) -> tuple[Slot, ...]:
        budget, count = _MAX_IDS, 0
        while count < len(self._starts) and budget > 0:
            budget -= len(self._starts[count].start.ids)
            count += 1
        taken, self._starts = self._starts[:count], self._starts[count:]
        for slot in taken:
            slot.sent = True
        return tuple(taken)

    def connected(self) -> None:
        """A stream is up. What an earlier one may have swallowed is said again, harmlessly if it did arrive."""
        again, self._connected_before = self._connected_before, True
        if not again:
            return
        for slot in self._slots:
            if not slot.sent or (slot.confirmed and slot.listener is not None):
                continue
            self._aborts.append((slot.number, slot.start.lease))
            if slot.confirmed:
                continue  # aborted, and its end will be told
            if slot.listener is None:
                self._slots.forget(slot)
            else:
                # Should the worker have it, it ends there; what it sends under the old number finds nobody.
                self._restart(slot)

    def take(self, step_seq: int, entries: Iterable[StepEntry]) -> bool:
        """Delivers one step; False when steps before it are missing, which no resume can mend."""
        if step_seq <= self.last_seq:
            return True  # sent again, and taken before
        if step_seq != self.last_seq + 1:
            return False
        self.last_seq = step_seq
        for entry in entries:
            self._deliver(entry)
        return True

    def dropped_by_worker(self) -> None:
        """The worker lives and no longer holds this session: what had begun is lost, the rest begins anew."""
        self.last_seq = self._acked_seq = 0
        self._connected_before = False
        self._aborts.clear()
        for slot in self._slots:
            if slot.confirmed or slot.listener is None or slot.restarts >= _MOST_RESTARTS:
                self._lose(slot, self._lost("dropped this gateway's requests"))
            elif slot.sent:
                self._restart(slot)

    def lose_all(self, what: str) -> None:
        """Nothing more comes: every listener hears WORKER_LOST, with `what` the worker did."""
        self._aborts.clear()
        for slot in self._slots:
            self._lose(slot, self._lost(what))

    def _restart(self, slot: Slot) -> None:
        slot.restarts += 1
        self._slots.renumber(slot)
        self._starts.append(slot)

    def _lose(self, slot: Slot, error: ServiceError) -> None:
        # The loss of one choice may have dropped another one of this very round, which then has gone already.
        self._slots.forget(slot)
        if slot in self._starts:
            self._starts.remove(slot)
        listener, slot.listener = slot.listener, None
        if listener is not None:
            listener.on_lost(error)

    def _deliver(self, entry: StepEntry) -> None:
        slot = self._slots.find(entry.slot, entry.lease)
        if slot is None:
            DROPPED_OUTPUTS.inc()
            return
        slot.confirmed = True
        if entry.output.finish is not SequenceFinish.RUNNING:
            self._slots.close(slot)
        if slot.listener is None:
            return
        if (fault := self._fault(slot, entry)) is not None:
            self._fail(slot, fault)
            return
        slot.next_pos += len(entry.output.ids)
        try:
            slot.listener.on_output(entry.output)
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the link of all the others
            self._fail(slot, internal_error(error, "run_session"))

    def _fail(self, slot: Slot, error: ServiceError) -> None:
        listener = slot.listener
        self.abort(slot)
        if listener is not None:
            listener.on_lost(error)

    def _fault(self, slot: Slot, entry: StepEntry) -> ServiceError | None:
        if entry.output.finish is SequenceFinish.ABORTED:
            return self._lost("dropped the request")
        if entry.output.finish is SequenceFinish.ERROR:
            if (what := _NOT_THE_REQUESTS.get(entry.error_reason)) is not None:
                return self._lost(what, entry.error_reason)
            return self._failed(entry.error_message or "it gave no reason", entry.error_reason)
        if entry.output.ids and entry.start_pos != slot.next_pos:
            text = f"it sent ids for position {entry.start_pos} where {slot.next_pos} was due"
            return self._failed(text, "POSITION_MISMATCH")
        return None

    def _lost(self, what: str, worker_reason: str = "") -> WorkerLostError:
        metadata = {"worker_id": self.worker_id} | ({"worker_reason": worker_reason} if worker_reason else {})
        return WorkerLostError(f"worker {self.worker_id} {what}", metadata=metadata)

    def _failed(self, text: str, reason: str) -> WorkerFailedError:
        metadata = {"worker_id": self.worker_id, "worker_reason": reason}
        return WorkerFailedError(f"worker {self.worker_id} failed on the request: {text}", metadata=metadata)
