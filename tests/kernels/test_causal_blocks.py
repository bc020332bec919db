"""Attention in blocks of queries against float64, forward and backward, on lengths around the blocks' edges."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.ops import causal_blocks
from lmesh_kernels.ops.packed_attention import Heads, packed_attention, packed_attention_reference
from torch import Tensor

UNIT = 2.0**-24
BLOCK = causal_blocks.BLOCK
HEADS = [Heads(heads=6, kv_heads=2, head_dim=8), Heads(heads=3, kv_heads=3, head_dim=10)]
LENGTHS = [
    [1],
    [BLOCK - 1, BLOCK, BLOCK + 1],
    [2 * BLOCK + 5] * 3,  # attended together
    [7, 7, 3 * BLOCK, 7],
    [1, 1, 2],
]


def gradients(qkv: Tensor, lengths: list[int], heads: Heads, dout: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of qkv), in blocks where it is float32, else as the reference has it."""
    segments = [Segment(row=i, ids=[0] * n, weights=[1.0] * n) for i, n in enumerate(lengths)]
    batch = pack_batch(segments, torch.device("cpu"))
    angles = batch.positions[:, None].double() * torch.logspace(0, -3, heads.head_dim // 2, dtype=torch.float64)
    rotation = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    leaf = qkv.clone().requires_grad_()
    wide = qkv.dtype == torch.float64
    out = (packed_attention_reference if wide else packed_attention)(leaf + 0, rotation, batch, heads)
    out.backward(dout.to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=["grouped", "alone"])
def test_forward_and_backward(lengths: list[int], heads: Heads) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width = sum(lengths), (heads.heads + 2 * heads.kv_heads) * heads.head_dim
    qkv, dout = torch.randn(tokens, width, generator=generator), torch.randn(tokens, heads.q_size, generator=generator)
    out, gradient = gradients(qkv, lengths, heads, dout)
    expected, expected_gradient = gradients(qkv.double(), lengths, heads, dout)
    # Sums over head_dim, then keys, then (of keys' gradients) queries and their heads; each term rounded as it is added
    # and again by what made it. Norm-wise, as rounding is spread.
    terms = 2 * heads.head_dim + 2 * max(lengths) * heads.group
    for found, wanted in ((out, expected), (gradient, expected_gradient)):
        assert (found.double() - wanted).norm() <= terms * UNIT * wanted.norm()


def test_a_row_is_attended_alone() -> None:
    heads, lengths = HEADS[0], [BLOCK + 3] * 3
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), (heads.heads + 2 * heads.kv_heads) * heads.head_dim, generator=generator)
    dout = torch.randn(sum(lengths), heads.q_size, generator=generator)
    out, gradient = gradients(qkv, lengths, heads, dout)
    changed = qkv.clone()
    changed[lengths[0] :] += 1
    other, other_gradient = gradients(changed, lengths, heads, dout)
    assert torch.equal(out[: lengths[0]], other[: lengths[0]])
    assert torch.equal(gradient[: lengths[0]], other_gradient[: lengths[0]])
    assert not torch.equal(out[lengths[0] :], other[lengths[0] :])


def test_a_group_s_scores_are_bounded() -> None:
    for length in (1, BLOCK, 512, 4096, 1 << 20):
        rows = causal_blocks.rows_at_once(length, 9)
        assert rows == 1 or rows * 9 * min(BLOCK, length) * length * 4 <= causal_blocks.SCORE_BYTES
