"""The published adapters of one model: whose they are, and which of them a name asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# An adapter's name has neither colon nor at sign, so what follows the last colon of an id is read in one way only.
_ASKED = re.compile(r"([A-Za-z0-9._-]{1,128})(?:@([1-9][0-9]{0,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedAdapter:
    """One version, as the scheduler announces it; `digest` is of its content, `created` is Unix seconds."""

    tenant: str
    name: str
    version: int
    digest: str
    created: float


class PublishedAdapters:
    """By tenant, name and version. A tenant's are there for that tenant alone."""

    def __init__(self, adapters: Iterable[PublishedAdapter]) -> None:
        self._tenants: dict[str, dict[str, dict[int, PublishedAdapter]]] = {}
        for adapter in adapters:
            names = self._tenants.setdefault(adapter.tenant, {})
            names.setdefault(adapter.name, {})[adapter.version] = adapter

    def newest(self, tenant: str) -> list[PublishedAdapter]:
        """The newest version of each of the tenant's, by name."""
        names = self._tenants.get(tenant, {})
        return [versions[max(versions)] for _, versions in sorted(names.items())]

    def find(self, tenant: str, asked: str) -> PublishedAdapter | None:
        """What `name` (the newest) or `name@version` means to the tenant; None when there is no such one."""
        parts = _ASKED.fullmatch(asked)
        if parts is None:
            return None
        versions = self._tenants.get(tenant, {}).get(parts[1])
        if not versions:
            return None
        return versions[max(versions)] if parts[2] is None else versions.get(int(parts[2]))
