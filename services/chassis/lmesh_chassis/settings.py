"""Settings of a service: a frozen dataclass read from `LMESH_<SERVICE>_<FIELD>` variables, strictly."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from lmesh_chassis.redaction import hide, hide_url, redact

T = TypeVar("T")
Hint = Any  # what typing.get_type_hints gives for a field
Value = Any  # of the field's type

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
# Longest suffix first, so that "ms" is not read as "s".
_SECONDS = {"ms": 1e-3, "min": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


class SettingsError(ValueError):
    """A variable that cannot be used; `variable` is its name and the text says what would be right."""

    def __init__(self, variable: str, message: str) -> None:
        super().__init__(redact(f"{variable}: {message}"))
        self.variable = variable


def secret(default: str = "") -> Any:  # noqa: ANN401 - stands where dataclasses.field does
    """A text field that no repr shows and no log line or error message lets through."""
    return dataclasses.field(default=default, repr=False, metadata={"secret": True})


@dataclass(frozen=True, kw_only=True, slots=True)
class ChassisSettings:
    """What every service has; services inherit from it."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str = ""  # base URL of an OTLP/HTTP collector; empty exports nothing
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0  # 0 serves no metrics page
    drain_timeout_s: float = 30.0  # how long running work may take after SIGTERM
    reflection: bool = True
    tls_cert_file: str = ""  # PEM, the whole chain; with it everything that the service serves is TLS
    tls_key_file: str = ""  # PEM, not encrypted
    tls_ca_file: str = ""  # PEM; with it the service calls others over TLS only, and accepts only this CA
    tls_require_client_cert: bool = False  # callers need a certificate of tls_ca_file's
    tls_server_name: str = ""  # the name in the others' certificates; empty: the host that is called

    def check_tls(self) -> None:
        """ValueError for tls_* settings that do not go together."""
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.tls_require_client_cert and not (self.tls_cert_file and self.tls_ca_file):
            raise ValueError("tls_require_client_cert needs tls_cert_file, tls_key_file and tls_ca_file")
        if self.tls_server_name and not self.tls_ca_file:
            raise ValueError("tls_server_name needs tls_ca_file")


def load(cls: type[T], *, service: str, environ: Mapping[str, str] | None = None) -> T:
    """Builds `cls` from variables named `LMESH_<SERVICE>_<FIELD>`.

    Raises SettingsError for an unknown variable under that prefix, a missing one without a default, and any value
    that is not of its field's type. Fields ending in `_s` take durations (`30`, `500ms`, `5m`), those ending in
    `_bytes` sizes (`1048576`, `512MiB`), tuples take commas.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    source = os.environ if environ is None else environ
    prefix = f"LMESH_{service.upper()}_"
    fields = {prefix + field.name.upper(): field for field in dataclasses.fields(cls) if field.init}
    _refuse_unknown(source, prefix, frozenset(fields))
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for variable, field in fields.items():
        if variable in source:
            values[field.name] = _parse(variable, field.name, hints[field.name], source[variable].strip())
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SettingsError(variable, "must be set")
    for field in fields.values():
        _hide(values.get(field.name), secret=bool(field.metadata.get("secret")))
    try:
        made = cls(**values)
        if isinstance(made, ChassisSettings):
            made.check_tls()
        return made
    except SettingsError:
        raise
    except ValueError as error:  # the dataclass's own checks across fields
        raise SettingsError(prefix + "*", str(error)) from error


def _hide(value: Value, *, secret: bool) -> None:
    if isinstance(value, str):
        hide_url(value)
        if secret:
            hide(value)


def load_or_exit(cls: type[T], *, service: str) -> T:
    """`load` from the process's environment; a bad variable ends the process with status 2 and one clear line."""
    return exit_unless(lambda: load(cls, service=service), service=service)


def exit_unless(work: Callable[[], T], *, service: str) -> T:
    """What `work` returns; its SettingsError ends the process with status 2 and one clear line."""
    try:
        return work()
    except SettingsError as error:
        print(f"lmesh {service}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_bytes(text: str) -> int:
    """`512MiB`, `8MB` or `1048576` as a number of bytes; ValueError when it is none of these."""
    return round(_with_unit(text, _BYTES))


def parse_seconds(text: str) -> float:
    """`30`, `30s`, `500ms`, `5m` or `1h` as seconds; ValueError when it is none of these."""
    return _with_unit(text, _SECONDS)


def _refuse_unknown(source: Mapping[str, str], prefix: str, known: frozenset[str]) -> None:
    for variable in sorted(source):
        if variable.startswith(prefix) and variable not in known:
            raise SettingsError(variable, f"is not a setting; known: {', '.join(sorted(known))}")


def _with_unit(text: str, units: Mapping[str, float]) -> float:
    for suffix, factor in units.items():
        if text.lower().endswith(suffix.lower()):
            number = float(text[: -len(suffix)]) * factor
            break
    else:
        number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError("negative or not finite")
    return number


def _parse(variable: str, name: str, hint: Hint, text: str) -> Value:
    origin: object = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if text == "" else _parse(variable, name, inner[0], text)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_parse(variable, name, item, part.strip()) for part in text.split(",") if part.strip())
    if origin is Literal:
        return _parse_literal(variable, typing.get_args(hint), text)
    return _parse_scalar(variable, name, hint, text)


def _parse_literal(variable: str, options: tuple[Any, ...], text: str) -> Value:
    for option in options:
        if str(option) == text:
            return option
    raise SettingsError(variable, f"{text!r} is not one of {', '.join(map(str, options))}")


def _parse_scalar(variable: str, name: str, hint: Hint, text: str) -> Value:
    if hint is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise SettingsError(variable, f"{text!r} is not a boolean; write true or false")
    if hint is Path:
        return Path(text).expanduser()
    if hint is str:
        return text
    parse, wanted = _number_parser(name, hint)
    try:
        return parse(text)
    except ValueError:
        raise SettingsError(variable, f"{text!r} is not {wanted}") from None


def _number_parser(name: str, hint: Hint) -> tuple[Any, str]:
    if hint is int and name.endswith("_bytes"):
        return parse_bytes, "a size; write bytes, or a unit as in 512MiB"
    if hint is float and name.endswith("_s"):
        return parse_seconds, "a duration; write seconds, or a unit as in 500ms or 5m"
    if hint is int:
        return int, "a whole number"
    if hint is float:
        return _finite, "a finite number"
    raise TypeError(f"settings field {name} has unsupported type {hint!r}")


def _finite(text: str) -> float:
    number = float(text)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("not finite")
    return number
