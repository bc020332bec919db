"""One request's part of the ledger: what of it Redis has, and what is still to be written."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from lmesh_gateway.generation import ChoiceEnd, Usage
from lmesh_gateway.ledger_record import FailedEnd, choice_key, end_text, pack, plan_text, record_key
from lmesh_gateway.ledger_scripts import WRITE, Call
from lmesh_gateway.plan import Plan

_RECORD_BYTES = 1024  # of a plan without its prompt, about


class KeptChoice(Protocol):
    """What the ledger keeps of a choice; both only ever grow."""

    ids: list[int]
    end: ChoiceEnd | None


class Standing(Enum):
    """Of an entry."""

    KEPT = "kept"  # or going to be
    FENCED = "fenced"  # another gateway has taken the request over
    DROPPED = "dropped"  # it is not kept: there is no ledger, or no room to wait for it


class Keeper(Protocol):
    """The owner of an entry. Called on the event loop; must not block or raise."""

    def on_kept(self, version: int) -> None:
        """Everything up to that version is in the ledger."""
        ...

    def on_fenced(self) -> None:
        """Another gateway has taken the request over; nothing more is written."""
        ...

    def on_dropped(self) -> None:
        """The rest will not be written."""
        ...


class LedgerEntry:
    """Ids are not copied: they are read from the choices when they are written."""

    def __init__(
        self,
        plan: Plan,
        choices: Sequence[KeptChoice],
        keeper: Keeper,
        *,
        note: Callable[[LedgerEntry], None],
        nonce: str = "",
        epoch: int = 1,
        written: bool = False,
    ) -> None:
        self.plan, self.keeper, self.epoch = plan, keeper, epoch
        self.nonce = nonce or secrets.token_hex(16)
        self.standing = Standing.KEPT
        self.version = 0  # of what is to be written
        self.kept_version = 0
        self._choices, self._note = choices, note
        self._written = written  # the plan is there
        self._kept = [len(choice.ids) if written else 0 for choice in choices]
        self._end = ""

    @property
    def request_id(self) -> str:
        """Of its request."""
        return self.plan.request_id

    @property
    def kept(self) -> bool:
        """The ledger has it, as far as it has come."""
        return self.standing is Standing.KEPT and self.kept_version == self.version

    @property
    def awaited(self) -> bool:
        """Somebody waits until it is written: a client for its ids, or for the word that it ended."""
        return self.plan.sync or bool(self._end)

    @property
    def waiting_bytes(self) -> int:
        """What is still to be written, about."""
        ids = sum(len(choice.ids) for choice in self._choices) - sum(self._kept)
        return 4 * ids + (0 if self._written else 4 * len(self.plan.prompt_ids) + _RECORD_BYTES)

    def grown(self) -> int:
        """Its choices have changed; the version that has it."""
        self.version += 1
        if self.standing is Standing.KEPT:
            self._note(self)
        return self.version

    def ended(self, end: Usage | FailedEnd) -> int:
        """The request has ended; the version that has it."""
        self._end = end_text(end)
        return self.grown()

    def call(self, gateway_id: str, ttl_ms: int) -> tuple[Call, list[int]]:
        """What writes all of it that is not there; and how many ids there are of each choice then."""
        request_id, counts = self.request_id, [len(choice.ids) for choice in self._choices]
        before = self._kept if self._written else [0] * len(counts)
        whole = ("", b"") if self._written else (plan_text(self.plan), pack(self.plan.prompt_ids))
        arguments: list[str | int | bytes] = [self.nonce, repr(self.plan.created), self.epoch, gateway_id, ttl_ms]
        arguments += [*whole, self._end]
        for choice, start in zip(self._choices, before, strict=True):
            end = "" if choice.end is None else end_text(choice.end)
            arguments += [4 * start, pack(choice.ids[start:]), end]
        keys = [record_key(request_id), *(choice_key(request_id, i) for i in range(len(counts)))]
        return Call(WRITE, keys, arguments), counts

    def wrote(self, version: int, counts: list[int]) -> None:
        """The ledger has this much."""
        self._written, self._kept, self.kept_version = True, counts, version
        self.keeper.on_kept(version)

    def forgotten(self) -> None:
        """The ledger does not have what it had."""
        self._written = False

    def fence(self) -> None:
        """It is another gateway's."""
        self.standing = Standing.FENCED
        self.keeper.on_fenced()

    def drop(self) -> None:
        """It is not kept."""
        self.standing = Standing.DROPPED
        self.keeper.on_dropped()
