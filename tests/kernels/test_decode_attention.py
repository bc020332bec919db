"""Decodes of few rows in one launch against float64: in the interpreter in float32, and on a device in all dtypes."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops import attention_work
from lmesh_kernels.ops.decode_attention_kernels import decode_attention_triton
from lmesh_kernels.ops.linear_tiles import takes_pdl
from lmesh_kernels.ops.rope_kv import rope_kv_reference
from torch import Tensor

from tests.kernels.test_paged_attention_triton import Case

SHAPES = [(1, 1, 64, 16), (6, 2, 80, 32), (16, 1, 32, 128), (4, 4, 16, 16)]
LARGE_SHAPES = [(1, 1, 64, 16), (32, 8, 64, 64), (32, 8, 128, 64), (12, 2, 96, 32), (16, 1, 256, 128), (9, 3, 64, 16)]
EPS = 1e-5


class Decodes(Case):
    """A `Case` of one new token a sequence, whose own keys and values are not in the cache yet."""

    def __init__(
        self, cached: list[int], heads: int, kv_heads: int, head_dim: int, block: int, *, normed: bool
    ) -> None:
        super().__init__(([1] * len(cached), cached), heads, kv_heads, head_dim, block)
        rows, kept = len(cached), self.kv_lens.tolist()
        generator = torch.Generator().manual_seed(rows)
        self.qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=generator)
        angle = torch.rand(rows, head_dim // 2, generator=generator) * 6
        self.rotation = torch.cat([angle.cos(), angle.sin()], dim=1)
        blocks = torch.stack([self.tables[row, (n - 1) // block] for row, n in enumerate(kept)])
        self.slots = blocks * block + torch.tensor([(n - 1) % block for n in kept])
        self.norms = [torch.rand(head_dim, generator=generator) + 0.5 for _ in range(2)] if normed else [None, None]
        self.cache.view(2, -1, kv_heads, head_dim)[:, self.slots.long()] = torch.nan

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(attention, cache afterwards), float64 on inputs of a dtype."""
        exact = self.cache.to(dtype).double()
        norms = [None if norm is None else norm.to(dtype).double() for norm in self.norms]
        qkv, of = self.qkv.to(dtype).double(), (self.rotation.double(), self.slots.long())
        self.q = rope_kv_reference(qkv, *of, exact[0], exact[1], q_norm=norms[0], k_norm=norms[1], eps=EPS)
        self.cache = exact
        return self.expected(self.q.shape[-1] ** -0.5), exact

    def outcome(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """(attention, cache afterwards) through the kernels."""
        place = torch.device(device)
        attention, work = self.prepared(dtype, place)
        assert work.has_narrow and not work.has_wide
        cache = self.cache.to(place, dtype, copy=True)
        found = decode_attention_triton(
            self.qkv.to(place, dtype),
            self.rotation.to(place),
            self.slots.to(place, torch.int32),
            cache[0],
            cache[1],
            self.tables.to(place),
            work,
            attention.scratch,
            q_norm=None if self.norms[0] is None else self.norms[0].to(place, dtype),
            k_norm=None if self.norms[1] is None else self.norms[1].to(place, dtype),
            eps=EPS,
            scale=self.q.shape[-1] ** -0.5,
            tile=attention.narrow,
            pdl=takes_pdl(place),
        )
        return found.double().cpu(), cache.double().cpu()


def check(case: Decodes, dtype: torch.dtype, device: str) -> None:
    found, cache = case.outcome(dtype, device)
    expected, wanted = case.reference(dtype)
    # The bounds of `test_paged_attention_triton`; with heads' norm q and k are rounded once more.
    bound = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert float((found - expected).abs().max()) < bound
    own = case.slots.long()
    kept = torch.ones(len(cache[0].flatten(0, 1)), dtype=torch.bool)
    kept[own] = False
    was, now = wanted.flatten(1, 2), cache.flatten(1, 2)
    assert torch.equal(was[:, kept].nan_to_num(7.0), now[:, kept].nan_to_num(7.0)), "a key of another token was written"
    assert float((was[0, own] - now[0, own]).abs().max()) < bound
    assert torch.equal(was[1, own], now[1, own]), "values are written as they are"


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int, int, int], normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_work, "LEAST_SPLIT", 32)
    check(Decodes([0, 4, 63, 64, 96, 150], *shape, normed=normed), torch.float32, "cpu")


def test_interpreted_pieces_longer_than_a_stretch() -> None:
    check(Decodes([0, 31, 32, 33, 200], 4, 2, 64, 16, normed=False), torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_on_a_device(shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype) -> None:
    check(Decodes([0, 6, 1022, 4095, 33, 700, 64], *shape, normed=normed), dtype, "cuda")
