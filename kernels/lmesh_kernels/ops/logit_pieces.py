"""How the sampler's launches cut [R, V] logits into pieces, and what each is given beside them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmesh_kernels.ops.adjust import Adjustment

BLOCK = 1024  # columns that a program holds at a time
# Programs that a launch is cut into where the rows are few: some for each of a large device's processors.
_PROGRAMS = 1024
MOST_PIECES = 256  # of a row


@dataclass(frozen=True, slots=True)
class Pieces:
    """Of each of `rows` rows, `count` pieces of `size` columns, a multiple of BLOCK."""

    rows: int
    count: int
    size: int

    @classmethod
    def of(cls, logits: Tensor) -> Pieces:
        """By the shape alone, so that a captured graph launches the same."""
        rows, vocab = logits.shape
        blocks = -(-vocab // BLOCK)
        each = -(-blocks // max(1, min(blocks, MOST_PIECES, _PROGRAMS // rows)))
        return cls(rows, -(-blocks // each), each * BLOCK)

    @property
    def grid(self) -> tuple[int, int]:
        """Of a launch over all pieces."""
        return self.rows, self.count

    @property
    def joined(self) -> dict[str, int]:
        """Constants of a program that joins a row's pieces: alike for all batches, which share what is compiled."""
        return {"WIDE": MOST_PIECES}

    @property
    def launch(self) -> dict[str, int | bool]:
        """Options of such a launch: nothing is fused, or scores would differ from torch's in the last place."""
        return {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class LogitSource:
    """Logits and what adjusts them as kernels take them; what is not there is stood in for by what is never read."""

    logits: Tensor
    adjustment: Adjustment | None

    @classmethod
    def of(cls, logits: Tensor, adjustment: Adjustment | None) -> LogitSource:
        """Raises ValueError for columns that are not side by side, and for a table of another vocabulary."""
        if logits.stride(1) != 1:
            raise ValueError("a row's logits must lie side by side")
        tables = () if adjustment is None else (adjustment.seen, adjustment.bias)
        for table in tables:
            if table is not None and table.shape[1] != logits.shape[1]:
                raise ValueError(f"a table of {table.shape[1]} ids beside logits of {logits.shape[1]}")
        return cls(logits, adjustment)

    @property
    def kinds(self) -> dict[str, bool]:
        """Constants of a kernel that reads them."""
        a = self.adjustment
        return {"HAS_SEEN": a is not None and a.seen is not None, "HAS_BIAS": a is not None and a.bias is not None}

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """What `logit_kernels.adjusted` takes apart."""
        a, none = self.adjustment, self.logits
        fixed = (self.logits, self.logits.stride(0), self.logits.shape[1])
        if a is None:
            return (*fixed, none, none, none, none, none, none, none)
        columns = (a.repetition, a.presence, a.frequency, a.seen_row, a.bias_row)
        return (*fixed, *columns, self.seen, none if a.bias is None else a.bias)

    @property
    def seen_row(self) -> Tensor:
        """See Adjustment."""
        return self.logits if self.adjustment is None else self.adjustment.seen_row

    @property
    def seen(self) -> Tensor:
        """See Adjustment."""
        a = self.adjustment
        return self.logits if a is None or a.seen is None else a.seen
