"""The slots of one Run link: which sequence has which number, and what must be said again when the link comes back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.plan import SequenceParams


class SequenceFinish(IntEnum):
    """Why a sequence ended; the numbers are those of lmesh.worker.v1.SequenceFinish."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ABORTED = 3
    ERROR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """One choice to run; fields as in lmesh.worker.v1.Start."""

    lease: int
    request_id: str
    choice: int
    ids: Sequence[int]
    prompt_len: int
    params: SequenceParams
    cache_salt: str
    traceparent: str
    priority: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTiming:
    """What happened in the worker before the first output."""

    cached_tokens: int
    queue_us: int
    prefill_us: int
    preemptions: int


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """What one engine step gave one sequence; `finish` is RUNNING, STOP or LENGTH."""

    ids: Sequence[int]
    finish: SequenceFinish
    logprobs: LogprobColumns | None = None
    prompt_logprobs: LogprobColumns | None = None
    timing: SequenceTiming | None = None


class SequenceListener(Protocol):
    """The owner of a sequence. Called by the link's reader: must neither block nor wait for a client."""

    def on_output(self, output: SequenceOutput) -> None:
        """New ids, in order, each exactly once."""
        ...

    def on_lost(self, error: ServiceError) -> None:
        """Nothing more comes; the slot is free."""
        ...


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence on a link."""

    number: int
    start: SequenceStart
    listener: SequenceListener | None  # None once aborted: what still comes is dropped
    next_pos: int  # absolute position of its next new id
    sent: bool = False
    confirmed: bool = False  # an output has come, so the worker did take the start
    restarts: int = 0


class SlotTable:
    """Numbers are reused once the worker has said that their sequence ended, or when it never heard of it."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._free: list[int] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    def open(self, start: SequenceStart, listener: SequenceListener) -> Slot:
        """Gives a sequence a number that no other live one has."""
        slot = Slot(self._number(), start, listener, len(start.ids))
        self._slots[slot.number] = slot
        return slot

    def find(self, number: int, lease: int) -> Slot | None:
        """The slot of that number, if it runs under that lease."""
        slot = self._slots.get(number)
        return slot if slot is not None and slot.start.lease == lease else None

    def close(self, slot: Slot) -> None:
        """Its sequence has ended in the worker, or was never sent: the number is free."""
        if self._slots.get(slot.number) is slot:
            del self._slots[slot.number]
            self._free.append(slot.number)

    def forget(self, slot: Slot) -> None:
        """Nobody knows whether the worker has it: the number is never used again."""
        if self._slots.get(slot.number) is slot:
            del self._slots[slot.number]

    def renumber(self, slot: Slot) -> None:
        """A fresh number for a sequence whose start may have been lost; the old one is never used again."""
        self.forget(slot)
        slot.number = self._number()
        slot.sent = False
        self._slots[slot.number] = slot

    def _number(self) -> int:
        return self._free.pop() if self._free else next(self._numbers)
