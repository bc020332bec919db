"""A dataset that is read while it is trained on: never held whole, begun again where it ends."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.feed import shown
from lmesh_trainer.data.records import Source
from lmesh_trainer.data.row_stream import RowStream, Spot
from lmesh_trainer.data.row_table import RowTable, row_table
from lmesh_trainer.data.rows import Counts, Row, RowMaker, RowSettings
from lmesh_trainer.data.shuffle_buffer import ShuffleBuffer
from lmesh_trainer.data.stream_head import read_head
from lmesh_trainer.data.whole_feed import PREVIEW
from lmesh_trainer.events import DatasetReady
from lmesh_trainer.spec import JobSpec

SHUFFLE_BUFFER = 1000  # rows, where the job does not say


class StreamCursor(msgspec.Struct, frozen=True, kw_only=True):
    """Between two updates. No pack is open there: an update packs its own rows and leaves none."""

    epoch: int
    drawn: int  # of this epoch
    spot: Spot
    held: RowTable  # the shuffle buffer, in its order
    counts: Counts  # of all that was read to train on
    digest: str


class StreamedFeed:
    """See Feed. An epoch is one pass; its last update may have fewer rows, as a whole dataset's has.

    Reading its first rows is all that making one does. Raises DatasetError NOT_STREAMABLE, and of `read_head`.
    """

    def __init__(self, source: Source, tokenizer: TextTokenizer, settings: RowSettings, spec: JobSpec) -> None:
        if not source.streamable:
            hint = "an array of JSON is read whole: write its rows as lines, in a .jsonl file"
            raise DatasetError("NOT_STREAMABLE", hint)
        self._source = source
        self._head = read_head(source, tokenizer, settings, spec.dataset.eval_rows)
        self._maker = RowMaker(tokenizer, self._head.settings)
        self._size = spec.dataset.shuffle_buffer_size or SHUFFLE_BUFFER
        self._seed, self._batch_size = spec.seed, spec.batch_size
        self.total_steps = spec.max_steps
        self.longest = settings.max_length
        self.eval_rows: Sequence[Row] = self._head.eval_rows
        self._epoch, self._step = 0, 0
        self._digest = self.identity()
        self._stream: RowStream | None = None  # before the first update nothing is read for it
        self._buffer: ShuffleBuffer[Row] | None = None

    def report(self, tokenizer: TextTokenizer) -> DatasetReady:
        """Of the first rows only."""
        head = self._head
        return DatasetReady(
            rows=len(head.rows),
            eval_rows=len(head.eval_rows),
            tokens=head.counts.tokens,
            trained_tokens=head.counts.trained_tokens,
            longest=head.counts.longest,
            dropped=head.counts.dropped,
            truncated=head.counts.truncated,
            skipped_turns=head.counts.skipped_turns,
            preview=shown(head.rows[:PREVIEW], tokenizer),
            streaming=True,
        )

    def identity(self) -> str:
        """sha256 of what can be known without reading all: the source's name or size, and its first rows."""
        return hashlib.sha256(f"{self._source.identity()}\n{self._head.digest()}".encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """`data_digest` is of the identity and of every row that was trained, in that order: each hashed with the
        digest before it. Counts are of what was read for it.
        """
        return {"data_digest": self._digest, "data_read": {"epoch": self._epoch, **asdict(self._maker.counts)}}

    def worst_rows(self, micro_tokens: int) -> list[Row]:
        """Rows of the longest length, and one that fills the microbatch, made of tokens of the first row."""
        whole = min(self._batch_size, micro_tokens // self.longest)
        lengths = [self.longest] * whole
        if whole < self._batch_size and (rest := micro_tokens % self.longest) > 1:
            lengths.append(rest)
        return [self._made(number, length) for number, length in enumerate(lengths)]

    def _made(self, number: int, length: int) -> Row:
        ids = self._head.rows[0].ids
        repeated = ids * -(-length // len(ids))
        return Row(number=number, line=0, ids=array("i", repeated[:length]), trained=bytes([1]) * length)

    def step_rows(self, step: int) -> list[Row]:
        """See Feed."""
        assert step == self._step, "a stream's updates come in their order"
        buffer = self._open()
        if buffer.empty:
            self._epoch += 1
            buffer = self._begin()
        rows: list[Row] = []
        while len(rows) < self._batch_size and not buffer.empty:
            row = buffer.draw()
            told = self._digest.encode() + row.ids.tobytes() + row.trained
            self._digest = hashlib.sha256(told).hexdigest()
            rows.append(row)
        self._step += 1
        return rows

    def _open(self) -> ShuffleBuffer[Row]:
        return self._buffer if self._buffer is not None else self._begin()

    def _begin(self) -> ShuffleBuffer[Row]:
        """A new epoch's buffer. Raises DatasetError EMPTY_DATASET for a source that has become empty."""
        buffer = self._fill(self._head.begin)
        if buffer.empty:
            raise DatasetError("EMPTY_DATASET", f"{self._source.identity()} has no rows any more")
        return buffer

    def _fill(self, spot: Spot, held: Sequence[Row] = (), drawn: int = 0) -> ShuffleBuffer[Row]:
        if self._stream is not None:
            self._stream.close()
        self._stream = RowStream(self._source, self._maker, spot)
        self._buffer = ShuffleBuffer(
            self._stream, size=self._size, seed=self._seed, epoch=self._epoch, held=held, drawn=drawn
        )
        return self._buffer

    def ends_epoch(self, step: int) -> bool:
        """See Feed."""
        return self._buffer is not None and self._buffer.empty

    def epochs(self, step: int) -> float:
        """Whole ones: how long the one that runs is, is not known."""
        return float(self._epoch + self.ends_epoch(step))

    def cursor(self) -> bytes:
        """See Feed: the place in the stream, the shuffle buffer, and what was counted."""
        buffer = self._open()
        assert self._stream is not None
        cursor = StreamCursor(
            epoch=self._epoch,
            drawn=buffer.drawn,
            spot=self._stream.spot,
            held=row_table(buffer.held),
            counts=self._maker.counts,
            digest=self._digest,
        )
        return msgspec.msgpack.encode(cursor)

    def go_to(self, step: int, cursor: bytes) -> None:
        """See Feed. Raises DatasetError CHECKPOINT_MISMATCH for a cursor that is none of a stream."""
        try:
            told = msgspec.msgpack.decode(cursor, type=StreamCursor)
        except msgspec.DecodeError as error:
            raise DatasetError(
                "CHECKPOINT_MISMATCH", f"the checkpoint's cursor is none of a stream: {error}"
            ) from error
        self._epoch, self._step, self._digest = told.epoch, step, told.digest
        self._maker.counts = told.counts
        self._fill(told.spot, told.held.rows(), told.drawn)
