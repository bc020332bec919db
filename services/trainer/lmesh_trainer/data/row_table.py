"""Rows as a checkpoint holds them: five columns of bytes, 4 of them a token and one for whether it is learnt."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import accumulate, pairwise

import msgspec

from lmesh_trainer.data.rows import Row


class RowTable(msgspec.Struct, frozen=True, kw_only=True):
    """Integers in this machine's order of bytes: 64 bits for numbers, lines and lengths, 32 for ids."""

    numbers: bytes
    lines: bytes
    lengths: bytes
    ids: bytes
    trained: bytes

    def rows(self) -> list[Row]:
        """The rows, in their order."""
        ids = array("i", self.ids)
        ends = [0, *accumulate(array("q", self.lengths))]
        named = zip(array("q", self.numbers), array("q", self.lines), pairwise(ends), strict=True)
        return [
            Row(number=number, line=line, ids=ids[begin:end], trained=self.trained[begin:end])
            for number, line, (begin, end) in named
        ]


def row_table(rows: Iterable[Row]) -> RowTable:
    """The table of rows."""
    kept = list(rows)
    return RowTable(
        numbers=array("q", (row.number for row in kept)).tobytes(),
        lines=array("q", (row.line for row in kept)).tobytes(),
        lengths=array("q", (len(row.ids) for row in kept)).tobytes(),
        ids=b"".join(row.ids.tobytes() for row in kept),
        trained=b"".join(row.trained for row in kept),
    )
