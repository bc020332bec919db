"""The scheduler's settings, read from LMESH_SCHEDULER_* (see lmesh_chassis.settings)."""

from __future__ import annotations

from dataclasses import dataclass

from lmesh_chassis.settings import ChassisSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings(ChassisSettings):
    """One scheduler; there is one active in a mesh."""

    address: str = "127.0.0.1:50052"  # Dispatch and Fleet links
    redis_url: str = "redis://127.0.0.1:6379/0"  # or unix:///path/to/socket
    redis_timeout_s: float = 2.0
    max_queue: int = 1024  # requests waiting for one model
    slots_factor: float = 2.0  # sequences placed on a worker, in multiples of what one step holds; 1 with tenants
    tenants_file: str = ""  # who may call, at what share and within which limits; see docs/security.md
    reserved_slots: int = 1  # of a worker, kept for tenants that have nothing placed, where there are several
    heartbeat_interval_s: float = 1.0
    lease_ttl_s: float = 5.0  # a worker is lost when no heartbeat came for this long
    gateway_grace_s: float = 10.0  # how long a gateway whose link broke may come back to its queued requests
    gateway_lost_s: float = 60.0  # after this its placed ones are taken to have ended with it
    max_placements: int = 5  # of one request; one whose worker is lost this often ends with WORKER_LOST
    model_grace_s: float = 30.0  # how long requests may queue for a model whose workers have all left
    ended_kept: int = 10_000  # ended requests that are answered from memory; older ones from Redis
    record_ttl_s: float = 3600.0  # how long Redis keeps an ended request
    live_record_ttl_s: float = 86_400.0
    job_attempts: int = 5  # of one job: one whose trainer is lost this often is FAILED
    job_ttl_s: float = 30 * 86_400.0  # how long Redis keeps an ended job and its events
    journal_limit: int = 100_000  # requests whose last state waits for Redis

    def __post_init__(self) -> None:
        """ValueError for values that cannot work together."""
        if self.lease_ttl_s <= self.heartbeat_interval_s:
            raise ValueError("lease_ttl_s must be longer than heartbeat_interval_s")
        if self.gateway_lost_s < self.gateway_grace_s:
            raise ValueError("gateway_lost_s must not be shorter than gateway_grace_s")
        if self.reserved_slots < 0:
            raise ValueError("reserved_slots must not be negative")
        if self.max_placements < 1 or self.job_attempts < 1:
            raise ValueError("max_placements and job_attempts must be at least 1")
        if self.slots_factor <= 0 or self.max_queue < 1 or self.journal_limit < 1 or self.ended_kept < 0:
            raise ValueError("slots_factor, max_queue and journal_limit must be positive")
