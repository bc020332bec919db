"""The Triton form of paged attention against float64: in the interpreter in float32, and on a device in all dtypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lmesh_kernels.ops import attention_work
from lmesh_kernels.ops.attention_work import FIELDS, AttentionWork, on_device, plan_pieces
from lmesh_kernels.ops.device_attention import DeviceAttention
from lmesh_kernels.ops.linear_tiles import takes_pdl
from lmesh_kernels.ops.paged_attention_kernels import paged_attention_triton
from torch import Tensor

# (query lengths, cached lengths)
BATCHES = {
    "one-decode": ([1], [32]),
    "decodes": ([1, 1, 1], [4, 63, 7]),
    "prompts": ([13, 33], [0, 0]),
    "chunks": ([7, 9], [20, 1]),
    "mixed": ([1, 1, 7, 33], [50, 3, 0, 15]),
}
LARGE = {
    "decodes": ([1] * 7, [0, 6, 1022, 4095, 33, 700, 64]),
    "prompts": ([1023, 7, 33], [0, 0, 0]),
    "mixed": ([1, 1, 257, 33], [1022, 6, 777, 4000]),
}


class Case:
    """Random q, and a cache whose blocks are scattered; what no sequence owns is NaN."""

    def __init__(
        self,
        lens: tuple[list[int], list[int]],
        heads: int,
        kv_heads: int,
        head_dim: int,
        block: int,
        *,
        shared: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(heads * head_dim + block)
        self.q_lens, cached = np.array(lens[0], np.int32), np.array(lens[1], np.int32)
        self.kv_lens = self.q_lens + cached
        counts = [-(-int(n) // block) for n in self.kv_lens]
        free = torch.randperm(sum(counts) + 1, generator=generator).tolist()
        common = [free.pop() for _ in range(shared // block)]
        own = [[free.pop() for _ in range(n - len(common))] for n in counts]
        self.tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, blocks in enumerate(own):
            self.tables[row, : counts[row]] = torch.tensor(common + blocks)
        self.q = torch.randn(int(self.q_lens.sum()), heads, head_dim, generator=generator)
        self.cache = torch.randn(2, sum(counts) + 1, block, kv_heads, head_dim, generator=generator)
        used = torch.zeros(self.cache.shape[1:3], dtype=torch.bool)
        for row, length in enumerate(self.kv_lens.tolist()):
            at = torch.arange(length)
            used[self.tables[row].long()[at // block], at % block] = True
        self.cache[:, ~used] = torch.nan
        self.groups = ((0, len(counts), shared),) if shared else ()

    def expected(self, scale: float, softcap: float = 0.0, window: int = 0) -> Tensor:
        """Float64, token by token."""
        out, row = [], 0
        q, block = self.q.double(), self.cache.shape[2]
        for table, q_len, kv_len in zip(self.tables.long(), self.q_lens.tolist(), self.kv_lens.tolist(), strict=True):
            at = torch.arange(kv_len)
            k, v = (
                self.cache[:, table[at // block], at % block]
                .double()
                .repeat_interleave(q.shape[1] // self.cache.shape[3], dim=2)
            )
            for end in range(kv_len - q_len + 1, kv_len + 1):
                begin = max(0, end - window) if window else 0
                scores = torch.einsum("hd,nhd->hn", q[row], k[begin:end]) * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[begin:end]))
                row += 1
        return torch.stack(out)

    def prepared(self, dtype: torch.dtype, place: torch.device) -> tuple[DeviceAttention, AttentionWork]:
        """The kernels' tiles with rooms for parts full of NaN, and the work."""
        kv_heads, head_dim = self.cache.shape[3:]
        group = self.q.shape[1] // kv_heads
        attention = DeviceAttention(place, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype)
        for room in (attention.scratch.parts, attention.scratch.sums):
            room.fill_(torch.nan)
        shape = replace(attention.shape, programs=max(64, attention.shape.programs))
        pieces = plan_pieces(self.q_lens, self.kv_lens, shape, groups=self.groups)
        work = on_device(pieces, lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(place))
        # As a graph's lists they have room for more; what stands there is of an earlier step, and must not be read.
        stale = torch.full((5, FIELDS), 1 << 20, dtype=torch.int32, device=place)
        return attention, replace(work, narrow=torch.cat([work.narrow, stale]), wide=torch.cat([work.wide, stale]))

    def found(self, scale: float, dtype: torch.dtype, device: str, **told: float) -> Tensor:
        """Through the kernels."""
        place = torch.device(device)
        attention, work = self.prepared(dtype, place)
        return paged_attention_triton(
            self.q.to(place, dtype),
            *self.cache.to(place, dtype),
            self.tables.to(place),
            work,
            attention.scratch,
            scale=scale,
            narrow=attention.narrow,
            wide=attention.wide,
            programs=max(2, attention.programs),
            pdl=takes_pdl(place),
            **told,  # type: ignore[arg-type]
        )


def check(case: Case, dtype: torch.dtype, device: str, **told: float) -> None:
    scale = case.q.shape[2] ** -0.5
    expected = case.expected(scale, **told)  # type: ignore[arg-type]
    found = case.found(scale, dtype, device, **told).double().cpu()
    # Weights sum to 1 and values are some 4 at most: errors are those of the weights, stored once; inputs are rounded,
    # too, in lower precision: q, k and so the scores by 2^-9 of some 4, the weights by as much.
    bound = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    assert float((found - expected).abs().max()) < bound


@pytest.fixture
def split_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have parts, too."""
    monkeypatch.setattr(attention_work, "LEAST_SPLIT", 32)


@pytest.mark.usefixtures("split_early")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), [(1, 1, 64, 16), (6, 2, 80, 32), (16, 1, 64, 128)])
def test_interpreted(batch: str, heads: int, kv_heads: int, head_dim: int, block: int) -> None:
    check(Case(BATCHES[batch], heads, kv_heads, head_dim, block), torch.float32, "cpu")


@pytest.mark.usefixtures("split_early")
def test_interpreted_over_a_shared_prefix() -> None:
    case = Case(([1] * 5, [64, 65, 70, 100, 69]), 4, 2, 64, 16, shared=64)
    check(case, torch.float32, "cpu")


def test_interpreted_pieces_that_end_within_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_work, "LEAST_SPLIT", 16)
    check(Case(BATCHES["mixed"], 4, 2, 64, 16), torch.float32, "cpu")
    check(Case(([1] * 5, [48, 49, 54, 84, 53]), 4, 2, 64, 16, shared=48), torch.float32, "cpu")


@pytest.mark.parametrize("told", [{"softcap": 2.0}, {"window": 9}, {"softcap": 1.0, "window": 40}], ids=str)
@pytest.mark.parametrize("batch", ["decodes", "mixed"])
def test_interpreted_softcap_and_window(batch: str, told: dict[str, float]) -> None:
    check(Case(BATCHES[batch], 4, 2, 64, 16), torch.float32, "cpu", **told)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", LARGE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block"),
    [(1, 1, 64, 16), (32, 8, 64, 64), (32, 8, 128, 64), (12, 2, 96, 32), (16, 1, 256, 128), (9, 3, 64, 16)],
)
def test_on_a_device(batch: str, heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype) -> None:
    check(Case(LARGE[batch], heads, kv_heads, head_dim, block), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_over_a_shared_prefix(dtype: torch.dtype) -> None:
    check(Case(([1] * 33, [2048 + i for i in range(33)]), 32, 8, 64, 64, shared=2048), dtype, "cuda")


@pytest.mark.gpu
def test_on_a_device_over_a_shared_prefix_that_ends_within_a_stretch() -> None:
    check(Case(([1] * 5, [272 + i for i in range(5)]), 8, 2, 64, 16, shared=272), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("told", [{"softcap": 2.0}, {"window": 100}], ids=str)
def test_on_a_device_softcap_and_window(told: dict[str, float]) -> None:
    check(Case(LARGE["mixed"], 8, 2, 128, 64), torch.bfloat16, "cuda", **told)
