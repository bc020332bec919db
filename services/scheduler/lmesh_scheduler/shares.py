"""Whose turn it is: virtual time by tenant, in tokens over weight, so that each gets its share of the mesh.

The start-time fair queueing of Goyal, Vin and Cheng (1996), with what a request will cost guessed when it is placed and
set right when it ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lmesh_chassis.tenants import ANYONE, Tenant

from lmesh_scheduler.requests import Request

FIRST_GUESS = 256.0  # new tokens of a choice, before any request has ended
_NEWEST = 0.05  # weight of the last request in that guess


class Shares:
    """Virtual times of all tenants. A tenant is active while a request of it waits or runs."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._tenants = tenants
        self._spent: dict[str, float] = {}
        self._active: Counter[str] = Counter()
        self._held: Counter[str] = Counter()  # sequences placed
        self._guess = FIRST_GUESS

    @property
    def shared(self) -> bool:
        """Whether there is more than one tenant to share among."""
        return len(self._tenants) > 1

    def spent(self, tenant: str) -> float:
        """A tenant's virtual time; the smallest goes first."""
        return self._spent.get(tenant, 0.0)

    def live(self, tenant: str) -> int:
        """Requests of a tenant that wait or run."""
        return self._active[tenant]

    def enter(self, tenant: str) -> None:
        """A request is admitted. Who comes back from idleness has saved nothing up."""
        if not self._active[tenant]:
            least = min((self._spent[t] for t in self._active if t != tenant), default=self.spent(tenant))
            self._spent[tenant] = max(self.spent(tenant), least)
        self._active[tenant] += 1

    def charge(self, request: Request) -> None:
        """A request is placed; one that is placed again has paid."""
        tenant, submission = request.submission.tenant, request.submission
        self._held[tenant] += submission.n
        if not request.charged:
            new = min(float(submission.max_tokens), self._guess) * submission.n
            request.charged = request.prompt_tokens + new
            self._pay(tenant, request.charged)

    def release(self, request: Request) -> None:
        """A placed request leaves its worker, at its end or to be placed again."""
        self._held[request.submission.tenant] -= request.submission.n

    def leave(self, request: Request) -> None:
        """A request has ended: what it really cost is known, if it was placed and its gateway tells."""
        tenant = request.submission.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def settle(self, request: Request) -> None:
        """The gateway has told the counts of a request that had been charged."""
        if not request.charged:
            return
        self._pay(request.submission.tenant, request.prompt_tokens + request.completion_tokens - request.charged)
        request.charged = 0.0
        if request.completion_tokens:
            each = request.completion_tokens / request.submission.n
            self._guess += _NEWEST * (each - self._guess)

    def yields(self, tenant: str) -> bool:
        """Whether a tenant that has something placed is to leave room for one that has nothing and may come."""
        return self.shared and self._held[tenant] > 0 and any(not self._held[other] for other in self._tenants)

    def _pay(self, tenant: str, tokens: float) -> None:
        self._spent[tenant] = self.spent(tenant) + tokens / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._tenants.get(tenant, ANYONE).weight
