"""What of a live request a client may see, and the client, when there is one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.choice import Piece
from lmesh_gateway.errors import DeadlineExceededError, ResumedElsewhereError
from lmesh_gateway.generation import Accepted, Finish
from lmesh_gateway.ledger_entry import LedgerEntry, Standing
from lmesh_gateway.live_choice import LiveChoice
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.pace import Pace
from lmesh_gateway.plan import Plan
from lmesh_gateway.replay import check_cursor, rest_of

# Finish says whether the ledger has everything, so it waits for that; ids never do.
_FINISH_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class _Held:
    """Output that the ledger does not have yet; of a SYNC request nobody may see it before."""

    version: int
    choice: LiveChoice
    piece: Piece
    prompt_logprobs: LogprobColumns | None


class Delivery:
    """Clients come and go, one at a time: the later one has it."""

    def __init__(self, plan: Plan, choices: Sequence[LiveChoice], pace: Pace) -> None:
        self._plan, self._choices, self._pace = plan, choices, pace
        self._shown = [len(choice.ids) for choice in choices]
        self._held: deque[_Held] = deque()
        self._outbox: ClientOutbox | None = None
        self._accepted: Accepted | None = None
        self._finish: tuple[int, Finish] | None = None  # waits for that version to be kept
        self._last: Finish | ServiceError | None = None
        self._entry: LedgerEntry | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def attached(self) -> bool:
        """There is a client."""
        return self._outbox is not None

    def keep_in(self, entry: LedgerEntry) -> None:
        """From now on the ledger keeps it, or does not."""
        self._entry = entry

    def attach(self, cursor: Sequence[int] = ()) -> ClientOutbox:
        """A client that has `cursor` ids of each choice. LedgerBehindError; otherwise whoever was there is ended."""
        plan = self._plan
        check_cursor(plan.request_id, cursor, self._shown)
        outbox = ClientOutbox(
            plan.model.tokenizer,
            self._pace,
            prompt_ids=plan.prompt_ids,
            n=plan.n,
            with_logprobs=plan.params.logprobs >= 0,
        )
        for choice, shown in zip(self._choices, self._shown, strict=True):
            held = any(held.choice is choice for held in self._held)
            seen = cursor[choice.index] if choice.index < len(cursor) else 0
            end = None if held else choice.end
            outbox.replay(rest_of(plan, choice.index, choice.ids[:shown], end, seen))
        if self._outbox is not None:
            self._outbox.close(ResumedElsewhereError("the request goes on in another stream"))
        self._outbox = outbox
        if self._accepted is not None:
            outbox.accept(self._accepted)
        if self._last is not None:
            outbox.close(self._last)
        return outbox

    def detach(self, outbox: ClientOutbox) -> bool:
        """That client has gone; False when another one has come since."""
        if self._outbox is not outbox:
            return False
        self._outbox = None
        return True

    def accept(self, accepted: Accepted) -> None:
        """The first event."""
        self._accepted = accepted
        if self._outbox is not None:
            self._outbox.accept(accepted)

    def add(self, choice: LiveChoice, piece: Piece, prompt_logprobs: LogprobColumns | None) -> None:
        """New output, which its choice has already."""
        version = 0 if self._entry is None else self._entry.grown()
        held = _Held(version, choice, piece, prompt_logprobs)
        if self._plan.sync:
            self._held.append(held)
        else:
            self._show(held)

    def kept(self, version: int) -> None:
        """The ledger has everything up to that version."""
        while self._held and self._held[0].version <= version:
            self._show(self._held.popleft())
        if self._finish is not None and self._finish[0] <= version:
            self._close(replace(self._finish[1], durable=True))

    def finish(self, finish: Finish, version: int, *, waits: bool) -> None:
        """Complete; `version` has it all, and `waits` says whether the ledger is there to tell so."""
        self._finish = (version, finish)
        if self._plan.sync and self._entry is not None and self._entry.standing is Standing.KEPT:
            # What is held comes before it, and waits for as long as the request may take.
            loop, late = asyncio.get_running_loop(), DeadlineExceededError("the request's deadline passed")
            delay = self._plan.deadline_at - time.monotonic()
            self._timer = loop.call_later(max(0.0, delay), self._close, late)
            return
        if waits and self._entry is not None and self._entry.standing is Standing.KEPT:
            self._timer = asyncio.get_running_loop().call_later(_FINISH_WAIT_S, self._close, finish)
        else:
            self._close(finish)

    def fail(self, error: ServiceError) -> None:
        """It has ended otherwise."""
        self._finish = None
        self._close(error)

    def _show(self, held: _Held) -> None:
        self._shown[held.choice.index] += len(held.piece.ids)
        if self._outbox is not None:
            self._outbox.add(held.choice.index, held.piece, held.prompt_logprobs)

    def _close(self, last: Finish | ServiceError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._last is None:
            self._last = last
            if self._outbox is not None:
                self._outbox.close(last)
