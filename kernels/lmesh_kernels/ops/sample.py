"""Draw one token a row: argmax of adjusted, tempered, truncated logits plus counter-based Gumbel noise.

Truncation is by value: min_p keeps every id at least min_p times as likely as the likeliest, top_k every id at least as
likely as the k-th, top_p every id at least as likely as the last one needed to reach the mass p (of what the other two
left). Ties stay in, so the result never hangs on a sort's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmesh_kernels.ops.adjust import Adjustment, adjust_on_host, adjust_reference, note_drawn_on_host
from lmesh_kernels.ops.noise import gumbel
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams

# A nucleus is looked for among so many best ids before a row is sorted whole; real models' rarely need more.
NUCLEUS_WIDTH = 1024


def sample_rows(
    logits: Tensor,
    params: SampleParams,
    hints: SampleHints,
    out_ids: Tensor,
    out_finite: Tensor,
    adjustment: Adjustment | None = None,
) -> None:
    """One id a row, and whether the row's logits were all finite; a row's id never depends on the other rows.

    logits [R, V] float32, bfloat16 or float16 (not changed). Writes out_ids [R] int64 and out_finite [R] bool, and
    counts the ids in the adjustment's table. The id of a row that is not finite is one of the vocabulary, no more.
    """
    if logits.device.type != "cpu":
        # Here, so that a CPU's engine does without Triton.
        from lmesh_kernels.ops.sample_kernels import sample_rows_triton

        sample_rows_triton(logits, params, hints, out_ids, out_finite, adjustment)
        return
    ids = sample(logits, params, hints, adjustment)
    out_ids.copy_(ids)
    # A sum is finite only if every term is; one pass, no mask of the vocabulary's size.
    out_finite.copy_(logits.sum(dim=-1, dtype=torch.float32).isfinite())
    if adjustment is not None:
        note_drawn_on_host(adjustment, ids)


def sample(
    logits: Tensor, params: SampleParams, hints: SampleHints | None = None, adjustment: Adjustment | None = None
) -> Tensor:
    """The ids [R] int64 of `sample_rows`, counted nowhere; for tensors on the host."""
    hints = hints or SampleHints()
    logits = adjust_on_host(logits, adjustment)
    return _sample_cheaply(logits, params) if hints.any_random else logits.argmax(dim=-1)


def sample_reference(logits: Tensor, params: SampleParams, adjustment: Adjustment | None = None) -> Tensor:
    """As `sample`, all rows and ids alike and by a full sort."""
    adjusted = logits.float() if adjustment is None else adjust_reference(logits, adjustment)
    scores = truncate_reference(tempered(adjusted, params.temperature), params)
    ids = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    drawn = (scores + gumbel(params.keys(), ids)).argmax(dim=-1)
    return torch.where(params.temperature > 0, drawn, adjusted.argmax(dim=-1))


def truncate_reference(scores: Tensor, params: SampleParams) -> Tensor:
    """Scores [R, V] with what min_p, top_k and top_p leave out at -inf, by a full sort."""
    threshold, _ = _threshold(scores, scores.sort(dim=-1, descending=True).values, params)
    return scores.masked_fill(scores < threshold, -torch.inf)


def _threshold(scores: Tensor, best: Tensor, params: SampleParams) -> tuple[Tensor, Tensor]:
    """The least score kept of each row [R, 1], and whether the best scores were enough to know it [R] bool.

    scores [R, V]; best [R, N]: each row's N largest in descending order, N at least min(V, any top_k).
    """
    width, top_p, top_k = best.shape[-1], params.top_p, params.top_k
    rank = top_k.long().clamp(min=1, max=width)[:, None]
    limit = torch.where(top_k[:, None] > 0, best.gather(1, rank - 1), -torch.inf)
    limit = torch.maximum(limit, best[:, :1] + params.floor[:, None])
    total = scores.masked_fill(scores < limit, -torch.inf).logsumexp(dim=-1, keepdim=True)
    mass = (best - total).exp_().masked_fill_(best < limit, 0.0)
    reached = mass.cumsum(dim=-1)
    # An id is needed while the mass before it is short of p; the first is always kept.
    needed = ((reached - mass < top_p[:, None]) & (best >= limit)).sum(dim=-1, keepdim=True).clamp_(min=1)
    nucleus = torch.maximum(limit, best.gather(1, needed - 1))
    off = top_p[:, None] >= 1
    enough = off | (reached[:, -1:] >= top_p[:, None]) | (best[:, -1:] <= limit) | (width == scores.shape[-1])
    return torch.where(off, limit, nucleus), enough[:, 0]


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Scores [R, V]: the logits' distance to the row's best, over the temperature [R] (1 where that is 0)."""
    # The best score is 0 whatever the temperature, so a tiny one cannot make several scores infinite.
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best) / torch.where(temperature > 0, temperature, 1.0)[:, None]


def _sample_cheaply(logits: Tensor, params: SampleParams) -> Tensor:
    """Each kind of row by its cheapest way: argmax; noise over all ids; noise over the ids truncation leaves.

    Asks the tensors which rows are which, so it is for tensors on the host.
    """
    out = logits.argmax(dim=-1)
    random = params.temperature > 0
    truncated = (params.top_p < 1) | (params.top_k > 0) | (params.floor > -torch.inf)
    rows = (random & truncated).nonzero()[:, 0]
    if len(rows):
        out[rows] = _draw_truncated(tempered(logits[rows].float(), params.temperature[rows]), params.rows(rows))
    vocabulary = torch.arange(logits.shape[-1], dtype=torch.int32)
    keys = params.keys()
    # Row by row: a row's scores and hash bits stay in the core's cache, a batch of them does not.
    for row in (random & ~truncated).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        scores = tempered(logits[one].float(), params.temperature[one])
        out[one] = scores.add_(gumbel(keys[one], vocabulary)).argmax(dim=-1)
    return out


def _draw_truncated(scores: Tensor, params: SampleParams) -> Tensor:
    """[n] ids of n rows [n, V]: find the thresholds from the best scores, then noise only for what is above them."""
    size = scores.shape[-1]
    width = min(size, max(NUCLEUS_WIDTH, int(params.top_k.max())))
    threshold, enough = _threshold(scores, scores.topk(width).values, params)
    flat = (~enough).nonzero()[:, 0]
    if len(flat):
        ordered = scores[flat].sort(dim=-1, descending=True).values
        threshold[flat], _ = _threshold(scores[flat], ordered, params.rows(flat))
    return _draw_above(scores, threshold, params.keys())


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
