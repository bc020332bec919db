"""The Kubernetes manifests: valid by the published schemas, in step with the services' settings, hardened, drained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from lmesh_gateway.servicer import SERVICE_NAME as INFERENCE
from lmesh_scheduler.dispatch_servicer import SERVICE_NAME as DISPATCH
from lmesh_worker.servicer import SERVICE_NAME as RUN

from tests.deployment import (
    ROOT,
    compose,
    default_of,
    exposed_ports,
    image_environment,
    manifests,
    named,
    of_kind,
    parsed,
    service_of,
)

GRPC_NAMES = {"gateway": INFERENCE, "scheduler": DISPATCH, "worker": RUN, "trainer": ""}  # "": the server as a whole
WORKLOADS = of_kind("Deployment", "StatefulSet")
OURS = [w for w in WORKLOADS if w["metadata"]["name"] != "redis"]


def kind_of(workload: dict[str, Any]) -> str:
    return workload["metadata"]["name"].removesuffix("-gpu")


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Variables as the container sees them; what comes from the pod's fields has a stand-in."""
    values: dict[str, str] = {}
    for entry in container.get("env", []):
        value = entry.get("value", "10.1.2.3")
        for name, known in values.items():
            value = value.replace(f"$({name})", known)
        values[entry["name"]] = value
    return values


def probes(container: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container)


@pytest.mark.parametrize("manifest", manifests(), ids=named)
def test_is_valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_all_live_in_one_namespace() -> None:
    assert {m["metadata"].get("namespace", m["metadata"]["name"]) for m in manifests()} == {"lmesh"}


@pytest.mark.parametrize("service", of_kind("Service"), ids=named)
def test_services_find_their_pods(service: dict[str, Any]) -> None:
    wanted = service["spec"]["selector"].items()
    (workload,) = [w for w in WORKLOADS if wanted <= w["spec"]["template"]["metadata"]["labels"].items()]
    known = {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}
    for port in service["spec"]["ports"]:
        assert known[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
class TestWorkload:
    def test_selects_its_own_pods(self, workload: dict[str, Any]) -> None:
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        others = [w for w in WORKLOADS if w is not workload]
        assert all(w["spec"]["selector"]["matchLabels"] != selector for w in others)

    def test_has_no_more_rights_than_it_needs(self, workload: dict[str, Any]) -> None:
        pod, container = workload["spec"]["template"]["spec"], container_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}

    def test_gets_no_variables_from_services(self, workload: dict[str, Any]) -> None:
        """A Service named worker would set WORKER_PORT and the like, and services refuse what they do not know."""
        assert workload["spec"]["template"]["spec"]["enableServiceLinks"] is False

    def test_is_sized_and_probed(self, workload: dict[str, Any]) -> None:
        container = container_of(workload)
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)

    def test_writes_only_where_a_volume_is(self, workload: dict[str, Any]) -> None:
        pod = workload["spec"]["template"]["spec"]
        have = {v["name"] for v in pod.get("volumes", [])}
        have |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container_of(workload)["volumeMounts"]} == have


@pytest.mark.parametrize("workload", OURS, ids=named)
class TestOurs:
    def test_starts_with_its_settings(self, workload: dict[str, Any]) -> None:
        service, set_here = kind_of(workload), environment(container_of(workload))
        ours = {name: value for name, value in set_here.items() if name.startswith("LMESH_")}
        assert all(service_of(name) == service for name in ours)
        parsed(service, {**image_environment(service), **ours})

    def test_ports_are_the_images(self, workload: dict[str, Any]) -> None:
        ports = {port["containerPort"] for port in container_of(workload)["ports"]}
        assert ports == exposed_ports(kind_of(workload))

    def test_image_is_composes(self, workload: dict[str, Any]) -> None:
        assert container_of(workload)["image"] == compose()["services"][workload["metadata"]["name"]]["image"]

    def test_probes_ask_what_is_served(self, workload: dict[str, Any]) -> None:
        container, service = container_of(workload), kind_of(workload)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in probes(container):
            if "grpc" in probe:
                name = GRPC_NAMES[service]
                assert probe["grpc"] == {"port": ports["grpc"], **({"service": name} if name else {})}
            elif "tcpSocket" in probe:
                assert (service, probe["tcpSocket"]) == ("trainer", {"port": "grpc"})
            else:
                assert (service, probe["httpGet"]) == ("gateway", {"path": "/version", "port": "http"})
        assert "grpc" in container["readinessProbe"]

    def test_liveness_of_a_worker_is_its_progress_and_allows_a_slow_start(self, workload: dict[str, Any]) -> None:
        container = container_of(workload)
        if kind_of(workload) == "worker":
            assert "grpc" in container["livenessProbe"]  # NOT_SERVING when its watchdog says stuck
            start = container["startupProbe"]
            assert start["periodSeconds"] * start["failureThreshold"] > default_of(
                "LMESH_WORKER_ENGINE_START_TIMEOUT_S"
            )

    def test_may_drain(self, workload: dict[str, Any]) -> None:
        pod, container, service = workload["spec"]["template"]["spec"], container_of(workload), kind_of(workload)
        settings = parsed(service, {k: v for k, v in environment(container).items() if k.startswith("LMESH_")})
        before = int(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])[1])
        assert pod["terminationGracePeriodSeconds"] > before + settings.drain_timeout_s

    def test_disruptions_are_bounded(self, workload: dict[str, Any]) -> None:
        budgets = [
            b
            for b in of_kind("PodDisruptionBudget")
            if b["spec"]["selector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]
        ]
        # Of one pod a budget could only say never.
        assert [b["spec"]["maxUnavailable"] for b in budgets] == ([] if kind_of(workload) == "scheduler" else [1])


def test_there_is_one_scheduler_at_a_time() -> None:
    (scheduler,) = [w for w in OURS if kind_of(w) == "scheduler"]
    assert (scheduler["kind"], scheduler["spec"]["replicas"]) == ("Deployment", 1)
    assert scheduler["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("worker", [w for w in OURS if kind_of(w) == "worker"], ids=named)
def test_each_worker_has_its_own_name_and_address(worker: dict[str, Any]) -> None:
    assert worker["kind"] == "StatefulSet"
    (headless,) = [s for s in of_kind("Service") if s["metadata"]["name"] == worker["spec"]["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None"
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in container_of(worker)["env"]
        if "valueFrom" in entry
    }
    assert fields == {"LMESH_WORKER_ID": "metadata.name", "POD_IP": "status.podIP"}
    address = image_environment("worker")["LMESH_WORKER_ADDRESS"]
    assert environment(container_of(worker))["LMESH_WORKER_ADVERTISE"] == f"10.1.2.3:{address.rsplit(':')[-1]}"


def test_a_gpu_pod_has_one() -> None:
    (worker,) = [w for w in OURS if w["metadata"]["name"] == "worker-gpu"]
    assert container_of(worker)["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_inner_ports_are_closed_to_others() -> None:
    (policy,) = of_kind("NetworkPolicy")
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert set(selected["values"]) == {w["metadata"]["name"] for w in WORKLOADS} - {"gateway"}
    inner, scraped = policy["spec"]["ingress"]
    assert inner["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "lmesh"}}}]
    everything = {port for name in ("scheduler", "worker") for port in exposed_ports(name)} | {6379}
    assert {p["port"] for p in inner["ports"]} | {p["port"] for p in scraped["ports"]} == everything


def test_every_manifest_is_read() -> None:
    assert {p.name for p in (ROOT / "deploy").rglob("*") if p.is_file()} == {
        "namespace.yaml",
        "redis.yaml",
        "scheduler.yaml",
        "gateway.yaml",
        "worker.yaml",
        "worker-gpu.yaml",
        "trainer.yaml",
        "artifacts.yaml",
        "network-policy.yaml",
    }
