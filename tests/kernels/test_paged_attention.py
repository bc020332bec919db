"""Paged attention against dense attention in float64, over scattered blocks, mixed batches and uneven lengths."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops import attention_plan
from lmesh_kernels.ops.attention_plan import split_decodes
from lmesh_kernels.ops.paged_attention import paged_attention

from tests.kernels.paged_runner import make_batch

UNIT = 2.0**-24
# (query lengths, cached lengths), decodes first.
BATCHES = {
    "one-decode": ([1], [0]),
    "decodes": ([1, 1, 1], [4, 36, 7]),
    "equal-decodes": ([1, 1], [7, 7]),
    "whole-prompts": ([13, 3], [0, 0]),
    "later-chunks": ([6, 9], [11, 1]),
    "mixed": ([1, 1, 7, 2, 5], [30, 3, 0, 15, 16]),
    "single-token-chunk-after-chunk": ([1, 4, 1], [2, 3, 5]),
}


class Setup:
    """Random q and K, V of every sequence, and the paged cache that holds them."""

    def __init__(self, batch: str, heads: int, kv_heads: int, head_dim: int, block_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        q_lens, cached = BATCHES[batch]
        lens = [q + c for q, c in zip(q_lens, cached, strict=True)]
        counts = [-(-length // block_size) for length in lens]
        free = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        tables = [[free.pop() for _ in range(count)] for count in counts]
        self.batch = make_batch([[0] * n for n in q_lens], cached, tables, block_size)
        self.q = torch.randn(sum(q_lens), heads, head_dim, generator=generator)
        self.kv = [torch.randn(2, n, kv_heads, head_dim, generator=generator) for n in lens]
        # Slots that no sequence owns hold NaN, which no result may touch.
        self.cache = torch.full((2, sum(counts) + 2, block_size, kv_heads, head_dim), torch.nan)
        for table, kv in zip(tables, self.kv, strict=True):
            slots = [table[p // block_size] * block_size + p % block_size for p in range(kv.shape[1])]
            self.cache.flatten(1, 2)[:, slots] = kv

    def expected(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, bound) in float64, token by token."""
        out, bound, row = [], [], 0
        for kv, q_len in zip(self.kv, self.batch.q_lens_host, strict=True):
            for i in range(q_len):
                seen = kv[:, : kv.shape[1] - q_len + i + 1].double()
                pair = _attend(self.q[row].double(), seen[0], seen[1], scale)
                out.append(pair[0])
                bound.append(pair[1])
                row += 1
        return torch.stack(out), torch.stack(bound)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token [heads, head_dim] and how far float32 may stray from it."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("hd,nhd->hn", q, k) * scale
    out = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
    # A score's error is head_dim roundings of its terms' magnitudes and shifts each weight by as much, relatively, in
    # numerator and denominator; torch's fast exponential may be 20 ulp off; n terms are summed twice.
    spread = torch.einsum("hd,nhd->hn", q.abs(), k.abs()).amax(-1) * scale * (q.shape[1] + 2)
    relative = 2 * (spread + 20 * 2 + k.shape[0] + 2) * UNIT
    return out, relative[:, None] * v.abs().amax(0)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(1, 1, 2, 1), (6, 2, 10, 4), (3, 3, 33, 5), (9, 3, 64, 16)]
)
def test_against_dense(batch: str, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    setup = Setup(batch, heads, kv_heads, head_dim, block_size)
    scale = 0.7 * head_dim**-0.5
    expected, bound = setup.expected(scale)
    actual = paged_attention(setup.q, setup.cache[0], setup.cache[1], setup.batch, scale=scale)
    assert ((actual.double() - expected).abs() <= bound).all()


def test_chunks_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "PIECE_ROWS", 4)
    setup = Setup("later-chunks", 6, 2, 10, 4)
    expected, bound = setup.expected(0.3)
    actual = paged_attention(setup.q, setup.cache[0], setup.cache[1], setup.batch, scale=0.3)
    assert ((actual.double() - expected).abs() <= bound).all()


def test_uneven_decodes_in_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "PADDING_BYTES", 1)
    setup = Setup("decodes", 6, 2, 10, 4)
    plan = attention_plan.plan_attention(setup.batch, block_size=4, token_bytes=160, dtype=torch.float32)
    assert len(plan.groups) == 3 - 1
    expected, bound = setup.expected(0.3)
    actual = paged_attention(setup.q, setup.cache[0], setup.cache[1], setup.batch, scale=0.3, plan=plan)
    assert ((actual.double() - expected).abs() <= bound).all()


def test_groups_hold_every_decode_once_and_bound_their_padding() -> None:
    lens = [3, 900, 17, 16, 901, 1, 450, 2, 899, 15] * 3
    token_bytes = 1536
    groups = split_decodes(lens, token_bytes)
    assert sorted(i for group in groups for i in group) == list(range(len(lens)))
    for group in groups:
        padded = len(group) * max(lens[i] for i in group) * token_bytes
        padding = padded - sum(lens[i] for i in group) * token_bytes
        assert padding <= max(attention_plan.PADDING_BYTES, padded // 4)
        assert len(group) == 1 or padded <= attention_plan.CPU_GROUP_BYTES
    assert split_decodes([], token_bytes) == []
