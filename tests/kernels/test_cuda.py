"""On a CUDA device: the platform's stream, the decoder and sampling agree with the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lmesh_kernels.models.config import ModelConfig, RopeConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.noise import row_keys, uniforms
from lmesh_kernels.ops.sample import sample, sample_rows
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from lmesh_kernels.platforms import Platform, detect

from tests.kernels.paged_runner import CPU, PagedRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device"),
]

CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=1003,
    hidden_size=128,
    intermediate_size=320,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope=RopeConfig(theta=1e5),
    qk_norm=True,
    attention_bias=True,
)
NAMES = ("temperature", "top_p", "top_k", "floor", "seed", "choice", "position")
IDS = [[(7 * i + 3 * lane) % 1003 for i in range(n)] for lane, n in enumerate((701, 1, 64, 7))]


@pytest.fixture(scope="module")
def platform() -> Platform:
    return detect("cuda")


def decoder_on(device: torch.device, dtype: torch.dtype) -> Decoder:
    """The same random weights wherever it is."""
    decoder = Decoder(CONFIG, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    # Slot by slot: the arena's own gaps between slots depend on the dtype.
    for name, slot in decoder.named_buffers():
        if name != "rotations":
            mean = 1.0 if "norm" in name else 0.0
            slot.copy_(torch.randn(slot.shape, generator=generator) * 0.15 + mean)
    return decoder


def test_description(platform: Platform) -> None:
    info = platform.describe()
    assert info.kind == "cuda"
    assert 0 < info.free_bytes <= info.total_bytes
    assert info.compute_capability is not None
    assert 0 < platform.memory_free() <= info.total_bytes
    assert platform.staging((3,), torch.int64).is_pinned()


def test_stream_runs_in_order_and_reports_the_end(platform: Platform) -> None:
    stream = platform.stream()
    x = torch.ones(2048, 2048, device=platform.device)
    host = platform.staging((1,), torch.float32)

    def work() -> torch.Tensor:
        y = x
        for _ in range(30):
            y = (y @ x) / 2048
        host.copy_(y[:1, 0], non_blocking=True)
        return host

    first, second = stream.submit(work), stream.submit(lambda: x.sum())
    assert second.result().item() == 2048 * 2048
    assert first.done()
    assert first.result().item() == pytest.approx(1.0, rel=1e-2)
    with pytest.raises(ZeroDivisionError):
        stream.submit(lambda: 1 // 0).result()
    stream.close()


# A stock of float32 products may run in TF32 only if asked; bfloat16 keeps 8 bits through three layers.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_decoder_equals_the_cpu(platform: Platform, dtype: torch.dtype, bound: float) -> None:
    expected = PagedRunner(decoder_on(CPU, torch.float32), block_size=16).full(IDS)
    largest = max(e.abs().max() for e in expected)
    decoder = decoder_on(platform.device, dtype)
    whole = PagedRunner(decoder, block_size=16).full(IDS)
    chunked = PagedRunner(decoder, block_size=16).in_chunks(IDS, (600, 1, 33))
    for actual in (whole, chunked):
        for ours, theirs in zip(actual, expected, strict=True):
            assert (ours.cpu() - theirs).abs().max() <= bound * largest


def test_forward_and_sampling_never_wait_for_the_device(platform: Platform) -> None:
    from tests.kernels.paged_runner import make_batch, on_device

    decoder = decoder_on(platform.device, torch.bfloat16)
    runner = PagedRunner(decoder, block_size=16)
    batch = make_batch([[5], [6], [1, 2, 3], [4] * 9], [3, 40, 0, 20], [[1], [2, 3, 4], [5], [6, 7]], 16)
    batch = on_device(batch, platform.device)
    # An engine plans attention and counts ends on the host, and sends both with its columns.
    assert runner.attention.device is not None
    batch = replace(batch, work=runner.attention.device.plan(batch))
    ends = torch.tensor(batch.q_lens_host, device=platform.device).cumsum(0) - 1
    rows = [torch.ones(4, device=platform.device), torch.full((4,), 0.9, device=platform.device)]
    rows.append(torch.full((4,), 20, dtype=torch.int32, device=platform.device))
    floors = torch.full((4,), -torch.inf, device=platform.device)
    counters = [torch.arange(4, device=platform.device) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = decoder(batch, runner.attention)
        logits = decoder.logits(hidden.index_select(0, ends))
        params = SampleParams(**dict(zip(NAMES, [*rows, floors, *counters], strict=True)))
        ids, finite = torch.empty_like(counters[0]), torch.empty(4, dtype=torch.bool, device=platform.device)
        sample_rows(logits, params, SampleHints(), ids, finite)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_noise_has_the_cpus_bits(platform: Platform) -> None:
    counters = [torch.arange(-50, 50) * 987654321, torch.arange(100) % 4, torch.arange(100) * 31]
    ids = torch.arange(50_000, dtype=torch.int32)
    here = uniforms(row_keys(*counters), ids)
    there = uniforms(row_keys(*(c.to(platform.device) for c in counters)), ids.to(platform.device))
    assert torch.equal(here, there.cpu())


def test_samples_equal_the_cpus(platform: Platform) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, vocab = 256, 3001
    logits = torch.randn(rows, vocab, generator=generator) * 4
    temperature = torch.rand(rows, generator=generator) + 0.3
    temperature[::3] = 0
    top_p = torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.9)
    top_k = (torch.arange(rows, dtype=torch.int32) % 5) * 10
    counters = [torch.arange(rows), torch.arange(rows) % 3, torch.arange(rows) * 7]
    columns = [temperature, top_p, top_k, torch.full((rows,), -torch.inf), *counters]
    params = SampleParams(**dict(zip(NAMES, columns, strict=True)))
    there, finite = torch.empty(rows, dtype=torch.int64, device=platform.device), torch.empty(rows, dtype=torch.bool)
    on_device = SampleParams(**{n: c.to(platform.device) for n, c in zip(NAMES, columns, strict=True)})
    sample_rows(logits.to(platform.device), on_device, SampleHints(), there, finite.to(platform.device))
    # Logarithms and sums may differ in the last place, which can turn a near tie; not more often than this.
    assert (sample(logits, params) == there.cpu()).float().mean() >= 0.98
