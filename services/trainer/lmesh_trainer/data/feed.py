"""A job's rows as its loop asks for them, whether they are held whole or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.rows import Row
from lmesh_trainer.events import DatasetReady, TokenShown


class Feed(Protocol):
    """Rows update by update. What it gives is a function of the data, the settings and the step, on every rank."""

    @property
    def eval_rows(self) -> Sequence[Row]:
        """Rows that are evaluated and never trained."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row that may come."""

    @property
    def total_steps(self) -> int:
        """Updates of the whole job."""

    def report(self, tokenizer: TextTokenizer) -> DatasetReady:
        """What is known of the data before the first update."""

    def identity(self) -> str:
        """What a job must share with its checkpoints: the data, or as much of it as is known beforehand."""

    def summary(self) -> dict[str, Any]:
        """What a manifest says of the data, `data_digest` at least."""

    def worst_rows(self, micro_tokens: int) -> list[Row]:
        """Rows of the heaviest microbatch of that many tokens that may come. What is fed is not touched."""

    def step_rows(self, step: int) -> list[Row]:
        """The rows of update `step`, counted from 0; at least one. Updates are asked for in their order.

        Raises DatasetError for what is wrong with a row that is read only now.
        """

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with the first `step` updates, the last of which has just been asked for."""

    def epochs(self, step: int) -> float:
        """Epochs done after `step` updates, as far as that is known."""

    def cursor(self) -> bytes:
        """All that `go_to` needs besides the step."""

    def go_to(self, step: int, cursor: bytes) -> None:
        """Goes on behind the first `step` updates, as a feed that gave them would. Raises DatasetError."""


def shown(rows: Iterable[Row], tokenizer: TextTokenizer) -> list[list[TokenShown]]:
    """Rows as the model sees them."""
    return [
        [
            TokenShown(id=token, text=tokenizer.token_text(token), trained=bool(trained))
            for token, trained in zip(row.ids, row.trained, strict=True)
        ]
        for row in rows
    ]
