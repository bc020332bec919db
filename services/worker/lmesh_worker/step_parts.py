"""Cuts a step that is too large for one message; a gateway takes the parts as steps of their own."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from lmesh_worker.messages import Finish, Logprobs
from lmesh_worker.outputs import ENTRY_BYTES, SessionStep

# By `SessionStep.nbytes`; the message takes less than 1.5 times as much. Only a single entry may be larger, one token's
# alternatives of one sequence, which over the largest vocabularies stay far below the 16 MiB that a link takes.
MOST_BYTES = 1 << 20


def parts(step: SessionStep, most_bytes: int = MOST_BYTES) -> list[SessionStep]:
    """The step itself where it fits, else several that say the same in the same order.

    Prompt log-probabilities are cut between positions: they come in entries without ids, before the one that holds the
    ids, their log-probabilities and the end of the sequence. The timing comes with the first of a sequence's entries.
    """
    return [step] if step.nbytes <= most_bytes else _Cutter(step, most_bytes).cut()


class _Cutter:
    """Goes through the entries once and begins a new part where one is full."""

    def __init__(self, step: SessionStep, most_bytes: int) -> None:
        self._step, self._most = step, most_bytes
        self._prompts = {scores.entry: scores for scores in step.logprobs if scores.prompt}
        self._scores = {scores.entry: scores for scores in step.logprobs if not scores.prompt}
        self._errors = {error.entry: error for error in step.errors}
        self._timings = {timing.entry: timing for timing in step.timings}
        self._parts = [SessionStep(step.weights_version)]
        self._bytes = 0  # of the last part

    def cut(self) -> list[SessionStep]:
        step, begin = self._step, 0
        for index, count in enumerate(step.n_new):
            for piece in _pieces(self._prompts.get(index), self._most):
                self._add(index, [], Finish.RUNNING, piece)
            ids = step.ids[begin : begin + count]
            part, entry = self._add(index, ids, step.finish[index], self._scores.get(index))
            begin += count
            if index in self._errors:
                part.errors.append(replace(self._errors[index], entry=entry))
        return self._parts

    def _add(self, index: int, ids: list[int], finish: int, scores: Logprobs | None) -> tuple[SessionStep, int]:
        """Appends an entry of the step's sequence `index`; returns its part and its place there."""
        step, alone = self._step, SessionStep(self._step.weights_version)
        alone.add(step.slot[index], step.lease[index], step.start_pos[index], ids, finish)
        alone.logprobs += [] if scores is None else [scores]
        if self._bytes and self._bytes + alone.nbytes > self._most:
            self._parts.append(SessionStep(step.weights_version))
            self._bytes = 0
        self._bytes += alone.nbytes
        part = self._parts[-1]
        entry = part.add(step.slot[index], step.lease[index], step.start_pos[index], ids, finish)
        if scores is not None:
            part.logprobs.append(replace(scores, entry=entry))
        if (timing := self._timings.pop(index, None)) is not None:
            part.timings.append(replace(timing, entry=entry))
        return part, entry


def _pieces(scores: Logprobs | None, most_bytes: int) -> Iterator[Logprobs]:
    """A prompt's scores in runs of positions of about `most_bytes` each."""
    if scores is None:
        return
    k, rows = scores.k, max(1, (most_bytes - ENTRY_BYTES) // (8 * (1 + 2 * scores.k)))
    for at in range(0, len(scores.chosen), rows):
        to = at + rows
        ids, values = scores.top_ids[at * k : to * k], scores.top_logprobs[at * k : to * k]
        yield replace(scores, chosen=scores.chosen[at:to], top_ids=ids, top_logprobs=values)
