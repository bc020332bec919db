"""Event ids of a stream: what a client has of it, which it brings back as Last-Event-ID to go on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmesh_gateway.errors import InvalidArgumentError
from lmesh_gateway.generation import Delta, Event
from lmesh_gateway.validation import is_request_id

LAST_EVENT_ID = "last-event-id"
_COUNTS = re.compile(r"\d{1,9}(\.\d{1,9}){0,1023}", re.ASCII)


class Cursor:
    """Ids of each choice that the events so far have carried."""

    def __init__(self, request_id: str, counts: Sequence[int] = ()) -> None:
        self.request_id = request_id
        self._counts = list(counts)

    @classmethod
    def parse(cls, text: str, request_id: str) -> Cursor:
        """The cursor of a Last-Event-ID header. InvalidArgumentError when it is none, or another request's."""
        named, slash, counts = text.rpartition("/")
        if not slash or not is_request_id(named) or not _COUNTS.fullmatch(counts):
            wanted = "the id of an event of the stream, such as 7f3a/12.9"
            raise InvalidArgumentError(f"{LAST_EVENT_ID}: must be {wanted}", field=LAST_EVENT_ID)
        if named != request_id:
            raise InvalidArgumentError(f"{LAST_EVENT_ID}: is of another request than the path", field=LAST_EVENT_ID)
        return cls(request_id, [int(count) for count in counts.split(".")])

    @property
    def counts(self) -> tuple[int, ...]:
        """By choice; later choices have none."""
        return tuple(self._counts)

    @property
    def begun(self) -> set[int]:
        """Choices that have ids."""
        return {choice for choice, count in enumerate(self._counts) if count}

    def count(self, event: Event) -> None:
        """An event of the core's goes into the stream, at once or with the next one."""
        if isinstance(event, Delta):
            missing = event.choice + 1 - len(self._counts)
            self._counts += [0] * max(0, missing)
            self._counts[event.choice] += len(event.token_ids)

    def __str__(self) -> str:
        return f"{self.request_id}/{'.'.join(map(str, self._counts or [0]))}"
