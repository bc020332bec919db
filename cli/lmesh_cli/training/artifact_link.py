"""The mesh's artifact store, as what the chassis's folders and files are put into and taken from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lmesh.training.v1 import training_pb2
from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.store import CHUNK

from lmesh_cli import access
from lmesh_cli.mesh_link import MeshError
from lmesh_cli.training.training_link import reach_training, retried

_ATTEMPTS = 5  # of one transfer that does not get on; each goes on where the one before was
_CALL_TIMEOUT_S = 60.0
_LONGEST_HELD = (16 << 20) + 1  # bytes; a folder's list is no longer

Moved = Callable[[str, int, int], None]  # name of what is moved, bytes of it that have been, and bytes of it or 0


def _quiet(name: str, at: int, size: int) -> None:
    """Nobody wants to know."""


class MeshStore:
    """An `lmesh_chassis.artifacts.store.ArtifactStore` behind a gateway; calls raise MeshError too."""

    def __init__(self, address: str, moved: Moved = _quiet) -> None:
        self._address = address
        self._moved = moved
        self._sizes: dict[str, int] = {}
        self._held: dict[str, bytes] = {}

    def put(self, source: BinaryIO) -> str:
        """Uploads what a file gives from where it stands, but for what is there already; its digest."""
        begin, digest, size = source.tell(), hashlib.sha256(), 0
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
        told = digest.hexdigest()
        if size == 0:
            raise ArtifactError("BAD_UPLOAD", f"{_name(source)} is empty")
        self._upload(source, begin, told, size)
        self._sizes[told] = size
        return told

    def open(self, digest: str) -> BinaryIO:
        """A reader of the artifact."""
        if digest in self._held:
            return io.BytesIO(self._held[digest])
        return io.BufferedReader(_Pieces(self._pieces(digest)), CHUNK)

    def size(self, digest: str) -> int:
        """In bytes: known of what was put; others are fetched for it, as far as a folder's list may be long."""
        if digest not in self._sizes:
            with self.open(digest) as file:
                held = file.read(_LONGEST_HELD)
            if len(held) < _LONGEST_HELD:
                self._held[digest] = held
            return len(held)
        return self._sizes[digest]

    def delete(self, digest: str) -> None:
        """The mesh forgets by itself what nothing needs."""
        raise ArtifactError("BAD_NAME", "artifacts are not deleted from outside")

    def _upload(self, source: BinaryIO, begin: int, digest: str, size: int) -> None:
        for attempt in range(_ATTEMPTS):
            there = retried(lambda: self._there(digest, size), _ATTEMPTS)
            self._moved(_name(source), there, size)
            if there == size:
                return
            source.seek(begin + there)
            try:
                self._send(source, there, digest, size)
                return
            except MeshError as error:
                if not error.lost or attempt == _ATTEMPTS - 1:
                    raise

    def _there(self, digest: str, size: int) -> int:
        """Bytes that have arrived so far."""
        first = training_pb2.UploadRequest(digest=digest, size=size)
        with reach_training(self._address) as stub:
            answer = stub.Upload(iter([first]), timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
        return answer.received

    def _send(self, source: BinaryIO, there: int, digest: str, size: int) -> None:
        name = _name(source)

        def messages() -> Iterator[training_pb2.UploadRequest]:
            yield training_pb2.UploadRequest(digest=digest, size=size)
            at = there
            while data := source.read(CHUNK):
                yield training_pb2.UploadRequest(offset=at, data=data)
                at += len(data)
                self._moved(name, at, size)

        with reach_training(self._address) as stub:
            answer = stub.Upload(messages(), metadata=access.api_key())
        if answer.received != size:
            raise ArtifactError("BAD_UPLOAD", f"{name}: {answer.received} of {size} bytes arrived")

    def _pieces(self, digest: str) -> Iterator[bytes]:
        at, stuck = 0, 0
        while True:
            try:
                with reach_training(self._address) as stub:
                    request = training_pb2.DownloadRequest(digest=digest, offset=at)
                    for answer in stub.Download(request, metadata=access.api_key()):
                        at, stuck = at + len(answer.data), 0
                        self._moved(digest, at, 0)
                        yield answer.data
                return
            except MeshError as error:
                stuck += 1
                if not error.lost or stuck == _ATTEMPTS:
                    raise


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._coming = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        while not self._left:
            piece = next(self._coming, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _name(source: BinaryIO) -> str:
    return Path(str(getattr(source, "name", "list of files"))).name
