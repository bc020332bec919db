"""Which endings a client must put up with, given what happened to the mesh; any other is a broken promise."""

from __future__ import annotations

from collections import Counter

from tests.chaos.clients import Client

SCHEDULER = frozenset(
    {"scheduler killed", "scheduler paused", "scheduler replaced", "scheduler drained", "redis away", "redis emptied"}
)
WORKER = frozenset({"worker killed", "worker paused", "worker drained", "engine killed", "engine stopped"})
GATEWAY = frozenset({"gateway killed", "gateway paused", "gateway drained"})
MEMORY = frozenset({"redis emptied"})
LINK = frozenset({"link broken", "link stalled", "slow network"})
PLACEMENTS = 5  # of one request, before it is given up

# What excuses an error that a client was told after its request was accepted: a fault of each of these sets.
EXCUSES: dict[str, tuple[frozenset[str], ...]] = {
    "BROKEN": (GATEWAY | LINK,),
    "SCHEDULER_UNAVAILABLE": (SCHEDULER | LINK | GATEWAY,),
    "MODEL_NOT_FOUND": (WORKER | LINK, SCHEDULER | LINK),
    "LEDGER_BEHIND": (GATEWAY | MEMORY, SCHEDULER),
    "LEDGER_DISABLED": (),
    "REQUEST_NOT_FOUND": (GATEWAY | LINK | MEMORY,),
    "REQUEST_ENDED": (GATEWAY | LINK | MEMORY,),
    "RESUMED_ELSEWHERE": (GATEWAY | LINK,),
    "DUPLICATE_REQUEST_ID": (GATEWAY | LINK,),
    "QUEUE_TIMEOUT": (),
    "DRAINING": (WORKER | SCHEDULER | GATEWAY,),
    "UNAVAILABLE": (GATEWAY | LINK,),
}


def broken_promise(client: Client, struck: Counter[str]) -> str | None:
    """Why an ending is none that the client should have had; None when it is."""
    outcome, habit = client.outcome, client.habit
    if habit.sync and client.taken_back and not any(struck[kind] for kind in MEMORY):
        return f"{client.spec.request_id} was shown ids, of which the ledger did not know"
    if outcome in ("finish", "left"):
        return None
    if outcome == "CANCELLED":
        # A submission whose stream broke is withdrawn, by its id: a later one of the same id may be hit.
        asked = habit.cancel_s < float("inf") or client.submissions > 1 or (not habit.detach and client.streams > 1)
        return None if asked else f"{client.spec.request_id} was cancelled by nobody"
    if outcome == "WORKER_LOST":
        return _worker_lost(client, struck)
    kinds = EXCUSES.get(outcome)
    if kinds is not None and all(any(struck[kind] for kind in each) for each in kinds):
        return None
    return f"{client.spec.request_id} ended with {outcome}, for which there was no cause in {sorted(struck)}"


def _worker_lost(client: Client, struck: Counter[str]) -> str | None:
    """A lost worker is no end, unless workers were lost again and again, or no scheduler was there to place anew."""
    again_and_again = sum(struck[kind] for kind in WORKER | LINK) >= PLACEMENTS
    if again_and_again or any(struck[kind] for kind in SCHEDULER | LINK):
        return None
    return f"{client.spec.request_id} ended with its worker, and {sorted(struck)} should not have ended it"
