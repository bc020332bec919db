"""The shape of a local mesh: which models, how many processes, which ports."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmesh_cli import ports

DEFAULT_MODEL = "smollm2-135m-instruct"
HTTP_PORT, GRPC_PORT, SCHEDULER_PORT, SCHEDULER_METRICS_PORT, WORKER_METRICS_PORT = 8000, 50051, 50052, 9102, 9103
TRAINER_METRICS_PORT = 9203
LOAD_FORMATS = ("auto", "dummy")
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")

Json = dict[str, Any]


class PlanError(ValueError):
    """What was asked for cannot be a mesh; the message says what would be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """A model to serve: the id that clients ask for, and where its files come from."""

    id: str
    asked: str  # the source as the user wrote it
    source: str  # resolved: any process of this machine finds the same files by it


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPlace:
    """One worker process."""

    id: str
    model: ModelChoice
    port: int
    metrics_port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerPlace:
    """One trainer process; it takes jobs for any model."""

    id: str
    port: int
    metrics_port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshPlan:
    """Everything that the supervisor needs to start the services."""

    workers: tuple[WorkerPlace, ...]
    trainers: tuple[TrainerPlace, ...] = ()
    gateways: int
    http_port: int
    grpc_port: int
    scheduler_port: int
    scheduler_metrics_port: int
    load_format: str = "auto"  # of every worker: auto, or dummy for random weights

    @property
    def http_address(self) -> str:
        """host:port of the OpenAI API."""
        return f"{ports.HOST}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC API."""
        return f"{ports.HOST}:{self.grpc_port}"

    @property
    def scheduler_address(self) -> str:
        """host:port of the scheduler's links."""
        return f"{ports.HOST}:{self.scheduler_port}"

    @property
    def model_ids(self) -> frozenset[str]:
        """Ids of all models."""
        return frozenset(worker.model.id for worker in self.workers)

    def shape(self) -> Json:
        """What a user chooses; two plans with the same shape are the same mesh, whatever ports lie inside."""
        models = {worker.model.id: worker.model.asked for worker in self.workers}
        return {
            "models": models,
            "workers": len(self.workers) // max(1, len(models)),
            "trainers": len(self.trainers),
            "gateways": self.gateways,
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "load_format": self.load_format,
        }

    def to_json(self) -> Json:
        """For the run folder."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Json) -> MeshPlan:
        """The plan that `to_json` wrote."""
        places = tuple(WorkerPlace(**{**w, "model": ModelChoice(**w["model"])}) for w in data["workers"])
        trainers = tuple(TrainerPlace(**trainer) for trainer in data.get("trainers", ()))
        return MeshPlan(**{**data, "workers": places, "trainers": trainers})


def parse_models(options: Sequence[str]) -> dict[str, str]:
    """`id=source` or `source` options as a map from id to source; none at all means the small default model."""
    models: dict[str, str] = {}
    for option in options or [DEFAULT_MODEL]:
        name, equals, source = option.partition("=")
        if not equals:
            name, source = derived_id(option), option
        if not _MODEL_ID.fullmatch(name) or not source:
            raise PlanError(f"--model {option!r}: write id=source, such as small=./folder or small=hub:owner/name")
        if name in models:
            raise PlanError(f"--model: the id {name!r} is given twice; more workers of one model are --workers N")
        models[name] = source
    return models


def derived_id(source: str) -> str:
    """A model id from a source that came without one: the last part of its name, in lower case."""
    last = source.split("@")[0].rstrip("/").split("/")[-1].split(":")[-1]
    return last.removesuffix(".gguf").lower()


def lay_out(
    models: Sequence[ModelChoice],
    *,
    workers: int,
    gateways: int,
    http_port: int,
    grpc_port: int,
    trainers: int = 0,
    load_format: str = "auto",
) -> MeshPlan:
    """The whole plan, with free ports for what clients do not see.

    `workers` is the number of workers of each model. Raises PortTakenError when a public port is taken.
    """
    if load_format not in LOAD_FORMATS:
        raise PlanError(f"--load-format {load_format}: write {' or '.join(LOAD_FORMATS)}")
    if http_port == grpc_port:
        raise PlanError(f"--http-port and --grpc-port are both {http_port}; give two different ports")
    ports.require(http_port, purpose="HTTP", option="--http-port")
    ports.require(grpc_port, purpose="gRPC", option="--grpc-port")
    count = workers * len(models)
    public = frozenset({http_port, grpc_port})
    scheduler, metrics = ports.pick(2, preferred=(SCHEDULER_PORT, SCHEDULER_METRICS_PORT), avoid=public)
    avoid = public | {scheduler, metrics}
    wanted = (*range(WORKER_METRICS_PORT, WORKER_METRICS_PORT + count),)
    pages = ports.pick(count, preferred=wanted, avoid=avoid)
    avoid |= frozenset(pages)
    wanted = (*range(TRAINER_METRICS_PORT, TRAINER_METRICS_PORT + trainers),)
    trainer_pages = ports.pick(trainers, preferred=wanted, avoid=avoid)
    links = ports.pick(count + trainers, avoid=avoid | frozenset(trainer_pages))
    chosen = [model for model in models for _ in range(workers)]
    places = tuple(
        WorkerPlace(id=f"worker-{index}", model=model, port=links[index], metrics_port=pages[index])
        for index, model in enumerate(chosen)
    )
    benches = tuple(
        TrainerPlace(id=f"trainer-{index}", port=links[count + index], metrics_port=page)
        for index, page in enumerate(trainer_pages)
    )
    return MeshPlan(
        workers=places,
        trainers=benches,
        gateways=gateways,
        http_port=http_port,
        grpc_port=grpc_port,
        scheduler_port=scheduler,
        scheduler_metrics_port=metrics,
        load_format=load_format,
    )
