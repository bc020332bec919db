"""What comes in: whether a submission is admitted at all, and the request that it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable

from lmesh_scheduler import errors
from lmesh_scheduler.adapters.registry import AdapterRegistry
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.fleet import Fleet
from lmesh_scheduler.gateways import Gateway, Refused
from lmesh_scheduler.limits import Limits
from lmesh_scheduler.placements import Placements
from lmesh_scheduler.requests import Request, RequestTable, Submission
from lmesh_scheduler.shares import Shares

RETRY_MS = 1000


class Gatekeeper:
    """Looks and changes nothing; the queue's own bound is the queue's."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        requests: RequestTable,
        fleet: Fleet,
        placements: Placements,
        shares: Shares,
        limits: Limits,
        adapters: AdapterRegistry,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._requests, self._fleet, self._placements = requests, fleet, placements
        self._shares, self._limits, self._adapters = shares, limits, adapters
        self._clock, self._wall = clock, wall
        self.draining = False

    def refusal(self, submission: Submission) -> Refused | None:
        """Why it is not admitted, if it is not."""
        request_id, model, tenant = submission.request_id, submission.model, submission.tenant
        if not request_id:
            return Refused(request_id, errors.INVALID_ARGUMENT, "request_id must not be empty", 0)
        found = self._requests.find(request_id)
        if found is not None:
            standing = "live" if found.live else "one of an ended request"
            message = f"request id {request_id} is {standing}; choose another"
            return Refused(request_id, errors.DUPLICATE_REQUEST_ID, message, 0)
        if self.draining:
            return self.leaving(request_id)
        if self.abandoned(model):
            known = ", ".join(e.model.id for e in self._fleet.catalog()) or "none"
            return Refused(request_id, errors.MODEL_NOT_FOUND, f"no worker serves {model!r}; served: {known}", 0)
        if submission.adapter and not self._adapters.allows(tenant, model, submission.adapter):
            message = f"no adapter of content {submission.adapter[:12]} is published for {model}"
            return Refused(request_id, errors.ADAPTER_NOT_FOUND, message, 0)
        queued, live = self._placements.waiting_of(tenant), self._shares.live(tenant)
        fault = self._limits.fault(tenant, queued=queued, live=live)
        return None if fault is None else Refused(request_id, fault.reason, fault.message, fault.retry_after_ms)

    def leaving(self, request_id: str) -> Refused:
        """The refusal of a scheduler that drains."""
        return Refused(request_id, errors.DRAINING, "the scheduler is leaving; try again", RETRY_MS)

    def abandoned(self, model: str) -> bool:
        """Whether nobody serves the model, and nobody is likely to come."""
        return not self._fleet.serves(model) and not self._fleet.awaited(model, self._settings.model_grace_s)

    def request(self, gateway: Gateway, submission: Submission) -> Request:
        """The request of a submission, with what remains of its times turned into deadlines."""
        now, wall = self._clock(), self._wall()
        deadline_s, queue_s = submission.deadline_s, submission.queue_timeout_s
        return Request(
            submission=submission,
            gateway_id=gateway.id,
            prompt_tokens=len(submission.prompt_ids),
            deadline=now + deadline_s if deadline_s else math.inf,
            queue_deadline=now + queue_s if queue_s else math.inf,
            expires_at=wall + deadline_s if deadline_s else 0.0,
        )
