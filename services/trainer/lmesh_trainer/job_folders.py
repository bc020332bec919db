"""Old jobs' folders go: what is left of a job that completed is in the artifact store, and the rest is kept a time.

Several trainers may share the folder of folders, so what a folder is shows in itself: in the lock of whoever trains in
it, in the times of what was written last, and in a note of how the job ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from lmesh_trainer.events import Ended, Outcome

_log = logging.getLogger(__name__)

_ENDED = "ended.json"
_GONE = ".gone-"  # no job's id begins with a dot
_SETTLED_S = 3600.0  # a job that completed stays so long, whatever the count: its end may not be known everywhere yet


def note_begun(folder: Path) -> None:
    """The job runs, whatever it did before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ENDED).unlink(missing_ok=True)


def note_ended(folder: Path, ended: Ended) -> None:
    """How the job ended; a disk that has no room for that changes nothing for the job."""
    try:
        if folder.is_dir():
            (folder / _ENDED).write_text(json.dumps({"outcome": ended.outcome.value, "reason": ended.reason}))
    except OSError as error:
        _log.warning("the job's end is not noted in its folder", extra={"job": folder.name, "detail": str(error)})


class JobFolders:
    """`keep_s`: seconds that a folder is kept after its last write. `keep_completed`: folders of completed jobs that
    are kept, newest first; those cannot be resumed, so nothing but their TensorBoard files is missed.
    """

    def __init__(self, root: Path, *, keep_s: float, keep_completed: int) -> None:
        self._root, self._keep_s, self._keep_completed = root, keep_s, keep_completed

    def old(self) -> list[Path]:
        """Folders whose time is over, as far as can be told from here. Blocks."""
        now = time.time()
        found = sorted(self._folders(), key=lambda one: -one[0])
        aged = [path for at, path in found if now - at > self._keep_s]
        completed = [path for at, path in found if _completed(path)]
        surplus = [path for path in completed[self._keep_completed :] if now - _touched(path) > _SETTLED_S]
        return [*aged, *(path for path in surplus if path not in aged)]

    def _folders(self) -> Iterator[tuple[float, Path]]:
        """Jobs' folders, each with the time of what was written there last."""
        for path in self._root.iterdir() if self._root.is_dir() else ():
            if path.is_dir() and not path.name.startswith("."):
                yield _touched(path), path

    def retire(self, folders: list[Path], held: Collection[str]) -> int:
        """Takes folders out of use, except of jobs in `held` and of those that a process trains in; how many.

        Quick: `sweep` removes them for good.
        """
        return sum(self._retire(path) for path in folders if path.name not in held)

    def _retire(self, path: Path) -> bool:
        try:
            with (path / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.rename(self._root / f"{_GONE}{path.name}-{time.time_ns()}")
        except BlockingIOError:
            return False
        except OSError as error:
            _log.warning("an old job's folder stays", extra={"job": path.name, "detail": str(error)})
            return False
        _log.info("an old job's folder is removed", extra={"job": path.name})
        return True

    def sweep(self) -> None:
        """Removes what was retired, also by a boot that did not get to it. Blocks."""
        for path in self._root.glob(f"{_GONE}*"):
            shutil.rmtree(path, ignore_errors=True)


def _touched(path: Path) -> float:
    """When something was last written in a job's folder: each start, checkpoint and end shows in one of these."""
    times = [0.0]
    for one in (path, path / "spec.json", path / _ENDED, path / "checkpoints"):
        with contextlib.suppress(FileNotFoundError):
            times.append(one.stat().st_mtime)
    return max(times)


def _completed(path: Path) -> bool:
    try:
        found = json.loads((path / _ENDED).read_text())
        return bool(found["outcome"] == Outcome.COMPLETED.value)
    except (OSError, ValueError, KeyError, TypeError):
        return False
