"""What one step computes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmesh_worker.engine.sequence import Sequence


@dataclass(slots=True)
class Row:
    """`count` tokens of one sequence from absolute position `start`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the last of them gives a new id
    rollbacks: int  # the sequence's count when this was planned; another one voids the output
    prompt_logits: bool = False  # logits of every row are wanted


@dataclass(slots=True)
class StepPlan:
    """One step's rows, single-token rows first, and the blocks that it made findable."""

    rows: list[Row]
    registered: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(row.count for row in self.rows)

    @property
    def num_decodes(self) -> int:
        """How many rows, from the first, have a single token."""
        return next((i for i, row in enumerate(self.rows) if row.count != 1), len(self.rows))
