"""Log-probabilities of chosen tokens and of the best alternatives, under the untempered distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities of `ids` and of the k likeliest tokens of each row.

    logits [R, V] of any float type (as they are: no bias, no penalty, no temperature), ids [R] int64, 0 <= k <= V.
    Returns (chosen [R] float32, top_ids [R, k] int64, top_logprobs [R, k] float32), best first.
    """
    return token_logprobs_reference(logits, ids, k)


def token_logprobs_reference(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_logprobs`, in plain torch, without a [R, V] temporary of log-probabilities."""
    logits = logits.float()  # of the rows that are scored only; a sum of 2^17 terms is none in bfloat16
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(1, ids[:, None]) - normaliser
    top_values, top_ids = logits.topk(k, dim=-1)
    return chosen[:, 0], top_ids, top_values - normaliser
