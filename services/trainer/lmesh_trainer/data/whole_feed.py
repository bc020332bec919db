"""A dataset that is held whole, update by update: the step's number is the whole cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.dataset import Dataset
from lmesh_trainer.data.feed import shown
from lmesh_trainer.data.rows import Row
from lmesh_trainer.events import DatasetReady
from lmesh_trainer.spec import JobSpec

PREVIEW = 3  # rows


class WholeFeed:
    """See Feed."""

    def __init__(self, dataset: Dataset, spec: JobSpec) -> None:
        self._dataset, self._seed, self._batch_size = dataset, spec.seed, spec.batch_size
        self._per_epoch = dataset.steps_per_epoch(spec.batch_size)
        self.total_steps = spec.max_steps or max(1, round(spec.epochs * self._per_epoch))
        self.longest = dataset.counts.longest
        self.eval_rows: Sequence[Row] = dataset.eval_rows

    def report(self, tokenizer: TextTokenizer) -> DatasetReady:
        """See Feed."""
        counts = self._dataset.counts
        return DatasetReady(
            rows=len(self._dataset.rows),
            eval_rows=len(self.eval_rows),
            tokens=counts.tokens,
            trained_tokens=counts.trained_tokens,
            longest=counts.longest,
            dropped=counts.dropped,
            truncated=counts.truncated,
            skipped_turns=counts.skipped_turns,
            preview=shown(self._dataset.rows[:PREVIEW], tokenizer),
        )

    def identity(self) -> str:
        """sha256 of all rows as the model sees them: ids and loss masks, the held-out rows last."""
        digest = hashlib.sha256()
        for row in [*self._dataset.rows, *self.eval_rows]:
            digest.update(row.ids.tobytes() + row.trained)
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """See Feed."""
        return {"data_digest": self.identity()}

    def worst_rows(self, micro_tokens: int) -> list[Row]:
        """The longest rows, an update of them."""
        return sorted(self._dataset.rows, key=lambda row: (-len(row.ids), row.number))[: self._batch_size]

    def step_rows(self, step: int) -> list[Row]:
        """See Feed; here updates may be asked for in any order."""
        return self._dataset.step_rows(step, seed=self._seed, batch_size=self._batch_size)

    def ends_epoch(self, step: int) -> bool:
        """See Feed."""
        return step % self._per_epoch == 0

    def epochs(self, step: int) -> float:
        """See Feed."""
        return step / self._per_epoch

    def cursor(self) -> bytes:
        """Nothing besides the step."""
        return b""

    def go_to(self, step: int, cursor: bytes) -> None:
        """See Feed."""
