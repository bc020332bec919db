"""Where rows come from: a file by its ending, or a dataset of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.files import READINGS, File
from lmesh_trainer.data.hub import HubDataset
from lmesh_trainer.data.records import Record, Source

HUB = "hub:"


def open_source(source: str, *, split: str = "train") -> Source:
    """A file, or `hub:owner/name`. Raises DatasetError NO_DATASET or UNKNOWN_FILE_TYPE."""
    if source.startswith(HUB):
        return HubDataset(source.removeprefix(HUB), split)
    path = Path(source)
    if not path.is_file():
        raise DatasetError("NO_DATASET", f"there is no file {source}")
    if path.suffix.lower() not in READINGS:
        known = ", ".join(READINGS)
        raise DatasetError("UNKNOWN_FILE_TYPE", f"{path.name}: {path.suffix or 'no ending'}; known are {known}")
    return File(path)


def read_records(source: str, *, split: str = "train") -> Iterator[tuple[int, Record]]:
    """(line, record) of all of a source; lines count from 1, rows where there are no lines.

    Raises DatasetError of `open_source`, NOT_JSON, NOT_A_ROW, or MISSING_EXTRA for what needs the package `datasets`.
    """
    with closing(open_source(source, split=split).read()) as reading:
        yield from reading
