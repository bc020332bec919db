"""Exports of every family: transformers and our own loader read back what was meant; what would be lossy is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.lora.factors import Adapter, Factors
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import PeftConfig
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer.errors import JobError
from lmesh_trainer.export import exporter
from lmesh_trainer.export import merged as merged_folder
from lmesh_trainer.export.exporter import ExportKind, export
from lmesh_trainer.export.gguf_file import GgufKind, write_gguf
from lmesh_trainer.export.tensors import Survival, merged_tensors
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from tests.kernels.paged_runner import CPU, PagedRunner
from tests.kernels.tiny_families import FAMILIES, Family, save_family
from tests.tiny_model import byte_tokenizer, save_tiny_llama

IDS = [5, 17, 99, 3, 42, 7, 8, 64, 23]
GGUF_FAMILIES = [f for f in FAMILIES if f.name in ("llama-gqa-tied", "llama-mqa-headdim-llama3", "qwen2-mha-sharded")]
GGUF_FAMILIES += [f for f in FAMILIES if f.name in ("qwen3-headdim", "llama-mha-biases-linear")]


def random_adapter(files: ModelFiles, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    wanted = PeftConfig(r=4, alpha=8, target_modules="all-linear")
    return {
        site: Factors(a=f.a, b=torch.randn(f.b.shape, generator=generator) * size, scale=f.scale)
        for site, f in initial_adapter(wanted, load_config(files), seed=0).items()
    }


def with_tokenizer(folder: Path) -> ModelFiles:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return local_files(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> ModelFiles:
    return local_files(save_tiny_llama(tmp_path / "base"))


def logits(files: ModelFiles) -> torch.Tensor:
    decoder = load_model(files, dtype=torch.float32, device=CPU)
    return PagedRunner(decoder).full([IDS])[0]


def peer_logits(folder: Path) -> torch.Tensor:
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return peer(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_merged_folders_of_every_family(family: Family, tmp_path: Path) -> None:
    files = local_files(save_family(family, tmp_path / "base"))
    adapter = random_adapter(files)
    done = export(files, adapter, tmp_path / "out", ExportKind.FLOAT32)
    assert done.survival == pytest.approx(1.0) and done.mean_difference < 1e-4
    assert torch.allclose(peer_logits(tmp_path / "out"), logits(local_files(tmp_path / "out")), atol=2e-3)
    assert not torch.allclose(peer_logits(tmp_path / "out"), peer_logits(tmp_path / "base"), atol=0.1)


@pytest.mark.parametrize("kind", [ExportKind.F16, ExportKind.BF16])
def test_merged_in_16_bits(tiny: ModelFiles, tmp_path: Path, kind: ExportKind) -> None:
    done = export(tiny, random_adapter(tiny), tmp_path / "out", kind)
    assert 0.9 < done.survival < 1.1
    told = {parameter.dtype for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()}
    assert told == {torch.float16 if kind is ExportKind.F16 else torch.bfloat16}


def test_shards_and_their_index(tiny: ModelFiles, tmp_path: Path) -> None:
    config, survival = load_config(tiny), Survival()
    tensors = merged_tensors(tiny, config, {}, torch.float32, survival, lambda tensor: tensor)
    (tmp_path / "out").mkdir()
    merged_folder.write_folder(
        tmp_path / "out", tensors, files=tiny, config=config, dtype=torch.float32, shard_bytes=50_000
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert torch.equal(peer_logits(tmp_path / "out"), peer_logits(tiny.path))


@pytest.mark.parametrize("family", GGUF_FAMILIES, ids=lambda family: family.name)
def test_gguf_of_every_family(family: Family, tmp_path: Path) -> None:
    files = with_tokenizer(save_family(family, tmp_path / "base"))
    done = export(files, random_adapter(files), tmp_path / "out.gguf", ExportKind.GGUF_F16)
    assert done.mean_difference < 0.01
    theirs = peer_logits_of(files, random_adapter(files), tmp_path)
    assert torch.allclose(logits(local_files(tmp_path / "out.gguf")), theirs, atol=0.15)


def peer_logits_of(files: ModelFiles, adapter: Adapter, tmp_path: Path) -> torch.Tensor:
    export(files, adapter, tmp_path / "peer", ExportKind.FLOAT32)
    return peer_logits(tmp_path / "peer")


def test_gguf_keeps_the_tokenizer(tiny: ModelFiles, tmp_path: Path) -> None:
    export(tiny, {}, tmp_path / "out.gguf", ExportKind.GGUF_F16)
    before, after = load_tokenizer(tiny), load_tokenizer(local_files(tmp_path / "out.gguf"))
    text = "<s>h\u00e9llo\n\U0001f600 world</s>"
    assert after.encode(text, add_special_tokens=True) == before.encode(text, add_special_tokens=True)
    assert (after.chat_template, after.eos_ids, after.bos_id) == (before.chat_template, before.eos_ids, before.bos_id)


@pytest.mark.parametrize("kind", [ExportKind.GGUF_F16, ExportKind.GGUF_Q8_0])
def test_gguf_and_from_gguf(tiny: ModelFiles, tmp_path: Path, kind: ExportKind) -> None:
    first = export(tiny, random_adapter(tiny), tmp_path / "first.gguf", kind)
    assert first.mean_difference < (0.01 if kind is ExportKind.GGUF_F16 else 0.15)
    source = local_files(tmp_path / "first.gguf")
    again = export(source, random_adapter(source, 0.05), tmp_path / "again.gguf", kind)
    assert again.survival > 0.9
    export(source, {}, tmp_path / "folder", ExportKind.FLOAT32)
    assert torch.allclose(peer_logits(tmp_path / "folder"), logits(source), atol=2e-3)
    before, after = load_tokenizer(source), load_tokenizer(local_files(tmp_path / "folder"))
    text = "<s>user: hi</s>"
    assert after.encode(text, add_special_tokens=True) == before.encode(text, add_special_tokens=True)
    assert (after.chat_template, after.eos_ids) == (before.chat_template, before.eos_ids)


class TestRefusals:
    def test_a_format_that_drops_the_change(self, tiny: ModelFiles, tmp_path: Path) -> None:
        rounded = tmp_path / "rounded"
        export(tiny, {}, rounded, ExportKind.BF16)
        files = local_files(rounded)
        with pytest.raises(JobError, match="keeps 0%") as caught:
            export(files, random_adapter(files, 1e-7), tmp_path / "out", ExportKind.BF16)
        assert caught.value.reason == "EXPORT_LOSSY" and not (tmp_path / "out").exists()
        export(files, random_adapter(files, 1e-7), tmp_path / "out", ExportKind.BF16, allow_loss=True)

    def test_what_is_there_stays(self, tiny: ModelFiles, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(JobError) as caught:
            export(tiny, {}, tmp_path / "out", ExportKind.FLOAT32)
        assert caught.value.reason == "EXPORT_EXISTS"

    def test_what_reads_back_differently(
        self, tiny: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def wrong(path: Path, tensors: object, **options: object) -> None:
            changed = ((n, t * 1.5 if "q_proj" in n else t) for n, t in tensors)  # type: ignore[attr-defined]
            write_gguf(path, changed, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(exporter, "write_gguf", wrong)
        with pytest.raises(JobError) as caught:
            export(tiny, random_adapter(tiny), tmp_path / "out.gguf", ExportKind.GGUF_F16)
        assert caught.value.reason == "EXPORT_DIFFERS"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]

    def test_another_model_s_adapter(self, tiny: ModelFiles, tmp_path: Path) -> None:
        deeper = local_files(save_tiny_llama(tmp_path / "deeper", layers=3))
        with pytest.raises(JobError) as caught:
            export(tiny, random_adapter(deeper), tmp_path / "out", ExportKind.FLOAT32)
        assert caught.value.reason == "ADAPTER_MISFIT" and not (tmp_path / "out").exists()

    def test_a_tokenizer_that_llama_cpp_does_not_know(self, tiny: ModelFiles, tmp_path: Path) -> None:
        other = byte_tokenizer()
        other.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        other.save(str(tiny.path / "tokenizer.json"))
        with pytest.raises(JobError) as caught:
            export(tiny, {}, tmp_path / "out.gguf", ExportKind.GGUF_F16)
        assert caught.value.reason == "UNSUPPORTED_TOKENIZER"


def test_values_beyond_float16(tiny: ModelFiles, tmp_path: Path) -> None:
    config = load_config(tiny)
    huge = [("model.embed_tokens.weight", torch.full((258, 64), 1e6))]
    with pytest.raises(JobError, match="beyond float16"):
        write_gguf(tmp_path / "x.gguf", huge, files=tiny, config=config, kind=GgufKind.F16)


def test_what_was_trained_on_nf4_is_merged_into_it(tiny: ModelFiles, tmp_path: Path) -> None:
    adapter = random_adapter(tiny)
    done = export(tiny, adapter, tmp_path / "out", ExportKind.FLOAT32, nf4=True)
    assert done.survival == pytest.approx(1.0) and done.mean_difference < 1e-4
    plain = export(tiny, adapter, tmp_path / "plain", ExportKind.FLOAT32)
    assert plain.mean_difference < 1e-4
    assert not torch.allclose(logits(local_files(tmp_path / "out")), logits(local_files(tmp_path / "plain")), atol=0.05)
