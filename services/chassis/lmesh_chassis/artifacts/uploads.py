"""Artifacts that come in pieces, from clients that may go away and come back."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.store import CHUNK, FolderStore, check_digest, full_disk_said


class Uploads:
    """Uploads by the digest and size that the client says first; a broken one goes on where it was.

    One upload of a digest has one writer at a time; a second one's pieces are refused by their offset.
    """

    def __init__(
        self, store: FolderStore, *, max_bytes: int, keep_s: float = 24 * 3600.0, reserve_bytes: int = 0
    ) -> None:
        self._store, self._max_bytes, self._keep_s = store, max_bytes, keep_s
        self._reserve_bytes = reserve_bytes  # of the disk, that is left to what the mesh itself writes

    def _draft(self, digest: str) -> Path:
        return self._store.drafts / f"upload-{check_digest(digest)}"

    def begin(self, digest: str, size: int) -> int:
        """How many bytes are there already: where to go on; `size` when it is whole and nothing is to be sent.

        Raises ArtifactError BAD_UPLOAD for a size that is not allowed, BAD_NAME, STORE_FULL for one that would not
        leave the reserve.
        """
        if not 0 < size <= self._max_bytes:
            raise ArtifactError("BAD_UPLOAD", f"size must lie in 1..{self._max_bytes} bytes, not {size}")
        if self._store.path(digest).exists():
            return size
        draft = self._draft(digest)
        there = draft.stat().st_size if draft.exists() else 0
        if there > size:
            draft.unlink(missing_ok=True)
            there = 0
        room = shutil.disk_usage(self._store.drafts).free - self._reserve_bytes
        if self._reserve_bytes and size - there > room:
            message = f"{size - there} bytes are to come, and the artifact store has room for {max(0, room)}"
            raise ArtifactError("STORE_FULL", message)
        return there

    def append(self, digest: str, offset: int, data: bytes, *, size: int) -> int:
        """Writes one piece at `offset`, which must be where the upload is; the bytes that are there now.

        Raises ArtifactError BAD_UPLOAD (another offset, or beyond the size) or STORE_FULL, which keeps what is there.
        """
        draft = self._draft(digest)
        with full_disk_said(), draft.open("ab") as file:
            there = file.tell()
            if offset != there:
                raise ArtifactError("BAD_UPLOAD", f"the upload is at byte {there}, and the piece at {offset}")
            if offset + len(data) > size:
                raise ArtifactError("BAD_UPLOAD", f"{offset + len(data)} bytes of the {size} that were announced")
            try:
                file.write(data)
                file.flush()
            except OSError:
                file.truncate(there)
                raise
            return there + len(data)

    def commit(self, digest: str, *, size: int) -> str:
        """Makes the upload the artifact. Raises ArtifactError BAD_UPLOAD when bytes lack, CORRUPT_ARTIFACT when the
        bytes are others than announced: they are thrown away then.
        """
        if self._store.path(digest).exists():
            return digest
        draft = self._draft(digest)
        there = draft.stat().st_size if draft.exists() else 0
        if there != size:
            raise ArtifactError("BAD_UPLOAD", f"{there} of {size} bytes are there")
        found = _digest(draft)
        if found != digest:
            draft.unlink(missing_ok=True)
            raise ArtifactError("CORRUPT_ARTIFACT", f"the bytes that came are {found}, not {digest}; send them again")
        return self._store.adopt(draft, digest)

    def sweep(self) -> int:
        """Removes drafts that nobody has touched for long; how many."""
        old = [path for path in self._store.drafts.iterdir() if time.time() - path.stat().st_mtime > self._keep_s]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
