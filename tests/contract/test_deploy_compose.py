"""docker-compose.yml, .env.example and the Dockerfiles say what the services' settings say, and nothing else."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.deployment import (
    ROOT,
    SETTINGS,
    compose,
    default_of,
    exposed_ports,
    image_environment,
    parsed,
    service_of,
    value_of,
)

EXAMPLE = (ROOT / ".env.example").read_text()
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
# ${NAME:-default} and ${NAME-default} of docker-compose.yml
INTERPOLATED = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", COMPOSE_TEXT))
OFFERED = dict(re.findall(r"^#(\w+)=(.*)$", EXAMPLE, re.MULTILINE))
OURS = ("scheduler", "gateway", "worker", "worker-gpu", "trainer")


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def test_the_example_holds_only_what_can_be_set() -> None:
    lines = [line for line in EXAMPLE.splitlines() if line and not line.startswith("# ")]
    assert lines == [f"#{name}={value}" for name, value in OFFERED.items()]
    assert {name for name in OFFERED if service_of(name) is None} <= set(INTERPOLATED)


def test_the_example_has_everything_that_compose_reads() -> None:
    assert set(INTERPOLATED) <= set(OFFERED)


@pytest.mark.parametrize("variable", OFFERED)
def test_the_examples_default_is_the_one_in_force(variable: str) -> None:
    if variable in INTERPOLATED:
        assert OFFERED[variable] == INTERPOLATED[variable]
    else:
        assert variable not in image_environment(service_of(variable) or "")
        assert value_of(variable, OFFERED[variable]) == default_of(variable)


@pytest.mark.parametrize("name", OURS)
def test_a_container_starts_with_its_settings(name: str) -> None:
    """What image and compose set together is what the service would read: an unknown variable stops its boot."""
    service = name.removesuffix("-gpu")
    text = {k: re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", v) for k, v in compose()["services"][name]["environment"].items()}
    mine = {k: v for k, v in {**image_environment(service), **text}.items() if service_of(k) == service}
    assert all(service_of(k) in (service, None) for k in text)
    settings = parsed(service, mine)
    # Reached from other containers, and told apart from them.
    listening = [getattr(settings, f) for f in ("address", "grpc_address", "http_address") if hasattr(settings, f)]
    assert all(address.startswith("0.0.0.0:") for address in listening)
    assert exposed_ports(service) == {*map(port_of, listening), settings.metrics_port}
    assert settings.metrics_host == "0.0.0.0"
    if service == "worker":
        assert (settings.id, settings.advertise) == ("", "")  # from its own address: replicas share all settings


def test_links_lead_to_the_services() -> None:
    services = compose()["services"]
    for name in OURS:
        for variable, value in services[name]["environment"].items():
            if variable.endswith("_SCHEDULER"):
                host, _, port = value.partition(":")
                address = image_environment(host)["LMESH_SCHEDULER_ADDRESS"]
                assert (host, int(port)) == ("scheduler", port_of(address))
    assert services["scheduler"]["environment"]["LMESH_SCHEDULER_REDIS_URL"].startswith("redis://redis:6379")


def test_artifacts_are_one_folder_for_all() -> None:
    for name in ("gateway", "worker", "worker-gpu", "trainer"):
        service, kind = compose()["services"][name], name.removesuffix("-gpu")
        set_here = {**image_environment(kind), **service["environment"]}
        assert set_here[f"LMESH_{kind.upper()}_ARTIFACTS"] == "/artifacts"
        assert "artifacts:/artifacts" in service["volumes"]


def test_published_ports_are_the_gateways_and_on_loopback() -> None:
    published = {name: s["ports"] for name, s in compose()["services"].items() if "ports" in s}
    assert set(published) == {"gateway"}
    for port in published["gateway"]:
        assert port.startswith("${LMESH_BIND:-127.0.0.1}:")
        assert port_of(port) in exposed_ports("gateway")


@pytest.mark.parametrize("name", [*OURS, "redis"])
def test_containers_have_no_more_rights_than_they_need(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", OURS)
def test_a_container_may_drain(name: str) -> None:
    grace = float(compose()["services"][name]["stop_grace_period"].removesuffix("s"))
    assert grace > default_of(f"LMESH_{name.removesuffix('-gpu').upper()}_DRAIN_TIMEOUT_S")


def test_gpus_are_one_a_replica() -> None:
    service = compose()["services"]["worker-gpu"]
    assert service["profiles"] == ["gpu"]
    assert service["entrypoint"][0] == "one-gpu"
    assert "gpus:/run/lmesh-gpus" in service["volumes"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert {"gpu", "utility"} <= set(device["capabilities"])  # utility: nvidia-smi, which one-gpu asks


@pytest.mark.parametrize("service", SETTINGS)
class TestDockerfile:
    def text(self, service: str) -> str:
        return (ROOT / f"services/{service}/Dockerfile").read_text()

    def test_pins_and_drops_rights(self, service: str) -> None:
        text = self.text(service)
        assert "PIP_CONSTRAINT=/src/constraints.txt" in text
        assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
        final = text[text.rindex("\nFROM ") :]
        assert "ARG PIP_" not in final
        assert "--no-index" in final  # what runs was built and pinned in the stages before
        assert "# syntax=" not in text  # would need a fetch from one registry

    def test_is_probed_where_the_page_is(self, service: str) -> None:
        port = image_environment(service)[f"LMESH_{service.upper()}_METRICS_PORT"]
        assert f"HTTPConnection('127.0.0.1', {port}," in self.text(service)

    def test_starts_the_module(self, service: str) -> None:
        assert f'ENTRYPOINT ["python", "-P", "-m", "lmesh_{service}"]' in self.text(service)

    def test_copies_only_what_its_imports_need(self, service: str) -> None:
        copied = set(re.findall(r"^COPY (services/\w+) ", self.text(service), re.MULTILINE))
        assert copied == {"services/chassis", f"services/{service}"}

    def test_image_has_the_packages_version(self, service: str) -> None:
        version = tomllib.loads((ROOT / f"services/{service}/pyproject.toml").read_text())["project"]["version"]
        assert compose()["services"][service]["image"] == f"lmesh-{service}:{version}"


def test_build_context_has_what_is_copied_and_no_more() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"constraints.txt", "protos", "kernels", "services"}
