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
        return _sample_rows(logits, temperature, top_p, top_k, row_keys(seed, choice, position))
    if not hints.any_truncation:
        return _sample_all(logits, temperature, row_keys(seed, choice, position))
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
    ordered = scores.sort(dim=-1, descending=True).values
    return scores.masked_fill(scores < _threshold(ordered, top_p, top_k), -torch.inf)


def _threshold(ordered: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[R, 1]: the least score kept, from scores in descending order [R, N], N at least each row's top_k."""
    width = ordered.shape[-1]
    k = torch.where(top_k > 0, top_k.long().clamp(max=width), width)[:, None]
    kth = ordered.gather(1, k - 1)
    kept = ordered.masked_fill(ordered < kth, -torch.inf)
    mass = torch.softmax(kept, dim=-1)
    before = mass.cumsum(dim=-1) - mass
    # The first id is always kept; one is needed while the mass before it is short of p.
    count = (before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus = kept.gather(1, count - 1)
    return torch.where(top_p[:, None] < 1, torch.maximum(kth, nucleus), kth)


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    # The best score is 0 whatever the temperature, so a tiny one cannot make several scores infinite.
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best) / torch.where(temperature > 0, temperature, 1.0)[:, None]


def _pick(logits: Tensor, scores: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    ids = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    drawn = (scores + gumbel(keys, ids)).argmax(dim=-1)
    return torch.where(temperature > 0, drawn, logits.argmax(dim=-1))


def _sample_all(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    return _pick(logits, _tempered(logits, temperature), temperature, keys)


def _sample_rows(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, keys: Tensor) -> Tensor:
    """Each kind of row by its cheapest way: argmax; noise over all ids; noise over the ids truncation leaves."""
    out = logits.argmax(dim=-1)
    vocabulary = torch.arange(logits.shape[-1], dtype=torch.int32)
    random = (temperature > 0).tolist()
    # Row by row: a row's floats and hash bits stay in the core's cache, a batch of them does not.
    for row, (is_random, p, k) in enumerate(zip(random, top_p.tolist(), top_k.tolist(), strict=True)):
        if not is_random:
            continue
        scores = (logits[row] - logits[row, out[row]]) / temperature[row]
        if p >= 1 and k <= 0:
            out[row] = (gumbel(keys[row : row + 1], vocabulary)[0].add_(scores)).argmax()
        else:
            out[row] = _draw_truncated(scores, top_p[row : row + 1], top_k[row : row + 1], k, keys[row : row + 1])
    return out


def _draw_truncated(scores: Tensor, top_p: Tensor, top_k: Tensor, k: int, keys: Tensor) -> Tensor:
    """One row [V]: find the threshold, then draw noise only for ids above it."""
    size = scores.shape[-1]
    ordered = scores.topk(k).values if 0 < k < size else scores.sort(descending=True).values
    threshold = _threshold_with_ties(scores, ordered, top_p, top_k)
    ids = (scores >= threshold).nonzero()[:, 0]
    noisy = gumbel(keys, ids.to(torch.int32))[0] + scores[ids]
    return ids[noisy.argmax()]


def _threshold_with_ties(scores: Tensor, ordered: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """The threshold from the k best; ids that tie with the k-th join them first, as they do in a full sort."""
    kth = ordered[-1]
    ties = int((scores == kth).sum()) - int((ordered == kth).sum())
    if ties:
        ordered = torch.cat([ordered, kth.expand(ties)])
    return _threshold(ordered[None], top_p, torch.zeros_like(top_k))[0, 0]
