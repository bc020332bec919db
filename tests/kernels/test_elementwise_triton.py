"""The Triton forms of norm, activation, rotation with the cache's write, and pending ids, beside their references.

In the interpreter in float32; on a device in all dtypes. Results are written over NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lmesh_kernels.ops.embedding import embed_pending_reference
from lmesh_kernels.ops.embedding_kernels import embed_pending_triton
from lmesh_kernels.ops.rms_norm import rms_norm_reference
from lmesh_kernels.ops.rms_norm_kernels import rms_norm_triton
from lmesh_kernels.ops.rope_kv import rope_kv_reference
from lmesh_kernels.ops.rope_kv_kernels import rope_kv_triton
from lmesh_kernels.ops.silu_mul import silu_mul_reference
from lmesh_kernels.ops.silu_mul_kernels import silu_mul_triton
from torch import Tensor

# Two stores in a dtype and some float32 operations between them, relative; the interpreter's exp is numpy's.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
CASES = [
    pytest.param("cpu", torch.float32, id="interpreted"),
    *(
        pytest.param("cuda", dtype, id=str(dtype).removeprefix("torch."), marks=pytest.mark.gpu)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]
ROWS = (1, 7, 33)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(make: object, *args: object, **options: object) -> Tensor:
        tensor: Tensor = make(*args, **options)  # type: ignore[operator]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **o: filled(empty, *a, **o))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: filled(empty_like, *a, **o))
    yield


def draw(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=BOUND[found.dtype], atol=BOUND[found.dtype])


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [64, 129, 2048])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, size: int, with_residual: bool, device: str, dtype: torch.dtype) -> None:
    told = {"device": device, "dtype": dtype}
    x, weight = draw(rows, size, **told), draw(size, seed=1, **told)
    residual = draw(rows, size, seed=2, **told) if with_residual else None
    kept = None if residual is None else residual.clone()
    for found, expected in zip(
        rms_norm_triton(x, weight, 1e-5, residual), rms_norm_reference(x, weight, 1e-5, residual), strict=True
    ):
        assert_near(found, expected)
    assert residual is None or torch.equal(residual, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [16, 1100])
def test_silu_mul(rows: int, size: int, device: str, dtype: torch.dtype) -> None:
    gate_up = 3 * draw(rows, 2 * size, device=device, dtype=dtype)
    assert_near(silu_mul_triton(gate_up), silu_mul_reference(gate_up.clone()))


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (9, 3, 80), (2, 2, 128)])
def test_rope_kv(
    rows: int, normed: bool, heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> None:
    told = {"device": device, "dtype": dtype}
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim, **told)
    rotation = draw(rows, head_dim, seed=1, device=device, dtype=torch.float32)
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(2))[:rows].to(device)
    norms = (draw(head_dim, seed=3, **told), draw(head_dim, seed=4, **told)) if normed else (None, None)
    found, expected = (torch.full((2, 5, 16, kv_heads, head_dim), torch.nan, **told) for _ in range(2))  # type: ignore[arg-type]
    used = qkv.clone()
    ours = rope_kv_triton(used, rotation, slots.int(), found[0], found[1], *norms, 1e-6)
    theirs = rope_kv_reference(
        qkv.clone(), rotation, slots, expected[0], expected[1], q_norm=norms[0], k_norm=norms[1], eps=1e-6
    )
    assert_near(ours, theirs)
    torch.testing.assert_close(found, expected, rtol=BOUND[dtype], atol=BOUND[dtype], equal_nan=True)
    # k is left in its place as the cache has it, v as it came.
    left = used.view(rows, -1, head_dim)[:, heads:].unflatten(1, (2, kv_heads))
    assert torch.equal(left.transpose(0, 1), found.flatten(1, 2)[:, slots])


@pytest.mark.parametrize(("device", "dtype"), CASES)
def test_pending_ids(device: str, dtype: torch.dtype) -> None:
    weight = draw(37, 1100, device=device, dtype=dtype)
    ids = torch.tensor([3, 0, 0, 36, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([-1, 2, 0, -1, 2], dtype=torch.int32, device=device)
    last_ids = torch.tensor([5, 99, 36], device=device)
    found = embed_pending_triton(ids, slots, last_ids, weight)
    assert torch.equal(found, embed_pending_reference(ids, slots, last_ids, weight))
    assert torch.equal(found, weight[[3, 36, 5, 36, 36]])
