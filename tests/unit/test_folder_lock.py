"""One process at a time in a job's folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from lmesh_trainer.folder_lock import JobBusyError, own_folder


def test_the_second_waits_and_then_gives_up(tmp_path: Path) -> None:
    with own_folder(tmp_path / "job"), pytest.raises(JobBusyError), own_folder(tmp_path / "job", wait_s=0.2):
        pass


def test_the_second_takes_over(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with own_folder(tmp_path):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    threading.Timer(0.3, leave.set).start()
    with own_folder(tmp_path, wait_s=10):
        assert leave.is_set()
    thread.join()
