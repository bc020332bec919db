"""Gathers one step's outputs into a `StepReport`."""

from __future__ import annotations

import time

from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.kv_changes import KvChanges
from lmesh_worker.messages import Finish, Load, Logprobs, SequenceError, StepReport, Timing

_RUNNING = int(Finish.RUNNING)


class ReportBuilder:
    """Columns of the report that is being gathered; each sequence has at most one entry."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._start_pos: list[int] = []
        self._n_new: list[int] = []
        self._ids: list[int] = []  # entry after entry
        self._finish: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._errors: list[SequenceError] = []
        self._timings: list[Timing] = []
        self._entry: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def _at(self, key: int, position: int) -> int:
        entry = self._entry.get(key)
        if entry is None:
            entry = self._entry[key] = len(self._keys)
            self._keys.append(key)
            self._start_pos.append(position)
            self._n_new.append(0)
            self._finish.append(_RUNNING)
        return entry

    def token(self, sequence: Sequence, token_id: int) -> None:
        """A new id, already appended to the sequence."""
        entry = self._at(sequence.key, len(sequence.ids) - 1)
        self._n_new[entry] += 1
        if entry == len(self._keys) - 1:
            self._ids.append(token_id)
        else:
            self._ids.insert(sum(self._n_new[: entry + 1]) - 1, token_id)

    def first_output(self, sequence: Sequence) -> None:
        """Notes the timing of a sequence's first output; called after `token`, where there is one."""
        sequence.first_output_at = time.monotonic()
        queued = sequence.first_scheduled_at - sequence.started_at
        prefill = sequence.first_output_at - sequence.first_scheduled_at
        entry = self._at(sequence.key, len(sequence.ids))
        timing = Timing(entry, sequence.cached_tokens, _micros(queued), _micros(prefill), sequence.preemptions)
        self._timings.append(timing)

    def logprobs(
        self, sequence: Sequence, *, prompt: bool, k: int, chosen: list[float], ids: list[int], values: list[float]
    ) -> None:
        """Log-probabilities of new tokens, or of the prompt; called after `token`, where there is one."""
        entry = self._at(sequence.key, len(sequence.ids))
        self._logprobs.append(Logprobs(entry, prompt, chosen, k, ids, values))

    def finish(self, key: int, finish: Finish, position: int) -> None:
        """A sequence's end; `position` is where its next id would have gone."""
        self._finish[self._at(key, position)] = int(finish)

    def error(self, key: int, reason: str, message: str, position: int) -> None:
        """A sequence's end by an error."""
        self.finish(key, Finish.ERROR, position)
        self._errors.append(SequenceError(self._entry[key], reason, message))

    def build(self, load: Load, kv: KvChanges, *, weights_version: int, step_us: int) -> StepReport:
        """The report, with all that `kv` has; the builder is spent."""
        kv_added, kv_removed = kv.take()
        return StepReport(
            keys=self._keys,
            start_pos=self._start_pos,
            n_new=self._n_new,
            ids=self._ids,
            finish=self._finish,
            load=load,
            weights_version=weights_version,
            step_us=step_us,
            logprobs=self._logprobs,
            errors=self._errors,
            timings=self._timings,
            kv_added=kv_added,
            kv_removed=kv_removed,
        )


def _micros(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
