"""JSON logs: one line a record, with service, request and trace; credentials never get in."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from lmesh_chassis import tracing

# The request that the current task works for; the interceptors and the gateway's HTTP side set it.
request_id: ContextVar[str] = ContextVar("lmesh_request_id", default="")

Json = Any  # whatever a caller put into a record

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET_NAMES = frozenset({"authorization", "api_key", "apikey", "password", "secret", "access_token", "hf_token"})
_URL_CREDENTIALS = re.compile(r"(\w+://)[^/\s:@]*:[^/\s@]+@")
_BEARER = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]+")


def setup(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Sends every log record of this process to `stream` (stderr) as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its info lines repeat what ours say.
    logging.getLogger("opentelemetry").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """ts, level, logger, message, service, request_id, trace_id, then the record's extras."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON; a value that JSON does not know becomes its str()."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service,
            "request_id": request_id.get(),
            "trace_id": tracing.current_trace_id(),
        }
        extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        # Empty ids are left out; an extra may name the request itself.
        line = {key: value for key, value in line.items() if value != ""} | extras
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_clean(line), default=lambda value: _scrub(str(value)), ensure_ascii=False)


def _clean(value: Json, name: str = "") -> Json:
    if name.lower() in _SECRET_NAMES:
        return "[redacted]"
    if isinstance(value, str):
        return _scrub(value)
    if isinstance(value, dict):
        return {str(key): _clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def _scrub(text: str) -> str:
    return _BEARER.sub(r"\1 [redacted]", _URL_CREDENTIALS.sub(r"\1[redacted]@", text))
