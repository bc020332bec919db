"""Takes a finished step's results into its sequences: new ids, ends, failures."""

from __future__ import annotations

from collections.abc import Callable

from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.outputs import ReportBuilder
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.runner import Scores, StepResult
from lmesh_worker.engine.sequence import Sequence, State

NON_FINITE_LOGITS = "NON_FINITE_LOGITS"


class Committer:
    """Applies results; what was aborted, rolled back or ended meanwhile is dropped here, never reported."""

    def __init__(self, batcher: Batcher, forget: Callable[[Sequence], None]) -> None:
        self._batcher, self._forget = batcher, forget
        self.generated_tokens = 0
        self.prompt_tokens = 0

    def apply(self, plan: StepPlan, result: StepResult, report: ReportBuilder) -> None:
        """Commits one step."""
        ids, finite = result.ids.tolist(), result.finite.tolist()
        sample = 0
        for index, row in enumerate(plan.rows):
            live = row.sequence.state is not State.ENDED and row.rollbacks == row.sequence.rollbacks
            if result.prompt_logprobs and live and index in result.prompt_logprobs:
                _take_scores(row, result.prompt_logprobs[index])
            if not row.samples:
                continue
            if live:
                self._take(row, ids[sample], finite[sample], result.logprobs.get(sample), report)
            sample += 1

    def _take(self, row: Row, token_id: int, finite: bool, scores: Scores | None, report: ReportBuilder) -> None:
        sequence = row.sequence
        sequence.pending -= 1
        if self._batcher.suspects and self._batcher.suspects[0] is sequence:
            self._batcher.suspects.popleft()  # it ran alone and did no harm
        if not finite:
            message = "the model's output for this sequence is not finite"
            report.error(sequence.key, NON_FINITE_LOGITS, message, len(sequence.ids))
            self._batcher.distrust(sequence)
            self._end(sequence)
            return
        wants_ids = sequence.params.max_tokens > 0
        if wants_ids:
            sequence.ids.append(token_id)
            report.token(sequence, token_id)
            self.generated_tokens += 1
        if not sequence.first_output_at:
            self._first_output(sequence, report)
        if scores is not None and wants_ids:
            chosen, ids, values = (t.flatten().tolist() for t in scores)
            k = sequence.params.logprobs
            report.logprobs(sequence, prompt=False, k=k, chosen=chosen, ids=ids, values=values)
        self._batcher.note_committed(row)
        if (finish := sequence.end(self._batcher.max_model_len)) is not None:
            report.finish(sequence.key, finish, len(sequence.ids))
            self._end(sequence)

    def _first_output(self, sequence: Sequence, report: ReportBuilder) -> None:
        report.first_output(sequence)
        self.prompt_tokens += sequence.prompt_len
        if sequence.params.prompt_logprobs >= 0:
            chosen, ids, values = sequence.prompt_logprobs
            k = sequence.params.prompt_logprobs
            report.logprobs(sequence, prompt=True, k=k, chosen=chosen, ids=ids, values=values)
            sequence.prompt_logprobs = ([], [], [])

    def _end(self, sequence: Sequence) -> None:
        self._batcher.remove(sequence)
        self._forget(sequence)


def _take_scores(row: Row, scores: Scores) -> None:
    """Puts a chunk's prompt scores where they belong: a recomputed chunk replaces what it gave before."""
    chosen, ids, values = row.sequence.prompt_logprobs
    k = row.sequence.params.prompt_logprobs
    del chosen[row.start :], ids[row.start * k :], values[row.start * k :]
    chosen += scores[0].tolist()
    ids += scores[1].flatten().tolist()
    values += scores[2].flatten().tolist()
