"""The engine process's log: JSON lines as the servers write them, without what they import."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# A model's source may be a URL with a password in it, and a library may log the header that it sends.
_SECRETS = (
    (re.compile(r'(\w+://)[^/\s@"]*@'), r"\1[redacted]@"),
    (re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]+"), r"\1 [redacted]"),
    (re.compile(r"\bhf_\w{8,}"), "[redacted]"),
)


def setup(level: str, stream: TextIO | None = None) -> None:
    """Sends records and warnings to `stream` (stderr), one JSON object a line. ValueError for an unknown level."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class LineFormatter(logging.Formatter):
    """ts, level, logger, message, service, process, then the record's extras."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a value that JSON does not know becomes its str()."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "service": "worker",
            "process": "engine",
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _scrub(json.dumps(line, default=str, ensure_ascii=False))


def _scrub(text: str) -> str:
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
