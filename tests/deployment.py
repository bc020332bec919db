"""What compose, Dockerfiles and Kubernetes manifests say, read for tests, and the services' settings beside them."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lmesh_chassis.settings import ChassisSettings, load
from lmesh_gateway.config import GatewaySettings
from lmesh_scheduler.config import SchedulerSettings
from lmesh_trainer.config import TrainerSettings
from lmesh_worker.config import WorkerSettings

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, type[ChassisSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "trainer": TrainerSettings,
}
# Settings without a default
_NEEDS = {"worker": {"LMESH_WORKER_MODEL": "a-model"}, "trainer": {"LMESH_TRAINER_ARTIFACTS": "/artifacts"}}
MANIFESTS = sorted((ROOT / "deploy/kubernetes").rglob("*.yaml"))


@cache
def compose() -> dict[str, Any]:
    """docker-compose.yml with its anchors and merges resolved, `${...}` as they stand."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def service_of(variable: str) -> str | None:
    """`worker` of LMESH_WORKER_..., None for a variable that is no service's."""
    match = re.match(r"LMESH_([A-Z]+)_", variable)
    name = match.group(1).lower() if match else ""
    return name if name in SETTINGS else None


def parsed(service: str, environ: dict[str, str]) -> ChassisSettings:
    """The settings as the service would read them; SettingsError where it would not start."""
    return load(SETTINGS[service], service=service, environ={**_NEEDS.get(service, {}), **environ})


def default_of(variable: str) -> Any:
    """The default of LMESH_<SERVICE>_<FIELD>, a parsed value; MISSING where it has none."""
    service = service_of(variable)
    assert service is not None, variable
    name = variable.removeprefix(f"LMESH_{service.upper()}_").lower()
    return {field.name: field.default for field in dataclasses.fields(SETTINGS[service])}[name]


def value_of(variable: str, text: str) -> Any:
    """The parsed value of one variable."""
    service = service_of(variable)
    assert service is not None, variable
    name = variable.removeprefix(f"LMESH_{service.upper()}_").lower()
    return getattr(parsed(service, {variable: text}), name)


@cache
def image_environment(service: str) -> dict[str, str]:
    """LMESH_<SERVICE>_* that the service's Dockerfile sets."""
    text = (ROOT / f"services/{service}/Dockerfile").read_text()
    return dict(re.findall(rf"(LMESH_{service.upper()}_\w+)=([^\s\\]+)", text))


def exposed_ports(service: str) -> set[int]:
    """What the service's Dockerfile EXPOSEs."""
    text = (ROOT / f"services/{service}/Dockerfile").read_text()
    return {int(port) for line in re.findall(r"^EXPOSE (.+)$", text, re.MULTILINE) for port in line.split()}


@cache
def manifests() -> tuple[dict[str, Any], ...]:
    """Every document of every Kubernetes manifest."""
    return tuple(d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text()) if d)


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    """The manifests of these kinds."""
    return [m for m in manifests() if m["kind"] in kinds]


def named(manifest: dict[str, Any]) -> str:
    """For test ids and messages."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"
