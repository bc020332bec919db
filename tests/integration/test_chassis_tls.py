"""TLS between real sockets: who is let in and who is not, and settings that cannot be used."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lmesh_chassis import tls
from lmesh_chassis.channel import connect
from lmesh_chassis.keepalive import DEFAULT_MAX_METADATA_BYTES
from lmesh_chassis.server import GrpcServer
from lmesh_chassis.settings import ChassisSettings, SettingsError, load
from lmesh_chassis.tls import PLAIN, Tls

from tests.certificates import Authority, Pair

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def service(ours: Authority) -> Pair:
    return ours.issue("service", HOST)


def made(ca: Authority | None = None, pair: Pair | None = None, *, mutual: bool = False, name: str = "") -> Tls:
    cert, key = ("", "") if pair is None else (pair.cert, pair.key)
    return tls.from_settings(
        ChassisSettings(
            tls_cert_file=cert,
            tls_key_file=key,
            tls_ca_file="" if ca is None else ca.ca,
            tls_require_client_cert=mutual,
            tls_server_name=name,
        )
    )


@asynccontextmanager
async def serving(material: Tls) -> AsyncIterator[str]:
    server = GrpcServer(f"{HOST}:0", domain="lmesh.test", tls=material)
    port = await server.start()
    server.set_all_serving(True)
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.drain(0)


async def asked(address: str, material: Tls, **call: Any) -> grpc.StatusCode:
    """The code of a health check over a channel of its own."""
    async with connect(address, retries=False, tls=material) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10, **call)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


OK, REFUSED = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


async def test_a_server_with_a_certificate(ours: Authority, theirs: Authority, service: Pair) -> None:
    async with serving(made(pair=service)) as address:
        assert await asked(address, made(ours)) is OK
        assert await asked(address, PLAIN) is REFUSED
        assert await asked(address, made(theirs)) is REFUSED


async def test_a_certificate_for_another_name(ours: Authority) -> None:
    async with serving(made(pair=ours.issue("mesh", "lmesh.internal"))) as address:
        assert await asked(address, made(ours)) is REFUSED
        assert await asked(address, made(ours, name="lmesh.internal")) is OK
        assert await asked(address, made(ours, name="another")) is REFUSED


async def test_mutual_tls(ours: Authority, theirs: Authority, service: Pair) -> None:
    foreign = theirs.issue("caller", HOST)
    async with serving(made(ours, service, mutual=True)) as address:
        assert await asked(address, made(ours, ours.issue("caller", "caller"))) is OK
        assert await asked(address, made(ours)) is REFUSED
        assert await asked(address, made(ours, foreign)) is REFUSED
        assert await asked(address, PLAIN) is REFUSED


async def test_a_plain_server_does_not_pass_for_one_with_tls(ours: Authority) -> None:
    async with serving(PLAIN) as address:
        assert await asked(address, made(ours)) is REFUSED
        assert await asked(address, PLAIN) is OK


async def test_metadata_is_bounded() -> None:
    async with serving(PLAIN) as address:
        fits = (("x-filler", "y" * (DEFAULT_MAX_METADATA_BYTES // 2)),)
        assert await asked(address, PLAIN, metadata=fits) is OK
        for size in (DEFAULT_MAX_METADATA_BYTES + 1, 8 * DEFAULT_MAX_METADATA_BYTES):
            code = await asked(address, PLAIN, metadata=(("x-filler", "y" * size),))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestSettings:
    def test_without_any_nothing_is_encrypted(self) -> None:
        assert tls.from_settings(ChassisSettings()) is PLAIN

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"TLS_CERT_FILE": "a"}, "go together"),
            ({"TLS_KEY_FILE": "a"}, "go together"),
            ({"TLS_REQUIRE_CLIENT_CERT": "true"}, "needs tls_cert_file"),
            ({"TLS_REQUIRE_CLIENT_CERT": "true", "TLS_CA_FILE": "a"}, "needs tls_cert_file"),
            ({"TLS_SERVER_NAME": "a"}, "needs tls_ca_file"),
        ],
    )
    def test_what_does_not_go_together(self, values: dict[str, str], words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            load(ChassisSettings, service="s", environ={f"LMESH_S_{k}": v for k, v in values.items()})

    def test_files_that_cannot_be_used(self, ours: Authority, theirs: Authority, service: Pair, tmp_path: Path) -> None:
        other = theirs.issue("other", HOST)
        missing, empty = Pair(str(tmp_path / "none"), service.key), tmp_path / "empty"
        empty.write_text("nothing here")
        for pair, words in (
            (missing, "cannot read .*none: No such file"),
            (Pair(service.cert, other.key), "are no pair"),
            (Pair(str(empty), service.key), "are no pair"),
            (Pair(service.key, service.cert), "are no pair"),
        ):
            with pytest.raises(SettingsError, match=words):
                made(ours, pair)
        with pytest.raises(SettingsError, match="holds no certificate"):
            tls.from_settings(ChassisSettings(tls_ca_file=str(empty)))

    def test_a_key_is_never_shown(self, ours: Authority, service: Pair) -> None:
        material = made(ours, service)
        assert material.key and b"PRIVATE KEY" in material.key
        assert "PRIVATE" not in repr(material)
