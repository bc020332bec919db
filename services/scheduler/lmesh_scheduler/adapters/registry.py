"""The published adapters: versions under `tenant, model, name`, found by any of it or by content digest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One version of an adapter. `created` is Unix seconds; `manifest` is JSON, or empty for one from elsewhere."""

    tenant: str
    model: str
    name: str
    version: int
    digest: str  # content digest of its tensors
    artifact: str  # digest of its folder in the artifact store
    created: float
    manifest: str = ""
    job_id: str = ""
    base_digest: str = ""  # of the base that it was trained on; empty when nobody says
    recipe_mismatch: bool = False  # served on other quantisation than it was trained on, as asked for


class AdapterRegistry:
    """In memory; its owner writes it down."""

    def __init__(self, entries: Iterable[Published] = ()) -> None:
        self._entries: dict[tuple[str, str, str], dict[int, Published]] = {}
        self._contents: dict[str, list[Published]] = {}
        for entry in entries:
            self.put(entry)

    def put(self, entry: Published) -> None:
        """Adds a version."""
        self._entries.setdefault((entry.tenant, entry.model, entry.name), {})[entry.version] = entry
        self._contents.setdefault(entry.digest, []).append(entry)

    def remove(self, entry: Published) -> None:
        """Forgets a version; its number is not given again while a newer one is there."""
        key = (entry.tenant, entry.model, entry.name)
        versions = self._entries.get(key, {})
        versions.pop(entry.version, None)
        self._contents[entry.digest] = [e for e in self.with_digest(entry.digest) if e != entry]
        if not self._contents[entry.digest]:
            del self._contents[entry.digest]
        if not versions:
            self._entries.pop(key, None)

    def versions(self, tenant: str, model: str, name: str) -> list[Published]:
        """All versions, oldest first."""
        return [entry for _, entry in sorted(self._entries.get((tenant, model, name), {}).items())]

    def find(self, tenant: str, model: str, name: str, version: int = 0) -> Published | None:
        """That version, or the newest for 0."""
        versions = self.versions(tenant, model, name)
        if not version:
            return versions[-1] if versions else None
        return next((entry for entry in versions if entry.version == version), None)

    def all(self) -> list[Published]:
        """Everything, by tenant, model, name and version."""
        return [entry for key in sorted(self._entries) for entry in self.versions(*key)]

    def of_model(self, model: str, base_digest: str) -> list[Published]:
        """What may be served on that base under that id."""
        return [entry for entry in self.all() if entry.model == model and fits(entry, base_digest)]

    def with_digest(self, digest: str) -> list[Published]:
        """Every entry of that content."""
        return self._contents.get(digest, [])

    def allows(self, tenant: str, model: str, digest: str) -> bool:
        """Whether a tenant may ask for that content on that model."""
        return any(entry.tenant == tenant and entry.model == model for entry in self.with_digest(digest))


def fits(entry: Published, base_digest: str) -> bool:
    """Whether an adapter belongs to that base: the same weights, and the same quantisation unless waived."""
    if not entry.base_digest or entry.base_digest == base_digest:
        return True
    return entry.recipe_mismatch and weights_of(entry.base_digest) == weights_of(base_digest)


def weights_of(base_digest: str) -> str:
    """The digest of the weights alone, without the recipe by which loading quantises them."""
    return base_digest.partition("+")[0]
