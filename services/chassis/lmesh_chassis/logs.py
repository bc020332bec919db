"""JSON logs: one line a record, with service, request and trace; credentials never get in."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from lmesh_chassis import tracing
from lmesh_chassis.redaction import HIDDEN, is_secret_name, redact

# The request that the current task works for; the interceptors and the gateway's HTTP side set it.
request_id: ContextVar[str] = ContextVar("lmesh_request_id", default="")

Json = Any  # whatever a caller put into a record

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Sends every log record of this process to `stream` (stderr) as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What nobody caught would go to stderr as it is, secrets of its message included.
    sys.excepthook = _log_uncaught
    # Its info lines repeat what ours say.
    logging.getLogger("opentelemetry").setLevel(logging.WARNING)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("lmesh").critical("the process failed", exc_info=(kind, error, trace))


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
        return json.dumps(_clean(line), default=lambda value: redact(str(value)), ensure_ascii=False)


def _clean(value: Json, name: str = "") -> Json:
    if name and is_secret_name(name):
        return HIDDEN
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {str(key): _clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
