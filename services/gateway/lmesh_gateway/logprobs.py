"""Log-probabilities on their way to the client: columns while they wait, rows with texts when they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_gateway.generation import TokenLogprob, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class LogprobColumns:
    """Entry i is of token i: `chosen[i]`, and the k alternatives at [i*k, i*k+k), best first."""

    k: int
    chosen: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)

    def extend(self, other: LogprobColumns) -> None:
        """Appends the entries of `other`, which must have the same k."""
        if other.k != self.k:
            raise ValueError(f"{other.k} alternatives a token after {self.k}")
        self.chosen += other.chosen
        self.top_ids += other.top_ids
        self.top_logprobs += other.top_logprobs

    def head(self, count: int) -> LogprobColumns:
        """The first `count` entries."""
        end = count * self.k
        return LogprobColumns(
            k=self.k,
            chosen=self.chosen[:count],
            top_ids=self.top_ids[:end],
            top_logprobs=self.top_logprobs[:end],
        )

    def rows(self, ids: Sequence[int], tokenizer: TextTokenizer) -> tuple[TokenLogprobs, ...]:
        """One row an id, with texts. ValueError when the columns are not of these ids."""
        if len(ids) != len(self.chosen) or len(self.top_ids) != self.k * len(ids):
            raise ValueError(f"{len(self.chosen)} log-probabilities for {len(ids)} ids")
        return tuple(self._row(i, token, tokenizer) for i, token in enumerate(ids))

    def _row(self, index: int, token: int, tokenizer: TextTokenizer) -> TokenLogprobs:
        span = range(index * self.k, (index + 1) * self.k)
        return TokenLogprobs(
            token=_entry(token, self.chosen[index], tokenizer),
            top=tuple(_entry(self.top_ids[j], self.top_logprobs[j], tokenizer) for j in span),
        )


def _entry(token: int, logprob: float, tokenizer: TextTokenizer) -> TokenLogprob:
    raw = tokenizer.token_bytes(token)
    return TokenLogprob(id=token, logprob=logprob, text=raw.decode("utf-8", "replace"), raw=raw)
