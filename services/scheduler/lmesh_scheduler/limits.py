"""What a tenant may ask for: requests waiting and living, requests and tokens a minute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lmesh_chassis.tenants import ANYONE, Tenant

from lmesh_scheduler import errors

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class LimitFault:
    """A limit that a request would break; `retry_after_ms` is when it will not."""

    reason: str
    message: str
    retry_after_ms: int


@dataclass(slots=True)
class Bucket:
    """Fills at `rate` a second up to a minute's worth; may go below zero by what was not known beforehand."""

    rate: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """The level now."""
        self.level = min(self.rate * _MINUTE_S, self.level + (now - self.at) * self.rate)
        self.at = now

    def wait_s(self, wanted: float) -> float:
        """Seconds until `wanted` is there."""
        return max(0.0, (wanted - self.level) / self.rate)


class Limits:
    """Buckets of the tenants that have limits. Requests are paid when they are admitted, tokens when they are known."""

    def __init__(self, tenants: Mapping[str, Tenant], clock: Callable[[], float]) -> None:
        self._tenants, self._clock = tenants, clock
        self.buckets: dict[tuple[str, str], Bucket] = {}  # (tenant, what) -> bucket
        for tenant in tenants.values():
            for what, per_minute in (("requests", tenant.requests_per_minute), ("tokens", tenant.tokens_per_minute)):
                if per_minute:
                    self.buckets[tenant.id, what] = Bucket(per_minute / _MINUTE_S, float(per_minute), clock())

    def fault(self, tenant_id: str, *, queued: int, live: int) -> LimitFault | None:
        """Why the next request of a tenant is not admitted now, if it is not."""
        tenant = self._tenants.get(tenant_id, ANYONE)
        for most, count, words in ((tenant.max_queued, queued, "waiting"), (tenant.max_live, live, "live")):
            if most and count >= most:
                text = f"{count} of your requests are {words}, and {most} may be; try again later"
                return LimitFault(errors.QUOTA_EXCEEDED, text, 1000)
        for what, wanted in (("requests", 1.0), ("tokens", 1.0)):
            bucket = self.buckets.get((tenant_id, what))
            if bucket is None:
                continue
            bucket.refill(self._clock())
            if bucket.level < wanted:
                text = f"more than {round(bucket.rate * _MINUTE_S)} {what} a minute; try again later"
                return LimitFault(errors.RATE_LIMITED, text, math.ceil(bucket.wait_s(wanted) * 1e3))
        return None

    def admitted(self, tenant: str, prompt_tokens: int) -> None:
        """A request came in: it counts as one, with its prompt."""
        self._take(tenant, "requests", 1)
        self._take(tenant, "tokens", prompt_tokens)

    def generated(self, tenant: str, tokens: int) -> None:
        """New tokens of a request that has ended."""
        self._take(tenant, "tokens", tokens)

    def _take(self, tenant: str, what: str, count: int) -> None:
        bucket = self.buckets.get((tenant, what))
        if bucket is not None:
            bucket.refill(self._clock())
            bucket.level -= count
