"""Files straight to a device: threads and pieces change nothing of what arrives, and a failure is told by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lmesh_kernels import platforms
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.safetensors_folder import StoredTensor, WeightsError, read_safetensors, stored_tensors
from lmesh_kernels.models.staged_reads import StagedReads
from lmesh_kernels.models.weights import bind
from lmesh_kernels.platforms.cpu import CpuPlatform
from lmesh_kernels.platforms.platform import Platform
from lmesh_kernels.text.resolve import local_files
from safetensors.torch import save_file
from torch import Tensor

from tests.kernels.test_weights import FULL, checkpoint, config

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def platform(request: pytest.FixtureRequest) -> Platform:
    return platforms.detect(request.param, threads=1)


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """The tensors in `shards` files with an index."""
    names = sorted(tensors)
    table = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(table.values())):
        save_file({name: tensors[name] for name in names if table[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def loaded(folder: Path, platform: Platform, shape=FULL, dtype=torch.float32, **options: object) -> Decoder:
    decoder = Decoder(shape, dtype=dtype, device=platform.device, **options)
    decoder.arena.fill_(torch.nan)
    with StagedReads(platform, threads=3, piece_bytes=64) as reads:
        bind(decoder, stored_tensors(folder), reads)
    return decoder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_all_arrives_whatever_the_pieces(tmp_path: Path, platform: Platform, stored: torch.dtype, shards: int) -> None:
    save(tmp_path, {name: t.to(stored) for name, t in checkpoint(FULL).items()}, shards)
    plain = Decoder(FULL, dtype=torch.bfloat16, device=platform.device)
    plain.arena.zero_()
    bind(plain, read_safetensors(tmp_path))
    found = loaded(tmp_path, platform, dtype=torch.bfloat16)
    for (name, wanted), (_, slot) in zip(plain.named_buffers(), found.named_buffers(), strict=True):
        assert torch.equal(wanted, slot), name


def test_quantised_as_they_are_read(tmp_path: Path, platform: Platform) -> None:
    save(tmp_path, checkpoint(FULL))
    plain = Decoder(FULL, dtype=torch.float32, device=platform.device, quantisation="nf4")
    bind(plain, read_safetensors(tmp_path))
    found = loaded(tmp_path, platform, quantisation="nf4")
    for name in ("layers.0.attention.qkv", "layers.1.mlp.down"):
        assert torch.equal(plain.product(name).matrix(), found.product(name).matrix())


def test_a_tied_head_is_compared(tmp_path: Path, platform: Platform) -> None:
    tied = config(tie_word_embeddings=True)
    tensors = checkpoint(tied)
    head = tensors["model.embed_tokens.weight"].clone()
    loaded(save(tmp_path, {**tensors, "lm_head.weight": head}), platform, tied)
    head[3, 4] += 1
    save(tmp_path, {**tensors, "lm_head.weight": head})
    with pytest.raises(WeightsError, match="lm_head") as caught:
        loaded(tmp_path, platform, tied)
    assert caught.value.reason == "UNTIED_HEAD"


def test_what_does_not_fit_is_named(tmp_path: Path, platform: Platform) -> None:
    tensors = checkpoint(FULL)
    missing = "model.layers.1.mlp.down_proj.weight"
    save(tmp_path, {name: t for name, t in tensors.items() if name != missing})
    with pytest.raises(WeightsError, match=missing) as caught:
        loaded(tmp_path, platform)
    assert caught.value.reason == "MISSING_TENSORS"
    save(tmp_path, {**tensors, missing: torch.zeros(8, 11)})
    with pytest.raises(WeightsError, match=r"\(8, 11\), not \(8, 12\)"):
        loaded(tmp_path, platform)


def test_a_damaged_file_is_named(tmp_path: Path, platform: Platform) -> None:
    save(tmp_path, checkpoint(FULL))
    path = tmp_path / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for read in (loaded, lambda folder, _: list(read_safetensors(folder))):
        with pytest.raises(WeightsError, match="model-0") as caught:
            read(tmp_path, platform)
        assert caught.value.reason == "BAD_SAFETENSORS"


def test_a_file_that_shrinks_meanwhile_fails(tmp_path: Path, platform: Platform) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    stored = StoredTensor(path=path, offset=4, dtype=torch.float32, shape=(5, 10))
    target = torch.empty(5, 10, device=platform.device)
    with (
        pytest.raises(WeightsError, match="short became shorter"),
        StagedReads(platform, threads=2, piece_bytes=64) as reads,
    ):
        reads.read(stored, target)
    with StagedReads(platform, threads=2, piece_bytes=64) as reads:
        reads.read(stored, target)
        with pytest.raises(WeightsError, match="short"):
            reads.wait()
        with pytest.raises(WeightsError, match="short"):
            reads.wait()
        reads._errors.clear()


def test_waiting_covers_what_every_thread_copies(tmp_path: Path, platform: Platform) -> None:
    values = torch.randn(3000)
    (tmp_path / "values").write_bytes(values.numpy().tobytes())
    stored = StoredTensor(path=tmp_path / "values", offset=0, dtype=torch.float32, shape=(3000,))
    with StagedReads(platform, threads=4, piece_bytes=32) as reads:
        for _ in range(20):
            target = torch.full((3000,), torch.nan, device=platform.device)
            reads.read(stored, target)
            reads.wait()
            assert torch.equal(target.cpu(), values)


def test_a_device_without_staging_memory_is_an_error_not_a_wait(tmp_path: Path) -> None:
    class Full(CpuPlatform):
        def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            raise MemoryError("no pinned memory")

    (tmp_path / "values").write_bytes(bytes(64))
    stored = StoredTensor(path=tmp_path / "values", offset=0, dtype=torch.float32, shape=(16,))
    with pytest.raises(MemoryError, match="pinned"), StagedReads(Full(1), threads=2) as reads:
        reads.read(stored, torch.empty(16))
        reads.wait()


@pytest.mark.gpu
def test_the_engine_loads_so_on_a_gpu(tmp_path: Path) -> None:
    from tests.tiny_model import save_tiny_llama

    files, cuda = local_files(save_tiny_llama(tmp_path / "m")), platforms.detect("cuda")
    plain = load_model(files, dtype=torch.float32, device=cuda.device)
    staged = load_model(files, dtype=torch.float32, device=cuda.device, platform=cuda)
    assert torch.equal(plain.arena.cpu(), staged.arena.cpu())
