"""Secrets stay out of logs, error messages and what a settings object shows of itself."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from lmesh_chassis import logs, redaction
from lmesh_chassis.errors import InvalidArgumentError, to_status
from lmesh_chassis.redaction import redact
from lmesh_chassis.settings import ChassisSettings, SettingsError, load, secret


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())


@pytest.fixture
def page() -> Iterator[io.StringIO]:
    """What the process logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("test"))
    logger = logging.getLogger("redaction-test")
    logger.handlers, logger.propagate = [handler], False
    yield stream
    logger.handlers, logger.propagate = [], True


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(ChassisSettings):
    redis_url: str = ""
    salt_key: str = secret()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("redis://u:hunter22@h:1/0", "redis://[redacted]@h:1/0"),
        ("redis://:hunter22@h", "redis://[redacted]@h"),
        ("redis://:p@hunter22@h/0 is down", "redis://[redacted]@h/0 is down"),
        ("rediss://h/0?db=1&password=hunter22&x=1", "rediss://h/0?db=1&password=[redacted]&x=1"),
        ("Authorization: Bearer hunter22", "Authorization: Bearer [redacted]"),
        ("{'x-api-key': 'hunter22'}", "{'x-api-key': '[redacted]'}"),
        ("key lmk_hunter22hunter22 is wrong", "key [redacted] is wrong"),
        ("nothing at http://h:1/a?b=c, mail a@b.c", "nothing at http://h:1/a?b=c, mail a@b.c"),
    ],
)
def test_what_is_taken_out(text: str, left: str) -> None:
    assert redact(text) == left


def test_secret_settings_are_hidden_wherever_they_turn_up(page: io.StringIO) -> None:
    settings = load(
        Sample, service="s", environ={"LMESH_S_SALT_KEY": "tops3cret", "LMESH_S_REDIS_URL": "redis://u:hunter22@h/0"}
    )
    assert settings.salt_key == "tops3cret" and "tops3cret" not in repr(settings)
    log = logging.getLogger("redaction-test")
    try:
        raise ConnectionError("cannot reach h with hunter22")
    except ConnectionError:
        log.exception("salt is %s", settings.salt_key, extra={"detail": [{"a": "tops3cret"}], "of": settings})
    line = page.getvalue()
    assert "tops3cret" not in line and "hunter22" not in line
    found = json.loads(line)
    assert found["message"] == "salt is [redacted]" and found["detail"] == [{"a": "[redacted]"}]
    assert "ConnectionError: cannot reach h with [redacted]" in found["exception"]


def test_secrets_by_their_name(page: io.StringIO) -> None:
    extra = {"headers": {"Authorization": "x", "X-Api-Key": "y", "host": "h"}, "api_key": "z", "cache_salt_key": "s"}
    logging.getLogger("redaction-test").error("call", extra=extra)
    found = json.loads(page.getvalue())
    assert found["headers"] == {"Authorization": "[redacted]", "X-Api-Key": "[redacted]", "host": "h"}
    assert (found["api_key"], found["cache_salt_key"]) == ("[redacted]", "[redacted]")


def test_messages_to_callers() -> None:
    redaction.hide("tops3cret")
    status = to_status(InvalidArgumentError("tops3cret and redis://u:pw@h", field="f"), "d")
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "tops3cret" not in repr(status) and "u:pw" not in repr(status)


def test_a_setting_at_fault_is_told_without_secrets() -> None:
    with pytest.raises(SettingsError) as caught:
        load(Sample, service="s", environ={"LMESH_S_METRICS_PORT": "redis://u:hunter22@h"})
    assert "hunter22" not in str(caught.value)


def test_short_values_stay(page: io.StringIO) -> None:
    redaction.hide("a")
    assert redact("a cat") == "a cat"


def test_what_nobody_caught_is_logged_like_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    logs.setup("test", stream=stream)
    error = RuntimeError("lost redis://u:hunter22@h/0")
    sys.excepthook(RuntimeError, error, None)
    found = json.loads(stream.getvalue())
    assert (found["message"], found["level"]) == ("the process failed", "critical")
    assert "RuntimeError: lost redis://[redacted]@h/0" in found["exception"]
