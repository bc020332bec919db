"""The beginning of a stream, read to try it: the rows that are held out, and some of those to train on."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass

from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.records import Source
from lmesh_trainer.data.row_stream import RowStream, Spot
from lmesh_trainer.data.rows import Counts, Row, RowMaker, RowSettings

TRIED = 256  # rows behind the held-out ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the first rows of a stream were."""

    eval_rows: list[Row]
    rows: list[Row]  # the first of those to train on
    settings: RowSettings  # with the format that the first record settled
    begin: Spot  # where what is trained begins, in every epoch
    counts: Counts  # of all rows that were read

    def digest(self) -> str:
        """sha256 of their ids and loss masks."""
        digest = hashlib.sha256()
        for row in [*self.rows, *self.eval_rows]:
            digest.update(row.ids.tobytes() + row.trained)
        return digest.hexdigest()


def read_head(source: Source, tokenizer: TextTokenizer, settings: RowSettings, eval_rows: int) -> Head:
    """Reads a stream's first rows. Raises DatasetError, also EMPTY_DATASET and TOO_FEW_ROWS."""
    maker = RowMaker(tokenizer, settings)
    with closing(RowStream(source, maker)) as stream:
        held_out = stream.take(eval_rows)
        begin = stream.spot
        rows = stream.take(TRIED)
    if not rows and not held_out:
        raise DatasetError("EMPTY_DATASET", f"{source.identity()} has no row that is left to learn from")
    if not rows:
        raise DatasetError("TOO_FEW_ROWS", f"eval_rows is {eval_rows} of {len(held_out)} rows")
    settled = RowSettings(
        max_length=settings.max_length,
        policy=settings.policy,
        form=maker.form,
        ignore_columns=settings.ignore_columns,
    )
    return Head(eval_rows=held_out, rows=rows, settings=settled, begin=begin, counts=maker.counts)
