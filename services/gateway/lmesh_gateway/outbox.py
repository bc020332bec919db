"""What one client has not taken yet: a bounded mailbox in which later output joins what still waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

from lmesh_chassis.errors import ServiceError
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_gateway.choice import Piece
from lmesh_gateway.generation import Accepted, ChoiceEnd, Delta, Event, Finish, TokenLogprobs
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.pace import Pace

# Rows of log-probabilities beyond this are made in a thread: the event loop is everybody's.
_MANY_ENTRIES = 4000


@dataclass(slots=True)
class _Waiting:
    """One choice's output since the client's last take."""

    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: LogprobColumns | None = None
    end: ChoiceEnd | None = None

    def add(self, choice: int, piece: Piece) -> None:
        self.text.append(piece.text)
        self.ids += piece.ids
        if piece.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = LogprobColumns(k=piece.logprobs.k)
            self.logprobs.extend(piece.logprobs)
        if piece.reason is not None:
            self.end = ChoiceEnd(
                choice=choice, reason=piece.reason, stop_string=piece.stop_string, stop_token_id=piece.stop_token_id
            )


class ClientOutbox:
    """Filled by the links' readers, which never wait; emptied by the client, however slowly, and at its `pace`.

    The first output, and the end with all before it, never wait. A slow client costs memory for at most the request's
    own output: `n` times `max_tokens` ids.
    """

    def __init__(
        self, tokenizer: TextTokenizer, pace: Pace, *, prompt_ids: tuple[int, ...], n: int, with_logprobs: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._pace = pace
        self._prompt_ids = prompt_ids
        self._with_logprobs = with_logprobs
        self._waiting = [_Waiting() for _ in range(n)]
        self._ready: set[int] = set()
        self._accepted: Accepted | None = None
        self._before: deque[Event] = deque()
        self._prompt_logprobs: LogprobColumns | None = None
        self._last: Finish | ServiceError | None = None
        self._filled = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._due = 0.0  # by the loop's time: output that comes before waits until then
        self._timer: asyncio.TimerHandle | None = None

    def accept(self, accepted: Accepted) -> None:
        """The first event."""
        self._accepted = accepted
        self._filled.set()

    def replay(self, events: Iterable[Event]) -> None:
        """What came before this client did; it goes right after `accept`, before anything else."""
        self._before.extend(events)

    def add(self, choice: int, piece: Piece, prompt_logprobs: LogprobColumns | None = None) -> None:
        """New output of a choice; `prompt_logprobs` once, with choice 0."""
        self._waiting[choice].add(choice, piece)
        self._prompt_logprobs = prompt_logprobs or self._prompt_logprobs
        self._ready.add(choice)
        if self._loop.time() >= self._due:
            self._filled.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._filled.set)

    def close(self, last: Finish | ServiceError) -> None:
        """Nothing follows; what waits is still delivered, then `last` is yielded or raised."""
        if self._last is None:
            self._last = last
            self._filled.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """All events, for one reader."""
        self._pace.streams += len(self._waiting)
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                self._stop_timer()
                if self._accepted is not None:
                    accepted, self._accepted = self._accepted, None
                    yield accepted
                    while self._before:
                        yield self._before.popleft()
                if self._ready:
                    self._due = self._loop.time() + self._pace.interval_s
                # Taken one at a time: what comes while the client is busy with one joins the next.
                for choice in sorted(self._ready):
                    self._ready.discard(choice)
                    for event in await self._take(choice):
                        yield event
                if self._last is not None and not self._ready:
                    if isinstance(self._last, ServiceError):
                        raise self._last
                    yield self._last
                    return
        finally:
            self._pace.streams -= len(self._waiting)
            self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _take(self, choice: int) -> list[Event]:
        waiting, self._waiting[choice] = self._waiting[choice], _Waiting()
        prompt = None
        if choice == 0 and self._prompt_logprobs is not None:
            columns, self._prompt_logprobs = self._prompt_logprobs, None
            prompt = await self._rows(columns, self._prompt_ids[1:])
        text = "".join(waiting.text)
        events: list[Event] = []
        if text or waiting.ids or prompt is not None:
            logprobs = None
            if self._with_logprobs:
                logprobs = await self._rows(waiting.logprobs or LogprobColumns(k=0), waiting.ids)
            events.append(
                Delta(
                    choice=choice,
                    text=text,
                    token_ids=tuple(waiting.ids),
                    logprobs=logprobs,
                    prompt_logprobs=prompt,
                )
            )
        return events if waiting.end is None else [*events, waiting.end]

    async def _rows(self, columns: LogprobColumns, ids: tuple[int, ...] | list[int]) -> tuple[TokenLogprobs, ...]:
        if len(ids) * (columns.k + 1) <= _MANY_ENTRIES:
            return columns.rows(ids, self._tokenizer)
        return await asyncio.to_thread(columns.rows, ids, self._tokenizer)
