"""Records as a source gives them, one after another, and the place in it from where the next ones come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

Record = dict[str, Any]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Behind the last record that was read. Which of the fields count is the source's to say."""

    line: int = 0  # that was read last, from 1; records are counted where there are no lines
    offset: int = 0  # of the next record, in bytes
    state: str = ""  # of a library that keeps its own


START = Place()


class Reading(ABC, Iterator[tuple[int, Record]]):
    """(line, record), one after another; lines count from 1. Close it when it is not read to the end."""

    @abstractmethod
    def __next__(self) -> tuple[int, Record]:
        """The next record. Raises DatasetError with the line, and StopIteration at the end."""

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where another reading goes on from here."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what is open; may be called twice."""


class Source(Protocol):
    """What can be read from any place that a reading of it gave."""

    @property
    def streamable(self) -> bool:
        """Whether a reading holds no more than a part of it."""

    def identity(self) -> str:
        """What tells it from others without reading it through."""

    def read(self, place: Place = START) -> Reading:
        """Its records behind a place. Raises DatasetError."""
