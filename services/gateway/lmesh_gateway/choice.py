"""One choice's text, ids and log-probabilities, put together from the pieces that a worker sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmesh_kernels.text.detokenize import Detokenizer
from lmesh_kernels.text.stops import StopMatcher
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_gateway.generation import FinishReason
from lmesh_gateway.logprobs import LogprobColumns


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one push added; `reason` is set on the last one. `stop_string` or `stop_token_id` say what ended it."""

    text: str
    ids: Sequence[int]
    logprobs: LogprobColumns | None
    reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None


class ChoiceAssembler:
    """Detokenizes, matches stop strings and counts; how the ids are cut into pushes changes nothing of the whole.

    A stop string ends the choice with the id that completes it: later ids are neither shown nor counted. A stop token
    is counted and listed among the ids, and is not part of the text.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        keep_special_tokens: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=not keep_special_tokens, prompt_ids=prompt_ids)
        self._matcher = StopMatcher(stop)
        self._has_stops = bool(stop)
        self.completion_tokens = 0

    def push(
        self, ids: Sequence[int], *, finish: FinishReason | None = None, logprobs: LogprobColumns | None = None
    ) -> Piece:
        """Takes new ids, with `finish` when they are the last; `finish` "stop" means that the last id is a stop token.

        Nothing may be pushed after a piece with a reason.
        """
        shown = ids[:-1] if finish == "stop" else ids
        text, taken, stop_string = self._text(shown)
        if finish is not None and stop_string is None:
            tail, stop_string = self._flush()
            text += tail
            taken = len(ids) if stop_string is None else taken
        if stop_string is not None:
            return self._piece(text, ids, taken, logprobs, "stop", stop_string)
        return self._piece(text, ids, len(ids), logprobs, finish, None)

    def _text(self, ids: Sequence[int]) -> tuple[str, int, str | None]:
        """(text to show, how many ids it took, stop string that matched)."""
        if not self._has_stops:
            return self._detokenizer.push(ids), len(ids), None
        shown = ""
        for count, token in enumerate(ids, start=1):
            # One at a time: which id completes a match decides what is counted.
            text, matched = self._matcher.push(self._detokenizer.push((token,)))
            shown += text
            if matched is not None:
                return shown, count, matched
        return shown, len(ids), None

    def _flush(self) -> tuple[str, str | None]:
        text, matched = self._matcher.push(self._detokenizer.flush())
        return (text, matched) if matched is not None else (text + self._matcher.flush(), None)

    def _piece(
        self,
        text: str,
        ids: Sequence[int],
        taken: int,
        logprobs: LogprobColumns | None,
        reason: FinishReason | None,
        stop_string: str | None,
    ) -> Piece:
        self.completion_tokens += taken
        return Piece(
            text=text,
            ids=ids[:taken],
            logprobs=logprobs.head(taken) if logprobs is not None and taken < len(ids) else logprobs,
            reason=reason,
            stop_string=stop_string,
            stop_token_id=ids[-1] if reason == "stop" and stop_string is None and ids else None,
        )
