"""Folders as artifacts: a list of files, itself an artifact, and each file one."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.store import ArtifactStore, check_digest, full_disk_said, verified

_KIND = "lmesh-folder-v1"
_MOST_FILES = 10_000
_LONGEST_LIST = 16 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFile:
    """One file of a folder."""

    name: str  # relative, with slashes
    digest: str
    size: int


def put_folder(store: ArtifactStore, folder: Path) -> str:
    """Stores a folder's files and returns the digest of their list: the same files give the same digest.

    Raises ArtifactError BAD_NAME for a link, a special file, or too many; STORE_FULL.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError("BAD_NAME", f"{path.relative_to(folder)} is neither a file nor a folder")
        if path.is_file():
            with path.open("rb") as file:
                digest = store.put(file)
            entries.append({"name": path.relative_to(folder).as_posix(), "digest": digest, "size": store.size(digest)})
    if len(entries) > _MOST_FILES:
        raise ArtifactError("BAD_NAME", f"{len(entries)} files; a folder may have {_MOST_FILES}")
    told = json.dumps({"kind": _KIND, "files": entries}, sort_keys=True, separators=(",", ":"))
    return store.put(io.BytesIO(told.encode()))


def read_folder(store: ArtifactStore, digest: str) -> list[FolderFile]:
    """The files of a stored folder. Raises ArtifactError UNKNOWN_ARTIFACT or CORRUPT_ARTIFACT, also for no folder."""
    if store.size(digest) > _LONGEST_LIST:
        raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {digest} is no folder")
    try:
        told = json.loads(b"".join(verified(store, digest)))
        if told["kind"] != _KIND:
            raise ValueError("another kind")
        files = [
            FolderFile(name=f["name"], digest=check_digest(f["digest"]), size=int(f["size"])) for f in told["files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {digest} is no folder") from error
    for file in files:
        path = PurePosixPath(file.name)
        # A list may come from elsewhere: nothing of it may land outside the folder that it is fetched to.
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in file.name or "\0" in file.name:
            raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {digest} names a file {file.name!r}")
    return files


def _file(entry: dict[str, Any]) -> FolderFile:
    return FolderFile(name=str(entry["name"]), digest=check_digest(entry["digest"]), size=int(entry["size"]))


def fetch_folder(store: ArtifactStore, digest: str, target: Path) -> Path:
    """A stored folder's files below `target`, whole and verified or not at all; what is there already is taken for it.

    Raises ArtifactError UNKNOWN_ARTIFACT, CORRUPT_ARTIFACT or STORE_FULL.
    """
    if target.exists():
        return target
    files = read_folder(store, digest)
    with full_disk_said():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for file in files:
                path = draft / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as out:
                    out.writelines(verified(store, file.digest))
            draft.chmod(0o755)
            draft.replace(target)
        except FileExistsError as error:
            raise ArtifactError("CORRUPT_ARTIFACT", f"artifact {digest} names a file twice") from error
        except OSError:
            if not target.exists():  # else another process was faster: the same files by the same names
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target
