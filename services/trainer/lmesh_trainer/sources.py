"""From what a client names to files on this machine: artifacts are fetched and verified, its paths are refused."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
from lmesh_chassis.artifacts.folders import fetch_folder
from lmesh_chassis.artifacts.store import ArtifactStore, full_disk_said, verified

from lmesh_trainer.errors import JobError
from lmesh_trainer.orders import Told
from lmesh_trainer.spec import JobSpec, make_spec

_ARTIFACT = re.compile(r"artifact:([0-9a-f]{64})")
_DATASET = re.compile(r"artifact:([0-9a-f]{64})/([A-Za-z0-9_][^/\\\0]{0,199})")
_HUB = "hub:"
_JOB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What this trainer brings to every job."""

    store: ArtifactStore
    jobs: Path  # folder of the jobs' folders
    device: str
    threads: int
    world: int = 1
    hub: bool = False  # whether jobs may name datasets of the hub

    def folder(self, job_id: str) -> Path:
        """A job's folder. Raises JobError BAD_SPEC for an id that cannot be a folder's name."""
        if not _JOB_ID.fullmatch(job_id):
            raise JobError("BAD_SPEC", "job_id: letters, digits, dots, dashes and underscores, 200 at most")
        return self.jobs / job_id

    def prepare(self, told: Told, folder: Path) -> JobSpec:
        """A client's settings as this trainer runs them, what they name fetched into `folder`. Blocks.

        A client reads nothing of the trainer's disk: its datasets and adapters are artifacts. `model` may be a path,
        because the scheduler resolves what clients ask for to what the operator's workers serve.
        Raises JobError BAD_SPEC naming the field, and ArtifactError.
        """
        spec = make_spec(told)
        dataset = msgspec.structs.replace(spec.dataset, source=self._dataset(spec.dataset.source, folder))
        lora = msgspec.structs.replace(spec.lora, start=self._start(spec.lora.start, folder))
        world = self.world * spec.nodes
        here = {"device": self.device, "threads": self.threads, "world": world}
        return msgspec.structs.replace(spec, dataset=dataset, lora=lora, **here)

    def _dataset(self, source: str, folder: Path) -> str:
        if source.startswith(_HUB) and self.hub:
            return source
        if match := _DATASET.fullmatch(source):
            # Under its own name, whose ending says what it is.
            return str(fetch_file(self.store, match[1], folder / "data" / match[1] / match[2]))
        hub = ", or hub:<owner>/<name>" if self.hub else "; this trainer takes none of the hub"
        raise JobError("BAD_SPEC", f"dataset.source must be artifact:<digest>/<file name>{hub}, not {source[:200]!r}")

    def _start(self, start: str, folder: Path) -> str:
        if not start:
            return ""
        if match := _ARTIFACT.fullmatch(start):
            return str(fetch_folder(self.store, match[1], folder / "start" / match[1]))
        raise JobError("BAD_SPEC", f"lora.start must be artifact:<digest> of an adapter's folder, not {start[:200]!r}")


def fetch_file(store: ArtifactStore, digest: str, target: Path) -> Path:
    """An artifact as a file, whole and verified or not at all; what is there already is taken for it.

    Raises ArtifactError UNKNOWN_ARTIFACT, CORRUPT_ARTIFACT or STORE_FULL.
    """
    if target.exists():
        return target
    with full_disk_said():
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
        try:
            draft = place / "file"
            with draft.open("xb") as out:
                out.writelines(verified(store, digest))
                out.flush()
                os.fsync(out.fileno())
            draft.replace(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return target
