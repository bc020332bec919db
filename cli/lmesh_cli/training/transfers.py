"""Files on their way into and out of the mesh: whole folders, verified, with a bar in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmesh_chassis.artifacts.folders import fetch_folder, put_folder, read_folder
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from lmesh_cli.training.artifact_link import MeshStore, Moved


class TransferError(RuntimeError):
    """Files that cannot be moved as asked; the text says why."""


def upload_file(address: str, path: Path, notes: Console) -> str:
    """Puts a file into the mesh's store; its digest. Raises MeshError, ArtifactError or TransferError."""
    try:
        with path.open("rb") as file, _moving(notes) as moved:
            return MeshStore(address, moved).put(file)
    except OSError as error:
        raise TransferError(f"{path} cannot be read: {error.strerror}") from None


def upload_folder(address: str, folder: Path, notes: Console) -> str:
    """Puts a folder's files and their list into the store; the list's digest. Raises as `upload_file` does."""
    if not folder.is_dir():
        raise TransferError(f"{folder} is no folder")
    if not any(folder.iterdir()):
        raise TransferError(f"{folder} is empty")
    with _moving(notes) as moved:
        return put_folder(MeshStore(address, moved), folder)


def download_folder(address: str, digest: str, target: Path, notes: Console) -> list[Path]:
    """A stored folder's files below `target`, whole and verified or not at all. Raises as `upload_file` does."""
    require_free(target)
    with _moving(notes) as moved:
        store = MeshStore(address, moved)
        files = read_folder(store, digest)
        if target.is_dir():
            target.rmdir()
        fetch_folder(store, digest, target)
    return [target / file.name for file in files]


def require_free(target: Path) -> None:
    """Raises TransferError when something is there that a download would replace."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise TransferError(f"{target} is there already; name a folder that is new or empty")


@contextmanager
def _moving(notes: Console) -> Iterator[Moved]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:

        def moved(name: str, at: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name if len(name) < 64 else name[:12], total=size or None)
            bar.update(tasks[name], completed=at)

        yield moved
