"""The memory plan's lines: parameters exactly, activations as a bound on what a step really holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.footprint import activation_bytes, parameter_bytes
from lmesh_kernels.ops.adjust import Adjustment
from lmesh_kernels.ops.sample import sample_reference, sample_rows
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.paged_runner import CPU, PagedRunner

CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=1003,
    hidden_size=96,
    intermediate_size=320,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=700,
    qk_norm=True,
)


class PeakMode(TorchDispatchMode):
    """Most bytes of storages made inside it that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {_storage_key(a) for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and _storage_key(tensor) not in known | self._seen:
                self._track(tensor)
        return out

    def _track(self, tensor: torch.Tensor) -> None:
        key, size = _storage_key(tensor), tensor.untyped_storage().nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor.untyped_storage(), self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_exact(dtype: torch.dtype, tied: bool) -> None:
    config = ModelConfig(
        **{f: getattr(CONFIG, f) for f in CONFIG.__slots__ if f != "tie_word_embeddings"}, tie_word_embeddings=tied
    )
    decoder = Decoder(config, dtype=dtype, device=CPU)
    held = decoder.arena.untyped_storage().nbytes() + decoder.rotations.untyped_storage().nbytes()
    assert parameter_bytes(config, dtype) == held


def test_kv_block_bytes_are_exact() -> None:
    cache = KVCache(CONFIG, 7, 16, torch.bfloat16, CPU)
    assert cache.data.nbytes == 7 * KVCache.bytes_per_block(CONFIG, 16, torch.bfloat16)
    assert cache.data.shape == (3, 2, 7, 16, 2, 32)


def test_copied_blocks_are_equal_in_all_layers() -> None:
    cache = KVCache(CONFIG, 3, 4, torch.float32, CPU)
    cache.data.normal_()
    before = cache.data.clone()
    cache.copy_block(2, 0)
    assert torch.equal(cache.data[:, :, 0], before[:, :, 2])
    assert torch.equal(cache.data[:, :, 1:], before[:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["prompt", "later-chunk", "decodes"])
def test_a_step_stays_within_the_bound(dtype: torch.dtype, work: str) -> None:
    decoder = Decoder(CONFIG, dtype=dtype, device=CPU)
    decoder.arena.zero_()
    runner = PagedRunner(decoder, block_size=16, num_blocks=64)
    if work == "later-chunk":
        runner.step({0: [1] * 200})
    if work == "decodes":
        runner.step({lane: [1] * 20 for lane in range(32)})
    step = {"prompt": {0: [1] * 256}, "later-chunk": {0: [1] * 256}, "decodes": {i: [1] for i in range(32)}}[work]
    runner.decoder.logits = lambda hidden: Decoder.logits(decoder, hidden[-32:])  # type: ignore[method-assign]
    with PeakMode() as mode:
        try:
            runner.step(step)
        except RuntimeError:
            assert work != "decodes"  # fewer rows of logits than tokens cannot be split by lane; the step has run
    assert 0 < mode.peak <= activation_bytes(CONFIG, 256, 32, dtype)


def _draw(logits: torch.Tensor, params: SampleParams, adjustment: Adjustment) -> None:
    rows = len(logits)
    ids, finite = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    sample_rows(logits, params, SampleHints(), ids, finite, adjustment)


@pytest.mark.parametrize("draw", [_draw, sample_reference])
@pytest.mark.parametrize("adjusted", [False, True])
def test_sampling_stays_within_the_bound(draw: Callable[..., object], adjusted: bool) -> None:
    rows = 32
    logits = torch.randn(rows, CONFIG.vocab_size)
    zeros, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    top_k = torch.full((rows,), 9, dtype=torch.int32)
    params = SampleParams(
        temperature=ones, top_p=ones * 0.9, top_k=top_k, floor=ones * -9, seed=zeros, choice=zeros, position=zeros
    )
    slots = torch.arange(rows)
    adjustment = Adjustment(
        repetition=ones * 1.5,
        presence=ones,
        frequency=ones,
        seen_row=slots,
        bias_row=slots,
        seen=torch.ones(rows, CONFIG.vocab_size, dtype=torch.int16),
        bias=torch.ones(rows, CONFIG.vocab_size),
    )
    with PeakMode() as mode:
        draw(logits, params, adjustment if adjusted else None)
    assert 0 < mode.peak + logits.nbytes <= activation_bytes(CONFIG, 1, rows, torch.float32)
