"""What a query's process is asked and what it answers, torch-free: msgpack in its folder."""

from __future__ import annotations

import msgspec

from lmesh_trainer.events import DatasetReady, PlanMade
from lmesh_trainer.spec import JobSpec


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Is the device here, and what is it?"""

    device: str
    threads: int


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The device in words."""

    device: str


class Validate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A dry run."""

    spec: JobSpec


class Validated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the job would begin with."""

    dataset: DatasetReady
    plan: PlanMade


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What adapter lies in a folder?"""

    folder: str


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An adapter; its manifest is empty where it has none."""

    adapter_digest: str
    manifest: str
    artifact: str = ""  # the server's to say


class Export(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Write a model with an adapter merged in."""

    source: str  # of the base, or of the full model
    adapter: str  # folder; empty for a full model
    kind: str  # of lmesh_trainer.export.exporter.ExportKind
    target: str  # a new folder, or a new .gguf file
    nf4: bool = False  # the adapter was trained on the base in NF4


class Exported(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It is written; `survival` is the share of the adapter's change that the format holds."""

    survival: float
    artifact: str = ""  # the server's to say


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It cannot be done."""

    reason: str
    message: str


Question = Probe | Validate | Inspect | Export
Reply = Probed | Validated | Inspected | Exported | Refused
QUESTION_FILE, REPLY_FILE = "question.msgpack", "reply.msgpack"
EXPORT_KINDS = {
    ("merged", ""): "merged-bf16",
    ("merged", "bf16"): "merged-bf16",
    ("merged", "f16"): "merged-f16",
    ("merged", "float32"): "merged-float32",
    ("gguf", ""): "gguf-f16",
    ("gguf", "f16"): "gguf-f16",
    ("gguf", "q8_0"): "gguf-q8_0",
}
