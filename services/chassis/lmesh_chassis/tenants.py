"""The tenants file: who may call, with which API keys (by digest), at what share and within which limits."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Value = Any  # what a TOML file may hold
Entry = Mapping[str, Value]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("max_queued", "max_live", "requests_per_minute", "tokens_per_minute")
# A weight divides what a tenant is charged: beyond these a share is a typing error, not a policy.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-3, 1e3


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant; a limit of 0 is no limit. Without any digest nobody can call as this tenant."""

    id: str
    key_digests: tuple[str, ...]  # sha256 of an API key, in lower-case hex
    weight: float = 1.0  # share of the mesh, relative to the other tenants
    max_queued: int = 0  # requests that wait for a place
    max_live: int = 0  # requests that wait or run
    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # prompt and new tokens together


# Metadata of a gateway's calls for a client: whose they are. Services believe their gateways, and those no client.
TENANT_METADATA = "x-lmesh-tenant"

# Who calls where there is no tenants file: everything is open, and nothing is limited.
ANYONE = Tenant(id="", key_digests=())


def load_tenants(path: str) -> dict[str, Tenant]:
    """Tenants by id, in the file's order.

    The file is TOML with one table a tenant: `[tenants.<id>]`, `key_digests = ["<sha256 hex>", ...]` and, where they
    differ from the defaults, the other fields of Tenant. OSError when it cannot be read. ValueError names the entry
    at fault, never its value: what stands where a digest belongs may be the key itself.
    """
    with Path(path).open("rb") as file:
        try:
            content = tomllib.load(file)
        except ValueError as error:  # not TOML, or not UTF-8
            raise ValueError(f"{path} is not a TOML file: {_place(error)}") from None
    tables = content.pop("tenants", None)
    if content:
        raise ValueError(f"{path}: {', '.join(sorted(content))} is not known here; only [tenants.<id>] tables are")
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"{path}: has no [tenants.<id>] table")
    tenants = {name: _tenant(name, f"{path}: tenants.{name}", entry) for name, entry in tables.items()}
    _refuse_shared_keys(path, tenants)
    return tenants


def _place(error: ValueError) -> str:
    # tomllib quotes the faulty text in some messages; the place is enough to find it and tells no secret.
    found = re.search(r"at line \d+, column \d+|at end of document", str(error))
    return found.group(0).removeprefix("at ") if found else "not readable as UTF-8 text"


def _tenant(name: str, where: str, entry: Value) -> Tenant:
    if not _ID.fullmatch(name):
        raise ValueError(f"{where}: an id has 1 to 64 letters, digits, '.', '_' or '-', and starts with no sign")
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be a table")
    known = {field.name for field in fields(Tenant)} - {"id"}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} is not known; known: {', '.join(sorted(known))}")
    return Tenant(
        id=name,
        key_digests=_digests(where, entry),
        weight=_weight(where, entry.get("weight", 1.0)),
        **{count: _count(f"{where}.{count}", entry.get(count, 0)) for count in _COUNTS},
    )


def _digests(where: str, entry: Entry) -> tuple[str, ...]:
    if "key_digests" not in entry:
        raise ValueError(f"{where}.key_digests: must be given; an empty list locks the tenant out")
    digests = entry["key_digests"]
    if not isinstance(digests, list):
        raise ValueError(f"{where}.key_digests: must be a list")
    for index, digest in enumerate(digests):
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"{where}.key_digests[{index}]: must be the 64 lower-case hex digits of a key's sha256")
    return tuple(digests)


def _weight(where: str, value: Value) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not _LEAST_WEIGHT <= value <= _MOST_WEIGHT:
        raise ValueError(f"{where}.weight: must be a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}")
    return float(value)


def _count(where: str, value: Value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"{where}: must be a whole number, 0 for no limit")
    return value


def _refuse_shared_keys(path: str, tenants: Mapping[str, Tenant]) -> None:
    owners: dict[str, str] = {}
    for name, tenant in tenants.items():
        for index, digest in enumerate(tenant.key_digests):
            if digest in owners:
                other = owners[digest]
                raise ValueError(f"{path}: tenants.{name}.key_digests[{index}]: the same key is in tenants.{other}")
            owners[digest] = name
