"""Checkpoints: whole or not there, verified when read, the oldest removed.

A folder `step-00000120` holds the trained tensors, the optimiser's state, where the job was, where a streamed dataset
was, and a manifest with the digest of each file. It is written under another name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmesh_trainer.errors import JobError, disk_full

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("parameters.safetensors", "optimiser.safetensors", "progress.json")
_CURSOR = "cursor.msgpack"  # of a feed that needs more than the step


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job was. Randomness is a function of the seed and the step, and so is the order of data that is held
    whole; a stream's cursor lies beside this.
    """

    step: int  # updates tried, skipped ones too
    spec_digest: str  # of what must not change between two parts of a job
    tokens: int = 0
    trained_tokens: int = 0
    last_loss: float | None = None
    skipped: int = 0  # updates left out because something was not finite
    best_eval_loss: float | None = None
    best_step: int = 0
    worse_evaluations: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was read."""

    progress: Progress
    parameters: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    cursor: bytes  # of the feed


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    cursor: bytes = b"",
) -> Path:
    """Writes a new checkpoint below `folder` and returns its own. Raises JobError DISK_FULL or CHECKPOINT_FAILED."""
    target = folder / f"step-{progress.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
        try:
            if cursor:
                (draft / _CURSOR).write_bytes(cursor)
            _write(draft, progress, parameters, optimiser)
            if target.exists():  # the same step of an attempt before this one
                shutil.rmtree(target)
            draft.replace(target)
            _sync(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        reason = "DISK_FULL" if disk_full(error) else "CHECKPOINT_FAILED"
        raise JobError(reason, f"checkpoint {target.name} could not be written: {error}") from error
    return target


def _write(draft: Path, progress: Progress, parameters: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]) -> None:
    save_file({n: t.detach().cpu().contiguous() for n, t in parameters.items()}, draft / _FILES[0])
    save_file({n: t.detach().cpu().contiguous() for n, t in optimiser.items()}, draft / _FILES[1])
    (draft / _FILES[2]).write_bytes(msgspec.json.encode(progress))
    manifest = {path.name: _digest(path) for path in sorted(draft.iterdir())}
    (draft / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in draft.iterdir():
        _sync(path)
    _sync(draft)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below a folder, oldest first; drafts that were never finished are none."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies one. Raises JobError CORRUPT_CHECKPOINT naming the file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in {*_FILES, *manifest}:
            if _digest(path / name) != manifest[name]:
                raise JobError("CORRUPT_CHECKPOINT", f"{path.name}/{name} is not what was written")
        return Checkpoint(
            progress=msgspec.json.decode((path / _FILES[2]).read_bytes(), type=Progress),
            parameters=load_file(path / _FILES[0]),
            optimiser=load_file(path / _FILES[1]),
            cursor=(path / _CURSOR).read_bytes() if _CURSOR in manifest else b"",
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, JobError):
            raise
        raise JobError("CORRUPT_CHECKPOINT", f"{path.name} cannot be read: {error}") from error


def prune(folder: Path, keep: int, *, spare: Path | None = None) -> None:
    """Removes all but the newest `keep` checkpoints, and never `spare`; drafts left by a crash go too."""
    doomed = [path for path in list_checkpoints(folder)[:-keep] if path != spare]
    drafts = [path for path in folder.glob(".draft-*") if path.is_dir()]
    for path in doomed + drafts:
        shutil.rmtree(path, ignore_errors=True)
