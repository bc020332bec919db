"""Step outputs on their way from the engine to gateways: one engine step split into one step a gateway."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from lmesh_worker.messages import Logprobs, SequenceError, StepReport, Timing

ENTRY_BYTES = 48  # about what one entry's columns and bookkeeping take

Owner = TypeVar("Owner", bound=Hashable)


@dataclass(slots=True)
class SessionStep:
    """What one engine step gave one gateway, in columns; `step_seq` is set when its session takes it."""

    weights_version: int
    step_seq: int = 0
    slot: list[int] = field(default_factory=list)
    lease: list[int] = field(default_factory=list)
    start_pos: list[int] = field(default_factory=list)
    n_new: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # CSR by n_new
    finish: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    errors: list[SequenceError] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """About how much memory it holds; for bounding, not for accounting."""
        columns = 4 * len(self.ids) + ENTRY_BYTES * len(self.slot)
        return columns + sum(8 * (len(entry.chosen) + 2 * len(entry.top_ids)) for entry in self.logprobs)

    def add(self, slot: int, lease: int, start_pos: int, ids: list[int], finish: int) -> int:
        """Appends one sequence's part; returns its entry."""
        self.slot.append(slot)
        self.lease.append(lease)
        self.start_pos.append(start_pos)
        self.n_new.append(len(ids))
        self.ids += ids
        self.finish.append(finish)
        return len(self.slot) - 1


def split(
    report: StepReport, owner_of: Callable[[int], tuple[Owner, int, int] | None]
) -> tuple[dict[Owner, SessionStep], dict[int, tuple[Owner, int]]]:
    """Splits a report by owner; `owner_of(key)` gives (owner, slot, lease), or None for a key that nobody waits for.

    Also returns, for each report entry taken, its owner and its entry in that owner's step.
    """
    steps: dict[Owner, SessionStep] = {}
    places: dict[int, tuple[Owner, int]] = {}
    begin = 0
    for index, key in enumerate(report.keys):
        end = begin + report.n_new[index]
        if (found := owner_of(key)) is not None:
            owner, slot, lease = found
            step = steps.setdefault(owner, SessionStep(report.weights_version))
            entry = step.add(slot, lease, report.start_pos[index], report.ids[begin:end], report.finish[index])
            places[index] = (owner, entry)
        begin = end
    _share_details(report, steps, places)
    return steps, places


def _share_details(report: StepReport, steps: dict[Owner, SessionStep], places: dict[int, tuple[Owner, int]]) -> None:
    for logprobs in report.logprobs:
        if logprobs.entry in places:
            owner, entry = places[logprobs.entry]
            steps[owner].logprobs.append(msgspec.structs.replace(logprobs, entry=entry))
    for error in report.errors:
        if error.entry in places:
            owner, entry = places[error.entry]
            steps[owner].errors.append(msgspec.structs.replace(error, entry=entry))
    for timing in report.timings:
        if timing.entry in places:
            owner, entry = places[timing.entry]
            steps[owner].timings.append(msgspec.structs.replace(timing, entry=entry))
