"""Rows of one pass through a source, made as they are read, and the place from where another pass goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import msgspec

from lmesh_trainer.data.records import START, Place, Source
from lmesh_trainer.data.row_table import RowTable, row_table
from lmesh_trainer.data.rows import Row, RowMaker


class Spot(msgspec.Struct, frozen=True, kw_only=True):
    """Between two rows of a source."""

    place: Place = START  # behind the last record that was read
    waiting: RowTable = row_table(())  # rows of that record that were not taken yet
    number: int = 0  # of the row that the next record begins with


class RowStream(Iterator[Row]):
    """Holds the rows of one record at most: one, or as many as a long text was split into."""

    def __init__(self, source: Source, maker: RowMaker, spot: Spot = Spot()) -> None:  # noqa: B008 - frozen
        self._maker, self._reading = maker, source.read(spot.place)
        self._waiting = deque(spot.waiting.rows())
        maker.number = spot.number

    def __next__(self) -> Row:
        while not self._waiting:
            self._waiting.extend(self._maker.make(*next(self._reading)))
        return self._waiting.popleft()

    def take(self, count: int) -> list[Row]:
        """The next rows, fewer at the source's end."""
        return list(islice(self, count))

    @property
    def spot(self) -> Spot:
        """Where it is."""
        return Spot(place=self._reading.place, waiting=row_table(self._waiting), number=self._maker.number)

    def close(self) -> None:
        """Lets go of the source."""
        self._reading.close()
