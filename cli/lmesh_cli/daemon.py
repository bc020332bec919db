"""The supervisor's process: `python -P -m lmesh_cli.daemon RUN_DIR` with the plan as JSON on its standard input."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from lmesh_chassis import logs

from lmesh_cli import redis_server, services
from lmesh_cli.plan import MeshPlan
from lmesh_cli.run_dir import AlreadyRunningError, MeshState, RunDir
from lmesh_cli.supervisor import SUPERVISOR, Supervisor

_log = logging.getLogger(__name__)


def main() -> int:
    """Supervises until it is told to stop; the exit status."""
    run_dir = RunDir(Path(sys.argv[1]))
    plan = MeshPlan.from_json(json.load(sys.stdin))
    logs.setup(SUPERVISOR)
    return supervise(run_dir, plan)


def supervise(run_dir: RunDir, plan: MeshPlan) -> int:
    """Runs the mesh of `plan` in `run_dir` in this process; the exit status."""
    try:
        with run_dir.lock():
            run_dir.clean()
            status = asyncio.run(_supervise(run_dir, plan))
            if status == 0:
                run_dir.clean()  # a mesh that failed leaves its state for who started it to read
            return status
    except AlreadyRunningError as error:
        _log.error("%s", error)
        return 1


async def _supervise(run_dir: RunDir, plan: MeshPlan) -> int:
    redis = _embedded(run_dir)
    told: dict[str, str] = {}
    if redis is not None:
        told = {"server": str(redis.server), "folder": str(redis.folder), "url": redis_server.url(redis.folder)}

    async def after_stage(stage: int, state: MeshState) -> None:
        if stage == 0 and redis is not None:
            state.redis["version"] = await redis_server.version(redis.folder)
            _log.info("redis is up", extra={"version": state.redis["version"], "server": str(redis.server)})

    specs = services.build(plan, redis, artifacts=run_dir.artifacts)
    return await Supervisor(run_dir, specs, plan=plan.to_json(), redis=told, after_stage=after_stage).run()


def _embedded(run_dir: RunDir) -> services.EmbeddedRedis | None:
    if not services.wants_embedded_redis(os.environ):
        return None
    server = redis_server.find_server()
    return services.EmbeddedRedis(server=server, folder=run_dir.socket_folder(), data=run_dir.redis_data())


if __name__ == "__main__":
    sys.exit(main())
