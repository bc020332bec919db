"""The store that services see, whatever is behind it; and the folder or volume that is behind it today.

An artifact is a sequence of bytes and goes by its sha256. It is there whole or not at all: it is written under
another name, synced, checked, and renamed. The same bytes put twice are one artifact.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from lmesh_chassis.artifacts.errors import ArtifactError

CHUNK = 1 << 20  # bytes read or written at once
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ArtifactStore(Protocol):
    """What a service needs of a store; all calls block, and raise ArtifactError."""

    def put(self, source: BinaryIO) -> str:
        """Stores what a file gives from where it stands; its digest."""

    def open(self, digest: str) -> BinaryIO:
        """A reader; who reads all of it and cares checks it with `verified`."""

    def size(self, digest: str) -> int:
        """In bytes."""

    def delete(self, digest: str) -> None:
        """Forgets it; unknown ones are ignored."""


def check_digest(digest: str) -> str:
    """The digest, if it is one. Raises ArtifactError BAD_NAME: it becomes a file's name."""
    if not _DIGEST.fullmatch(digest):
        raise ArtifactError("BAD_NAME", f"{digest[:80]!r} is no sha256 in 64 lower-case hex digits")
    return digest


@contextmanager
def full_disk_said() -> Iterator[None]:
    """Turns a full disk into ArtifactError STORE_FULL."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtifactError("STORE_FULL", "the artifact store has no room left") from error
        raise


class FolderStore:
    """Artifacts as files of a folder, `ab/abcd...`; several processes and machines may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with full_disk_said():
            root.mkdir(parents=True, exist_ok=True)

    @property
    def drafts(self) -> Path:
        """Where what is not whole yet lies."""
        folder = self._root / "drafts"
        folder.mkdir(exist_ok=True)
        return folder

    def path(self, digest: str) -> Path:
        """Where an artifact lies or would lie."""
        return self._root / check_digest(digest)[:2] / digest

    def put(self, source: BinaryIO) -> str:
        """See `ArtifactStore.put`."""
        with full_disk_said():
            descriptor, name = tempfile.mkstemp(dir=self.drafts)
            draft = Path(name)
            try:
                digest = hashlib.sha256()
                with os.fdopen(descriptor, "wb") as file:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                return self.adopt(draft, digest.hexdigest())
            finally:
                draft.unlink(missing_ok=True)

    def adopt(self, draft: Path, digest: str) -> str:
        """Makes a whole file of `drafts`, whose digest this is, the artifact; returns the digest."""
        target = self.path(digest)
        with full_disk_said():
            if target.exists():
                return digest
            target.parent.mkdir(exist_ok=True)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.chmod(0o644)  # drafts are their maker's alone, and others read artifacts
            draft.replace(target)
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return digest

    def open(self, digest: str) -> BinaryIO:
        """See `ArtifactStore.open`. Raises ArtifactError UNKNOWN_ARTIFACT."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError as error:
            raise ArtifactError("UNKNOWN_ARTIFACT", f"there is no artifact {digest}") from error

    def size(self, digest: str) -> int:
        """See `ArtifactStore.size`. Raises ArtifactError UNKNOWN_ARTIFACT."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise ArtifactError("UNKNOWN_ARTIFACT", f"there is no artifact {digest}") from error

    def delete(self, digest: str) -> None:
        """See `ArtifactStore.delete`."""
        self.path(digest).unlink(missing_ok=True)


def verified(store: ArtifactStore, digest: str) -> Iterator[bytes]:
    """The artifact in chunks. Raises ArtifactError CORRUPT_ARTIFACT after the last when they are not what was put."""
    found = hashlib.sha256()
    with store.open(digest) as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            yield chunk
    if found.hexdigest() != digest:
        raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {digest} is not what was stored under that name")
