"""What a client with a cursor has not seen yet, made of ids alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmesh_gateway.errors import LedgerBehindError
from lmesh_gateway.generation import ChoiceEnd, Delta, Event, FinishReason
from lmesh_gateway.live_choice import assembler
from lmesh_gateway.plan import Plan


def check_cursor(request_id: str, cursor: Sequence[int], have: Sequence[int]) -> None:
    """LedgerBehindError when a client has more than there is."""
    if len(cursor) > len(have) or any(c > h for c, h in zip(cursor, have, strict=False)):
        counts = ", ".join(map(str, have))
        raise LedgerBehindError(
            f"the cursor is ahead: of request {request_id} there are {counts} ids by choice",
            metadata={"have": ".".join(map(str, have))},
        )


def rest_of(plan: Plan, choice: int, ids: Sequence[int], end: ChoiceEnd | None, cursor: int) -> Iterator[Event]:
    """A choice's events from `cursor` on. With how many ids came which text does not hang on how they were cut."""
    if cursor < len(ids):
        text = assembler(plan)
        text.push(ids[:cursor])
        piece = text.push(ids[cursor:], finish=_finish(end))
        yield Delta(choice=choice, text=piece.text, token_ids=tuple(ids[cursor:]))
    if end is not None:
        yield end


def _finish(end: ChoiceEnd | None) -> FinishReason | None:
    """What ends the text. A stop string is found in it again, so only a stop token must be told."""
    if end is None:
        return None
    return "stop" if end.stop_token_id is not None else "length"
