"""Which jobs' folders go and which stay: by age, by count, and never one that somebody trains in."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lmesh_trainer.events import Ended, Outcome
from lmesh_trainer.folder_lock import own_folder
from lmesh_trainer.job_folders import JobFolders, note_begun, note_ended

DAY_S = 86_400.0
COMPLETED, STOPPED = Ended(outcome=Outcome.COMPLETED), Ended(outcome=Outcome.STOPPED)


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    return JobFolders(tmp_path, keep_s=30 * DAY_S, keep_completed=2)


def job(root: Path, name: str, age_s: float, ended: Ended | None = None) -> Path:
    """A job's folder that was written last so long ago."""
    path = root / name
    note_begun(path)
    (path / "spec.json").write_text("{}")
    (path / "checkpoints" / "step-00000001").mkdir(parents=True)
    if ended is not None:
        note_ended(path, ended)
    age(path, age_s)
    return path


def age(path: Path, age_s: float) -> None:
    for one in [*path.rglob("*"), path]:
        os.utime(one, (time.time() - age_s,) * 2)


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def test_by_age(folders: JobFolders, tmp_path: Path) -> None:
    for i, ended in enumerate((None, STOPPED, COMPLETED)):
        job(tmp_path, f"old-{i}", 31 * DAY_S, ended)
        job(tmp_path, f"young-{i}", 29 * DAY_S, ended)
    (tmp_path / ".queries").mkdir()
    age(tmp_path / ".queries", 99 * DAY_S)
    assert names(folders.old()) == ["old-0", "old-1", "old-2"]


@pytest.mark.parametrize("written", ["spec.json", "checkpoints", "ended.json"])
def test_a_write_anywhere_counts(folders: JobFolders, tmp_path: Path, written: str) -> None:
    path = job(tmp_path, "old", 31 * DAY_S, STOPPED)
    os.utime(path / written)
    assert folders.old() == []


def test_of_completed_ones_the_newest_stay(folders: JobFolders, tmp_path: Path) -> None:
    """What can be resumed is not counted, and what has completed just now is not gone at once."""
    for i in range(4):
        job(tmp_path, f"done-{i}", (i + 2) * 3600, COMPLETED)
        job(tmp_path, f"stopped-{i}", (i + 2) * 3600, STOPPED)
    assert names(folders.old()) == ["done-2", "done-3"]
    for i in range(4):
        job(tmp_path, f"fresh-{i}", 60, COMPLETED)
    assert names(folders.old()) == ["done-0", "done-1", "done-2", "done-3"]


def test_one_that_was_resumed_is_not_completed(folders: JobFolders, tmp_path: Path) -> None:
    for i in range(4):
        path = job(tmp_path, f"done-{i}", (i + 2) * 3600, COMPLETED)
        note_begun(path)
        age(path, (i + 2) * 3600)
    assert folders.old() == []


def test_retired_and_swept(folders: JobFolders, tmp_path: Path) -> None:
    for name in ("one", "held", "trained"):
        job(tmp_path, name, 31 * DAY_S)
    old = folders.old()
    with own_folder(tmp_path / "trained"):  # by a process of another trainer
        assert folders.retire(old, held={"held"}) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["held", "trained"]
    assert folders.old() == [tmp_path / "held"]  # the other's lock was written just now
    folders.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "trained"]
    assert folders.retire(old, held=()) == 2  # the one that is gone by now is no error
    folders.sweep()
    assert list(tmp_path.iterdir()) == []


def test_no_folder_yet(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path / "none", keep_s=1, keep_completed=0)
    assert folders.old() == [] and folders.retire([tmp_path / "none" / "x"], ()) == 0
    folders.sweep()
