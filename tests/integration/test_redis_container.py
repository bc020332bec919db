"""The scheduler's Redis side against the official image, over TCP, as it is in containers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.service import open_redis

from tests.containers import no_docker
from tests.deployment import compose

pytestmark = pytest.mark.skipif(bool(no_docker()), reason=no_docker() or "docker answers")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A Redis with compose's image and options; skips where the image cannot be had."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # the container is stopped below
    from docker.errors import DockerException
    from testcontainers.community.redis import RedisContainer

    service = compose()["services"]["redis"]
    image = service["image"].split(":-")[1].rstrip("}")
    container = RedisContainer(image).with_command(service["command"])
    try:
        container.start()
    except DockerException as error:
        pytest.skip(f"{image} cannot be started here: {error}")
    try:
        yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    finally:
        container.stop()


async def test_incarnations_grow(url: str) -> None:
    settings = SchedulerSettings(redis_url=url)
    first, one, _ = await open_redis(settings)
    second, two, _ = await open_redis(settings)
    assert two > one
    await first.aclose()
    await second.aclose()


async def test_options_are_composes(url: str) -> None:
    """Bounded memory in which unfinished records outlive finished ones, and a log that survives a restart."""
    redis, _, _ = await open_redis(SchedulerSettings(redis_url=url))
    found = await redis.config_get("maxmemory", "maxmemory-policy", "appendonly", "save")
    await redis.aclose()
    told = {_text(k): _text(v) for k, v in found.items()}
    assert told == {"maxmemory": str(256 << 20), "maxmemory-policy": "volatile-ttl", "appendonly": "yes", "save": ""}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
