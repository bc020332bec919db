"""The Triton form of the adapters' product beside its reference: in the interpreter, and on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lmesh_kernels.ops.low_rank import LowRank, Part
from lmesh_kernels.ops.segmented_lora import AdapterSegment, ServedProduct, add_adapters_reference_
from lmesh_kernels.ops.segmented_plan import SegmentPlan, SegmentTables, cut_segments, directory_of
from torch import Tensor

SHAPES = ((72, (48, 16, 16)), (64, (40,)), (130, (96, 96)))
NUMBERS = {"elsewhere": 0, "here": 1}


def plan_of(tables: SegmentTables, put: Callable[[Any], Tensor]) -> SegmentPlan:
    return SegmentPlan(
        numbers=NUMBERS,
        order=put(tables.order),
        tiles=put(tables.tiles),
        directories=put(tables.directories),
        height=tables.height,
        most_ranks=tables.most_ranks,
    )


class Case:
    """A batch over three adapters of ranks 4, 17 and 40 (DoRA), and 64, and the base."""

    def __init__(self, shape: tuple[int, tuple[int, ...]], tokens: int, dtype: torch.dtype, device: str) -> None:
        self.inputs, self.outputs = shape
        self.dtype, self.device = dtype, torch.device(device)
        self._noise = torch.Generator().manual_seed(tokens)
        ranks = ((4, 4, 4), (17, 0, 40), (64, 64, 64))
        self.products = [self._product(own[: len(self.outputs)], dora=i == 1) for i, own in enumerate(ranks)]
        self.x, self.y = self._normal(tokens, self.inputs), self._normal(tokens, sum(self.outputs))
        self.bias = self._normal(sum(self.outputs))
        which = torch.randint(0, 4, (tokens,), generator=self._noise).numpy()
        self.rows = {i: np.nonzero(which == i)[0] for i in range(3) if (which == i).any()}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._noise).to(self.device, self.dtype)

    def _product(self, ranks: tuple[int, ...], *, dora: bool) -> ServedProduct:
        parts, factors, first, start = [], [], 0, 0
        for i, (rank, outputs) in enumerate(zip(ranks, self.outputs, strict=True)):
            if rank:
                b = self._normal(outputs, rank) * 0.1
                parts.append(Part(site=i, start=start, first=first, b=b, scale=0.5 + i))
                factors.append(self._normal(outputs).abs() if dora else None)
                first += rank
            start += outputs
        low = LowRank(a=self._normal(first, self.inputs) * 0.1, parts=tuple(parts))
        return ServedProduct(low=low, factors=tuple(factors))

    def plan(self) -> SegmentPlan:
        def put(values: Any) -> Tensor:
            return torch.from_numpy(values).to(self.device)

        mine = [self.products[i] for i in self.rows]
        self.directories = [directory_of({"here": (p.low, p.factors)}, NUMBERS, self.device) for p in mine]
        most = max(p.low.a.shape[0] for p in mine)  # type: ignore[union-attr]
        return plan_of(cut_segments(list(self.rows.values()), self.directories, most), put)

    def expected(self, bias: Tensor | None) -> Tensor:
        y = self.y.clone()
        segments = [
            AdapterSegment(rows=torch.from_numpy(own).to(self.device), products={"here": self.products[i]})
            for i, own in self.rows.items()
        ]
        add_adapters_reference_(y, self.x, "here", segments, bias)
        return y

    def found(self, slot: str, bias: Tensor | None) -> Tensor:
        from lmesh_kernels.ops.segmented_lora_kernels import add_adapters_triton_

        y = self.y.clone()
        add_adapters_triton_(y, self.x, slot, self.plan(), bias)
        return y


def check(case: Case, bound: float) -> None:
    if not case.rows:
        return
    for bias in (None, case.bias):
        wanted = case.expected(bias).float()
        error = (case.found("here", bias).float() - wanted).abs().max() / wanted.abs().max()
        assert float(error) < bound
    assert torch.equal(case.found("elsewhere", None), case.y)


@pytest.mark.parametrize("tokens", [1, 7, 33, 65])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_as_the_reference(shape: tuple[int, tuple[int, ...]], tokens: int) -> None:
    check(Case(shape, tokens, torch.float32, "cpu"), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 33, 257, 1023])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, (4096, 1024, 1024))], ids=str)
def test_on_a_device_as_the_reference(shape: tuple[int, tuple[int, ...]], tokens: int, dtype: torch.dtype) -> None:
    check(Case(shape, tokens, dtype, "cuda"), 1e-5 if dtype is torch.float32 else 2e-2)


def test_room_to_spare_changes_nothing() -> None:
    case = Case(SHAPES[0], 33, torch.float32, "cpu")
    expected, plan = case.found("here", case.bias), case.plan()

    def longer(values: Tensor, rows: int) -> Tensor:
        return torch.cat([values, values.new_zeros(rows, *values.shape[1:])])

    spare = replace(
        plan,
        order=longer(plan.order, 7),
        tiles=longer(plan.tiles, 3),
        directories=longer(plan.directories, 3),
        most_ranks=plan.most_ranks + 64,
    )
    case.plan = lambda: spare  # type: ignore[method-assign]
    assert torch.equal(case.found("here", case.bias), expected)


def test_tiles_cover_each_row_once() -> None:
    rows = [np.arange(0, 130, 2), np.arange(1, 40, 2)]
    plan = plan_of(cut_segments(rows, [torch.zeros(1), torch.zeros(1)], 8), torch.from_numpy)
    assert plan.height == 64 and plan.num_rows == sum(map(len, rows))
    covered = [
        (adapter, int(row))
        for adapter, first, count in plan.tiles.tolist()
        for row in plan.order[first : first + count]
    ]
    assert covered == [(i, int(row)) for i, own in enumerate(rows) for row in own]
    small = plan_of(cut_segments([np.arange(5)], [torch.zeros(1)], 8), torch.from_numpy)
    assert (small.height, small.num_tiles) == (16, 1)
