"""What must not be read by others, taken out of everything that leaves a process as text: logs and error messages."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

HIDDEN = "[redacted]"
# Shorter values occur by chance in innocent text, and would only make logs unreadable.
_SHORTEST = 6

_known: set[str] = set()

_URL_CREDENTIALS = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/?#'\"<>]*@")
_URL_PARAMETERS = re.compile(r"(?i)([?&;](?:password|passwd|token|api[_-]?key|secret|access_token)=)[^&;\s'\"<>]+")
_BEARER = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]+")
_HEADERS = re.compile(r"(?i)\b(x-api-key|api[_-]key|authorization)(['\"]?\s*[:=,]\s*['\"]?)(?!bearer)[^\s'\",;)]+")
_API_KEYS = re.compile(r"\blmk_[\w-]{8,}")
_NAMES = frozenset({"authorization", "cookie", "passwd", "credentials"})
_NAME_ENDINGS = ("api_key", "apikey", "password", "secret", "access_token", "hf_token", "salt_key", "private_key")


def hide(value: str) -> None:
    """Has this very value taken out from now on; too short a one is not."""
    if len(value) >= _SHORTEST:
        _known.add(value)


def hide_url(value: str) -> None:
    """Has the password of a URL taken out wherever it turns up alone; nothing happens for what is no URL."""
    try:
        parts = urlsplit(value)
        password = parts.password if parts.scheme and parts.netloc else None
    except ValueError:
        return
    if password:
        hide(password)
        hide(unquote(password))


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name, of a field or a header, is hidden whole."""
    name = name.lower().replace("-", "_")
    return name in _NAMES or name.endswith(_NAME_ENDINGS)


def redact(text: str) -> str:
    """The text without known secrets, credentials in URLs and API keys."""
    for value in _known:
        if value in text:
            text = text.replace(value, HIDDEN)
    text = _URL_CREDENTIALS.sub(rf"\1{HIDDEN}@", text)
    text = _URL_PARAMETERS.sub(rf"\1{HIDDEN}", text)
    text = _HEADERS.sub(rf"\1\2{HIDDEN}", _BEARER.sub(rf"\1 {HIDDEN}", text))
    return _API_KEYS.sub(HIDDEN, text)
