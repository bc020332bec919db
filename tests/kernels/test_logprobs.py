"""Log-probabilities against float64."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.logprobs import token_logprobs

UNIT = 2.0**-24


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 1, 1), (3, 7, 0), (5, 131, 20), (2, 4097, 5)])
def test_against_float64(rows: int, vocab: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 5 + 30
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    chosen, top_ids, top = token_logprobs(logits, ids, k)
    expected = logits.double().log_softmax(-1)
    # The sum's relative error (vocab roundings, 2 ulp exponentials) is absolute after the logarithm; the maximum is
    # added back and the difference taken, each a rounding at the logits' magnitude.
    bound = (vocab + 4) * UNIT + 3 * UNIT * logits.abs().max().item()
    assert (chosen.double() - expected.gather(1, ids[:, None])[:, 0]).abs().max() <= bound
    assert top_ids.shape == top.shape == (rows, k)
    if k:
        assert (top.double() - expected.gather(1, top_ids)).abs().max() <= bound
        assert torch.equal(top_ids, logits.topk(k).indices)
        assert (top[:, :-1] >= top[:, 1:]).all()


def test_narrow_logits_are_widened_before_they_are_summed() -> None:
    logits = (torch.randn(3, 4097, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    ids = torch.tensor([5, 0, 4096])
    narrow, wide = token_logprobs(logits, ids, 2), token_logprobs(logits.float(), ids, 2)
    assert narrow[0].dtype == narrow[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))
