"""The engine's log lines: the servers' form, and no credentials in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from lmesh_worker.engine import log_lines


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    made = io.StringIO()
    log_lines.setup("info", made)
    yield made
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line(stream: io.StringIO) -> None:
    logging.getLogger("lmesh_worker.engine.x").info("two\nlines of %d", 7, extra={"plan_bytes": {"kv": 3}})
    logging.getLogger("lmesh_worker.engine.x").debug("not wanted")
    (line,) = lines(stream)
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "lmesh_worker.engine.x",
        "message": "two\nlines of 7",
        "service": "worker",
        "process": "engine",
        "plan_bytes": {"kv": 3},
    }


def test_a_traceback_stays_in_its_line(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("planted")
    except RuntimeError:
        logging.getLogger("x").exception("it failed")
    (line,) = lines(stream)
    assert "RuntimeError: planted" in line["exception"]


@pytest.mark.parametrize(
    "text",
    [
        "https://user:SECRET@host/model",
        "https://SECRET@host/model",
        "Authorization: Bearer SECRET",
        "token hf_SECRETSECRET was refused",
    ],
)
def test_credentials_stay_out(stream: io.StringIO, text: str) -> None:
    logging.getLogger("x").warning("%s", text, extra={"source": text, "object": {"deep": [text]}})
    (line,) = lines(stream)
    assert "SECRET" not in stream.getvalue()
    assert "[redacted]" in line["message"]
