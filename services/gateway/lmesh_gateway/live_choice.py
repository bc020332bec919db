"""One choice of a live request: what of it has come, whichever workers it came from."""

from __future__ import annotations

from collections.abc import Sequence

from lmesh_gateway.choice import ChoiceAssembler, Piece
from lmesh_gateway.generation import ChoiceEnd, FinishReason
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.plan import Plan
from lmesh_gateway.slots import SequenceFinish, SequenceOutput

_REASONS: dict[SequenceFinish, FinishReason] = {SequenceFinish.STOP: "stop", SequenceFinish.LENGTH: "length"}


class LiveChoice:
    """Outlives its placements: the next one continues from `ids`."""

    def __init__(self, plan: Plan, index: int, ids: Sequence[int] = (), end: ChoiceEnd | None = None) -> None:
        """`ids` and `end` are what came of it elsewhere."""
        self.index = index
        self.ids = list(ids)  # all that count: a stop string ends them with the id that completed it
        self.end = end
        self.prompt_scored = bool(ids) or end is not None  # the prompt's log-probabilities have gone out
        self._scores_prompt = index == 0 and plan.params.prompt_logprobs >= 0
        self._prompt_logprobs: LogprobColumns | None = None  # what has come of them so far
        self._assembler = assembler(plan)
        if end is None:
            self._assembler.push(self.ids)

    @property
    def completion_tokens(self) -> int:
        """Ids that count."""
        return len(self.ids)

    def begin(self) -> None:
        """A new placement runs it: what has come of the prompt's log-probabilities comes again."""
        self._prompt_logprobs = None

    def push(self, output: SequenceOutput) -> Piece:
        """One step's output; sets `end` with the last one."""
        piece = self._assembler.push(output.ids, finish=_REASONS.get(output.finish), logprobs=output.logprobs)
        self.ids += piece.ids
        if piece.reason is not None:
            self.end = ChoiceEnd(
                choice=self.index,
                reason=piece.reason,
                stop_string=piece.stop_string,
                stop_token_id=piece.stop_token_id,
            )
        return piece

    def prompt_logprobs(self, output: SequenceOutput) -> LogprobColumns | None:
        """The prompt's log-probabilities, once, when they are whole; a prompt computed in parts gives them so."""
        if not self._scores_prompt or self.prompt_scored:
            return None
        if output.prompt_logprobs is not None:
            if self._prompt_logprobs is None:
                self._prompt_logprobs = LogprobColumns(k=output.prompt_logprobs.k)
            self._prompt_logprobs.extend(output.prompt_logprobs)
        if not output.ids and output.finish is SequenceFinish.RUNNING:
            return None
        self.prompt_scored = True
        columns, self._prompt_logprobs = self._prompt_logprobs, None
        return columns


def assembler(plan: Plan) -> ChoiceAssembler:
    """What makes text of a choice's ids, from the first one on."""
    return ChoiceAssembler(
        plan.model.tokenizer,
        prompt_ids=plan.prompt_ids,
        stop=plan.stop,
        keep_special_tokens=plan.keep_special_tokens,
    )
