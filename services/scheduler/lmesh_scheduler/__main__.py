"""Starts a scheduler: settings, Redis, then the service."""

from __future__ import annotations

import logging
import sys

from lmesh_chassis import lifecycle, logs, tls, tracing
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.settings import exit_unless, load_or_exit
from redis.exceptions import RedisError

from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.service import SchedulerService, open_redis

log = logging.getLogger(__name__)


def main() -> None:
    """The process's entry; exits 0 after a drain, 1 when fenced or failed, 2 on a setting it cannot use."""
    settings = load_or_exit(SchedulerSettings, service="scheduler")
    logs.setup("scheduler", settings.log_level)
    exit_unless(lambda: tls.from_settings(settings), service="scheduler")
    sys.exit(lifecycle.run(lambda shutdown: _serve(settings, shutdown)))


async def _serve(settings: SchedulerSettings, shutdown: Shutdown) -> int:
    tracing.setup("scheduler", settings.otlp_endpoint)
    try:
        redis, incarnation, inherited = await open_redis(settings)
    except (RedisError, OSError, ValueError) as error:
        log.error("Redis does not answer", extra={"setting": "LMESH_SCHEDULER_REDIS_URL", "detail": str(error)})
        return 2
    try:
        return await SchedulerService(settings, redis, incarnation, inherited).run(shutdown)
    except OSError as error:
        settings_at_fault = "LMESH_SCHEDULER_ADDRESS or LMESH_SCHEDULER_METRICS_PORT"
        log.error("cannot listen", extra={"setting": settings_at_fault, "detail": str(error)})
        return 2
    finally:
        tracing.shutdown()
        await redis.aclose()


if __name__ == "__main__":
    main()
