"""Artifacts in and out of the store, piece by piece; files and hashing are threads' work."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_chassis.artifacts.uploads import Uploads
from lmesh_chassis.settings import SettingsError

from lmesh_gateway.errors import (
    ArtifactCorruptError,
    ArtifactNotFoundError,
    BadUploadError,
    InternalError,
    InvalidArgumentError,
    ServiceError,
    StoreFullError,
)

T = TypeVar("T")

PIECE_BYTES = 1 << 20
_THREADS = 4
_LOCKS = 64
_SWEEP_EVERY_S = 3600.0

_ERRORS: dict[str, type[ServiceError]] = {
    error.reason: error for error in (ArtifactNotFoundError, ArtifactCorruptError, StoreFullError, BadUploadError)
} | {"BAD_NAME": InvalidArgumentError}


class ArtifactTransfer:
    """Over one folder, which other gateways, the scheduler, workers and trainers may share."""

    def __init__(self, store: FolderStore, *, max_bytes: int, reserve_bytes: int = 0) -> None:
        self._store = store
        self._uploads = Uploads(store, max_bytes=max_bytes, reserve_bytes=reserve_bytes)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="artifacts")
        # Held in the threads: a call that is cancelled leaves its thread at work, and the next writer must wait for it.
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._sweep_at = 0.0

    @classmethod
    def from_folder(cls, folder: str, *, max_bytes: int, reserve_bytes: int = 0) -> ArtifactTransfer | None:
        """None where no folder is set. Raises SettingsError for one that cannot be used."""
        if not folder:
            return None
        try:
            store = FolderStore(Path(folder))
            _ = store.drafts
        except (OSError, ArtifactError) as error:
            raise SettingsError("LMESH_GATEWAY_ARTIFACTS", str(error)) from error
        return cls(store, max_bytes=max_bytes, reserve_bytes=reserve_bytes)

    async def begin(self, digest: str, size: int) -> int:
        """How many bytes of an upload are there; `size`: it is stored. Raises InvalidArgumentError, BadUploadError
        for a size that is not allowed, StoreFullError, or what `append` raises for the last piece."""
        return await self._run(lambda: self._begin(digest, size), digest, "size")

    async def append(self, digest: str, offset: int, data: bytes, *, size: int) -> int:
        """Takes the next piece, and stores the artifact with the last; how many bytes are there then.

        Raises BadUploadError, StoreFullError, or ArtifactCorruptError when the bytes are not those of the digest: then
        all are thrown away.
        """
        return await self._run(lambda: self._append(digest, offset, data, size), digest, "offset")

    async def read(self, digest: str, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `offset` on, in pieces; one piece is held at a time.

        Raises ArtifactNotFoundError, InvalidArgumentError for an offset beyond the end, and after the last piece
        ArtifactCorruptError, where all of it was read and is not what was stored.
        """
        reader = await self._run(lambda: _Reader(self._store, digest, offset), digest, "offset")
        try:
            while piece := await self._run(reader.next, digest, "digest"):
                yield piece
        finally:
            with contextlib.suppress(RuntimeError):  # the pool is closed, and the process about to end
                self._pool.submit(reader.close)

    def close(self) -> None:
        """Stops the threads when they have done what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, digest: str, size: int) -> int:
        self._sweep()
        with self._lock(digest):
            there = self._uploads.begin(digest, size)
            # A gateway may have gone between the last piece and the commit.
            return self._commit(digest, size) if there == size else there

    def _append(self, digest: str, offset: int, data: bytes, size: int) -> int:
        with self._lock(digest):
            there = self._uploads.append(digest, offset, data, size=size)
            return self._commit(digest, size) if there == size else there

    def _commit(self, digest: str, size: int) -> int:
        try:
            self._uploads.commit(digest, size=size)
        except FileNotFoundError:  # another gateway has just stored the same
            self._uploads.commit(digest, size=size)
        return size

    def _lock(self, digest: str) -> threading.Lock:
        return self._locks[hash(digest) % _LOCKS]

    def _sweep(self) -> None:
        """Uploads that were given up must not fill the disk."""
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + _SWEEP_EVERY_S
            self._uploads.sweep()

    async def _run(self, work: Callable[[], T], digest: str, field: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except ArtifactError as error:
            field = field if error.reason == BadUploadError.reason else "digest"
            raise _ERRORS.get(error.reason, InternalError)(error.message, field=field) from error


class _Reader:
    """One artifact, read forwards; checked at its end when it began at 0."""

    def __init__(self, store: FolderStore, digest: str, offset: int) -> None:
        self._digest = digest
        self._file: BinaryIO = store.open(digest)
        size = store.size(digest)
        if offset > size:
            self._file.close()
            raise InvalidArgumentError(f"offset: {offset} is beyond the artifact's {size} bytes", field="offset")
        self._file.seek(offset)
        self._found = hashlib.sha256() if offset == 0 else None

    def next(self) -> bytes:
        """The next piece; empty at the end. Raises ArtifactError CORRUPT_ARTIFACT."""
        piece = self._file.read(PIECE_BYTES)
        if self._found is not None:
            self._found.update(piece)
            if not piece and self._found.hexdigest() != self._digest:
                raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {self._digest} is not what was stored")
        return piece

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()
