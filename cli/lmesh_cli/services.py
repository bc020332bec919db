"""The services of a local mesh as processes: command, environment, readiness, and their places in start and stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmesh_kernels.text.resolve import cache_folder

from lmesh_cli import probes, redis_server
from lmesh_cli.devices import gpus_for_trainers, share_of_machine
from lmesh_cli.plan import MeshPlan, TrainerPlace, WorkerPlace
from lmesh_cli.ports import HOST
from lmesh_cli.probes import Probe

# Above the services' own drain timeout of 30 s: they end what is left themselves, the supervisor only what hangs.
STOP_TIMEOUT_S = 40.0
_JOURNAL = "LMESH_SCHEDULER_REDIS_URL"
_LEDGER = "LMESH_GATEWAY_REDIS_URL"
_HUB = "LMESH_TRAINER_HUB"
_ARTIFACTS = ("LMESH_GATEWAY_ARTIFACTS", "LMESH_WORKER_ARTIFACTS", "LMESH_TRAINER_ARTIFACTS")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """One supervised process."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's own
    probe: Probe
    prepare: Callable[[], None] = lambda: None  # called before each start
    start_stage: int = 0  # a stage starts when the one before is ready
    stop_stage: int = 0  # a stage is stopped when the one before is gone
    stop_timeout_s: float = STOP_TIMEOUT_S


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedRedis:
    """The mesh's own Redis: its program, the folder of its socket, and that of what it keeps."""

    server: Path
    folder: Path
    data: Path


def wants_embedded_redis(environ: Mapping[str, str]) -> bool:
    """False when the user named a Redis of their own."""
    return not environ.get(_JOURNAL)


def build(
    plan: MeshPlan, redis: EmbeddedRedis | None, environ: Mapping[str, str] | None = None, *, artifacts: Path
) -> list[ServiceSpec]:
    """All services of the plan. What the user set in LMESH_* variables wins over the launcher's choices of tuning.

    `artifacts` is the folder that gateway, workers and trainers share.
    """
    env = dict(os.environ if environ is None else environ)
    specs = [] if redis is None else [_redis(redis)]
    url = env[_JOURNAL] if redis is None else redis_server.url(redis.folder)
    specs.append(_scheduler(plan, url))
    folder = {name: env.get(name, str(artifacts)) for name in _ARTIFACTS}
    shares = share_of_machine(len(plan.workers), env)
    specs += [_worker(plan, place, share, folder) for place, share in zip(plan.workers, shares, strict=True)]
    gpus = gpus_for_trainers(len(plan.trainers), len(plan.workers), env)
    # Whoever runs a mesh of their own may fetch what they like; elsewhere the trainer's default holds, which is no.
    told = {**folder, _HUB: env.get(_HUB, "true")}
    specs += [_trainer(plan, place, gpu, told) for place, gpu in zip(plan.trainers, gpus, strict=True)]
    return [*specs, _gateway(plan, env.get(_LEDGER, url), folder)]  # an empty one of the user's: no ledger


def _redis(redis: EmbeddedRedis) -> ServiceSpec:
    async def probe() -> bool:
        return await redis_server.answers(redis.folder)

    return ServiceSpec(
        name="redis",
        argv=tuple(redis_server.command(redis.server, redis.folder, redis.data)),
        probe=probe,
        # A socket that a killed server left would look like one that refuses.
        prepare=lambda: redis_server.socket_path(redis.folder).unlink(missing_ok=True),
        stop_stage=3,
        stop_timeout_s=5.0,
    )


def _scheduler(plan: MeshPlan, journal: str) -> ServiceSpec:
    env = {
        "LMESH_SCHEDULER_ADDRESS": plan.scheduler_address,
        _JOURNAL: journal,
        "LMESH_SCHEDULER_METRICS_PORT": str(plan.scheduler_metrics_port),
    }
    return ServiceSpec(
        name="scheduler",
        argv=_module("lmesh_scheduler"),
        env=_common(env),
        probe=probes.grpc_health(plan.scheduler_address),
        start_stage=1,
        stop_stage=2,
    )


def _worker(plan: MeshPlan, place: WorkerPlace, share: Mapping[str, str], folder: Mapping[str, str]) -> ServiceSpec:
    address = f"{HOST}:{place.port}"
    env = {
        **share,
        "LMESH_WORKER_ADDRESS": address,
        "LMESH_WORKER_ADVERTISE": address,
        "LMESH_WORKER_SCHEDULER": plan.scheduler_address,
        "LMESH_WORKER_ID": place.id,
        "LMESH_WORKER_MODEL": place.model.source,
        "LMESH_WORKER_MODEL_ID": place.model.id,
        "LMESH_WORKER_METRICS_PORT": str(place.metrics_port),
        "LMESH_WORKER_ARTIFACTS": folder["LMESH_WORKER_ARTIFACTS"],
    }
    if plan.load_format != "auto":  # what the user exported holds unless they ask for another here
        env["LMESH_WORKER_LOAD_FORMAT"] = plan.load_format
    return ServiceSpec(
        name=place.id,
        argv=_module("lmesh_worker"),
        env=_common(env),
        probe=probes.grpc_health(address),
        start_stage=1,
        stop_stage=1,
    )


def _trainer(plan: MeshPlan, place: TrainerPlace, gpu: Mapping[str, str], told: Mapping[str, str]) -> ServiceSpec:
    address = f"{HOST}:{place.port}"
    env = {
        **gpu,
        _HUB: told[_HUB],
        "LMESH_TRAINER_ADDRESS": address,
        "LMESH_TRAINER_SCHEDULER": plan.scheduler_address,
        "LMESH_TRAINER_ID": place.id,
        "LMESH_TRAINER_METRICS_PORT": str(place.metrics_port),
        "LMESH_TRAINER_ARTIFACTS": told["LMESH_TRAINER_ARTIFACTS"],
    }
    return ServiceSpec(
        name=place.id,
        argv=_module("lmesh_trainer"),
        env=_common(env),
        probe=probes.grpc_health(address),
        start_stage=1,
        stop_stage=1,
    )


def _gateway(plan: MeshPlan, ledger: str, folder: Mapping[str, str]) -> ServiceSpec:
    env = {
        _LEDGER: ledger,
        "LMESH_GATEWAY_GRPC_ADDRESS": plan.grpc_address,
        "LMESH_GATEWAY_HTTP_ADDRESS": plan.http_address,
        "LMESH_GATEWAY_SCHEDULER": plan.scheduler_address,
        "LMESH_GATEWAY_PROCESSES": str(plan.gateways),
        "LMESH_GATEWAY_ARTIFACTS": folder["LMESH_GATEWAY_ARTIFACTS"],
    }
    return ServiceSpec(
        name="gateway",
        argv=_module("lmesh_gateway"),
        env=_common(env),
        probe=probes.all_of(
            probes.everywhere(probes.grpc_health(plan.grpc_address), plan.gateways),
            probes.everywhere(probes.http_health(plan.http_address), plan.gateways),
            # Each loads a model's tokenizer by itself.
            probes.everywhere(probes.models(plan.grpc_address, plan.model_ids), plan.gateways),
        ),
        start_stage=1,
        stop_stage=0,
    )


def _module(name: str) -> tuple[str, ...]:
    # -P keeps the current folder off sys.path: a checkout's `kernels/` must not shadow anything.
    return (sys.executable, "-P", "-m", name)


def _common(env: Mapping[str, str]) -> dict[str, str]:
    # Calls within the machine must not go to a proxy that is meant for the outside.
    outside = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost")
    local = ",".join(name for name in outside if name)
    return {
        **env,
        "LMESH_DIE_WITH_PARENT": "1",
        "LMESH_CACHE": str(cache_folder().expanduser().absolute()),
        # gRPC's fork handlers, on by default in its wheels, now and then cost a forked child its descriptors. They are
        # for programs that go on in a fork; whatever a service forks execs at once.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "NO_PROXY": local,
        "no_proxy": local,
    }
