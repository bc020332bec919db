"""A job's rows: read, checked, and the held-out ones set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmesh_kernels.layers.packed_batch import Segment
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.formats import Format
from lmesh_trainer.data.order import epoch_order, held_out
from lmesh_trainer.data.packing import pack
from lmesh_trainer.data.rows import Counts, LengthPolicy, Row, RowMaker, RowSettings
from lmesh_trainer.data.source import read_records
from lmesh_trainer.spec import DatasetSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows to learn from and rows to evaluate on."""

    rows: Sequence[Row]
    eval_rows: Sequence[Row]
    counts: Counts

    def step_rows(self, step: int, *, seed: int, batch_size: int) -> list[Row]:
        """The rows of update `step`, counted from 0: every epoch takes each row once, in an order of its own."""
        steps = self.steps_per_epoch(batch_size)
        epoch, at = divmod(step, steps)
        order = epoch_order(seed, epoch, len(self.rows))
        return [self.rows[i] for i in order[at * batch_size : (at + 1) * batch_size]]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Updates that take every row once; the last may have fewer rows."""
        return -(-len(self.rows) // batch_size)


def row_settings(spec: DatasetSpec, context: int) -> RowSettings:
    """How a dataset's rows are made; `context` is the model's longest sequence. Raises DatasetError BAD_MAX_LENGTH."""
    if spec.max_length > context:
        raise DatasetError("BAD_MAX_LENGTH", f"max_length is {spec.max_length}, and the model's context {context}")
    return RowSettings(
        max_length=spec.max_length or context,
        policy=LengthPolicy(spec.length_policy),
        form=None if spec.format == "auto" else Format(spec.format),
        ignore_columns=spec.ignore_columns,
    )


def load_dataset(spec: DatasetSpec, tokenizer: TextTokenizer, *, context: int, seed: int) -> Dataset:
    """Reads all rows; `context` is the model's longest sequence.

    Raises DatasetError, also BAD_MAX_LENGTH, EMPTY_DATASET and TOO_FEW_ROWS.
    """
    maker = RowMaker(tokenizer, row_settings(spec, context))
    rows = list(maker.rows(read_records(spec.source, split=spec.split)))
    if not rows:
        raise DatasetError("EMPTY_DATASET", f"{spec.source} has no row that is left to learn from")
    if spec.eval_rows >= len(rows):
        raise DatasetError("TOO_FEW_ROWS", f"eval_rows is {spec.eval_rows} of {len(rows)} rows")
    kept, out = held_out(seed, rows, spec.eval_rows)
    return Dataset(rows=kept, eval_rows=out, counts=maker.counts)


def microbatches(rows: Sequence[Row], max_tokens: int, *, rank: int = 0, world: int = 1) -> list[list[Segment]]:
    """The packs of a step's rows that one rank runs."""
    packs = pack(rows, max_tokens)
    mine = packs[rank::world]
    return [[Segment(row=row.number, ids=row.ids, weights=row.trained) for row in members] for members in mine]
