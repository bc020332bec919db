"""Draw one token a row: argmax of tempered, truncated logits plus counter-based Gumbel noise.

Truncation is by value: top_k keeps every id at least as likely as the k-th, top_p every id at least as likely as the
last one needed to reach the mass p (of what top_k left). Ties stay in, so the result never hangs on a sort's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops.noise import gumbel, row_keys

# A nucleus is looked for among so many best ids before a row is sorted whole; real models' rarely need more.
NUCLEUS_WIDTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleHints:
    """What the host knows of a batch's parameters, so that a device need not be asked; the defaults are safe."""

    any_random: bool = True  # some row has a temperature above 0
    any_truncation: bool = True  # some random row has top_k or top_p set

    @classmethod
    def of(cls, temperature: Iterable[float], top_p: Sequence[float], top_k: Sequence[int]) -> SampleHints:
        """Hints from the host's copies of the parameters, one value a row."""
        rows = [(t > 0, p < 1 or k > 0) for t, p, k in zip(temperature, top_p, top_k, strict=True)]
        return cls(any_random=any(r for r, _ in rows), any_truncation=any(r and t for r, t in rows))


def seed_to_int64(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits, which is what torch holds."""
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    hints: SampleHints | None = None,
) -> Tensor:
    """One id a row; a row's id never depends on the other rows.

    logits [R, V] float32 (not changed), temperature [R] float32 (0: argmax), top_p [R] float32 (1: off),
    top_k [R] int32 (0: off), seed, choice, position [R] int64: the absolute position of the token drawn.
    Returns ids [R] int64.
    """
    hints = hints or SampleHints()
    if not hints.any_random:
        return logits.argmax(dim=-1)
    if logits.device.type == "cpu":
        return _sample_cheaply(logits, temperature, top_p, top_k, row_keys(seed, choice, position))
    if not hints.any_truncation:
        return _pick(logits, _tempered(logits, temperature), temperature, row_keys(seed, choice, position))
    return sample_reference(logits, temperature, top_p, top_k, seed, choice, position)


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
) -> Tensor:
    """As `sample`, all rows and ids alike and by a full sort."""
    scores = truncate_reference(_tempered(logits, temperature), top_p, top_k)
    return _pick(logits, scores, temperature, row_keys(seed, choice, position))


def truncate_reference(scores: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Scores [R, V] with what top_k and top_p leave out at -inf, by a full sort."""
    threshold, _ = _threshold(scores, scores.sort(dim=-1, descending=True).values, top_p, top_k)
    return scores.masked_fill(scores < threshold, -torch.inf)


def _threshold(scores: Tensor, best: Tensor, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """The least score kept of each row [R, 1], and whether the best scores were enough to know it [R] bool.

    scores [R, V]; best [R, N]: each row's N largest in descending order, N at least min(V, any top_k).
    """
    width = best.shape[-1]
    rank = top_k.long().clamp(min=1, max=width)[:, None]
    kth = torch.where(top_k[:, None] > 0, best.gather(1, rank - 1), -torch.inf)
    total = scores.masked_fill(scores < kth, -torch.inf).logsumexp(dim=-1, keepdim=True)
    mass = (best - total).exp_().masked_fill_(best < kth, 0.0)
    reached = mass.cumsum(dim=-1)
    # An id is needed while the mass before it is short of p; the first is always kept.
    needed = ((reached - mass < top_p[:, None]) & (best >= kth)).sum(dim=-1, keepdim=True).clamp_(min=1)
    nucleus = torch.maximum(kth, best.gather(1, needed - 1))
    off = top_p[:, None] >= 1
    enough = off | (reached[:, -1:] >= top_p[:, None]) | (best[:, -1:] <= kth) | (width == scores.shape[-1])
    return torch.where(off, kth, nucleus), enough[:, 0]


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    # The best score is 0 whatever the temperature, so a tiny one cannot make several scores infinite.
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best) / torch.where(temperature > 0, temperature, 1.0)[:, None]


def _pick(logits: Tensor, scores: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    ids = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    drawn = (scores + gumbel(keys, ids)).argmax(dim=-1)
    return torch.where(temperature > 0, drawn, logits.argmax(dim=-1))


def _sample_cheaply(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, keys: Tensor) -> Tensor:
    """Each kind of row by its cheapest way: argmax; noise over all ids; noise over the ids truncation leaves.

    Asks the tensors which rows are which, so it is for tensors on the host.
    """
    out = logits.argmax(dim=-1)
    truncated = (top_p < 1) | (top_k > 0)
    rows = ((temperature > 0) & truncated).nonzero()[:, 0]
    if len(rows):
        scores = _tempered(logits[rows], temperature[rows])
        out[rows] = _draw_truncated(scores, top_p[rows], top_k[rows], keys[rows])
    vocabulary = torch.arange(logits.shape[-1], dtype=torch.int32)
    # Row by row: a row's scores and hash bits stay in the core's cache, a batch of them does not.
    for row in ((temperature > 0) & ~truncated).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        out[one] = _tempered(logits[one], temperature[one]).add_(gumbel(keys[one], vocabulary)).argmax(dim=-1)
    return out


def _draw_truncated(scores: Tensor, top_p: Tensor, top_k: Tensor, keys: Tensor) -> Tensor:
    """[n] ids of n rows [n, V]: find the thresholds from the best scores, then noise only for what is above them."""
    size = scores.shape[-1]
    width = min(size, max(NUCLEUS_WIDTH, int(top_k.max())))
    threshold, enough = _threshold(scores, scores.topk(width).values, top_p, top_k)
    flat = (~enough).nonzero()[:, 0]
    if len(flat):
        ordered = scores[flat].sort(dim=-1, descending=True).values
        threshold[flat], _ = _threshold(scores[flat], ordered, top_p[flat], top_k[flat])
    return _draw_above(scores, threshold, keys)


def _draw_above(scores: Tensor, threshold: Tensor, keys: Tensor) -> Tensor:
    """[n] ids drawn from what reaches each row's threshold, the candidates packed to the left."""
    rows, ids = (scores >= threshold).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=scores.shape[0])
    column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    # A row of NaN has no candidates; it must not stop the others, so it gets id 0.
    candidates = torch.zeros(scores.shape[0], max(1, int(counts.max())), dtype=torch.int64)
    candidates[rows, column] = ids
    noisy = gumbel(keys, candidates.to(torch.int32)).add_(scores.gather(1, candidates))
    unused = torch.arange(candidates.shape[1]) >= counts[:, None]
    chosen = noisy.masked_fill_(unused, -torch.inf).argmax(dim=-1, keepdim=True)
    return candidates.gather(1, chosen)[:, 0]
