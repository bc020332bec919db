"""Models that jobs make: what was trained is what is written, served and loaded by transformers, tokenizer and all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.models.home import ResidentHome
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.text.digests import model_digest
from lmesh_kernels.text.gguf_metadata import read_metadata
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer import events
from lmesh_trainer.errors import JobError
from lmesh_trainer.events import Outcome
from lmesh_trainer.export.exporter import ExportKind, export
from lmesh_trainer.job import check_job
from lmesh_trainer.messages import Wish
from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec
from lmesh_trainer.subject import Subject, make_subject
from lmesh_trainer.vocabulary import added_tokens, growth, trained_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.kernels.paged_runner import CPU, PagedRunner
from tests.kernels.tiny_families import Family, save_family
from tests.tiny_model import byte_tokenizer
from tests.training_jobs import TEMPLATE, After, Heard, run, save_dataset, save_model, spec

NEW: dict[str, Any] = {"add_tokens": ("<place>", "surely"), "add_special_tokens": ("<|lamp|>",)}
TEXT = "user: surely<place> <|lamp|>h\u00e9re</s>"
BOTH = LoraSpec(r=4, modules_to_save=("embed_tokens", "lm_head"))
SHAPE = {"vocab_size": 258, "max_position_embeddings": 512}


def with_tokenizer(folder: Path) -> Path:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@dataclass(frozen=True)
class Case:
    """A job's settings on one of the bases."""

    base: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "head": Case(options={"lora": LoraSpec(r=4, modules_to_save=("lm_head",))}),
    "embedding, DoRA": Case(options={"lora": LoraSpec(r=4, use_dora=True, modules_to_save=("embed_tokens",))}),
    "tied": Case("tied", {"lora": BOTH}),
    "added": Case(options=NEW),
    "added, tied": Case("tied", NEW),
    "added, biases": Case("qwen2", NEW),
    "added, NF4": Case(options={**NEW, "load_in_4bit": True}),
    "full": Case("qwen2", {"method": "full"}),
    "full, added": Case("tied", {"method": "full", **NEW}),
    "GGUF, full": Case("gguf", {"method": "full"}),
    "GGUF, full, added": Case("gguf", {"method": "full", **NEW}),
    "GGUF, both": Case("gguf", {"lora": BOTH}),
    "GGUF, added, tied": Case("gguf-tied", NEW),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    tied = Family("tied", "llama", {**SHAPE, "tie_word_embeddings": True})
    qwen2 = Family("qwen2", "qwen2", {**SHAPE, "tie_word_embeddings": False})
    found = {
        "plain": save_model(place / "plain"),
        "tied": with_tokenizer(save_family(tied, place / "tied")),
        "qwen2": with_tokenizer(save_family(qwen2, place / "qwen2")),
        "gguf": place / "plain.gguf",
        "gguf-tied": place / "tied.gguf",
    }
    for name in ("plain", "tied"):
        export(local_files(found[name]), {}, place / f"{name}.gguf", ExportKind.GGUF_F16)
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def subject_of(told: JobSpec, files: ModelFiles, precision: Precision = Precision.FLOAT32) -> Subject:
    """The job's subject, every one of its parameters moved as training might."""
    decoder = load_model(
        files,
        dtype=precision.dtype,
        device=CPU,
        quantisation="nf4" if told.load_in_4bit else None,
        growth=growth(told, files),
    )
    subject = make_subject(told, ResidentHome(decoder), files, precision=precision, recompute=Recompute.NONE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in subject.parameters:
            parameter.master.add_(0.05 * torch.randn(parameter.master.shape, generator=generator))
        subject.parameters.publish()
    return subject


def published(subject: Subject, place: Path) -> str:
    return subject.publish(place / "model", subject.parameters.wholes())


def logprobs(logits: Tensor, ids: list[int]) -> Tensor:
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_made_is_what_was_trained(case: Case, bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    files = local_files(bases[case.base])
    told = spec(bases[case.base], dataset, **case.options)
    subject = subject_of(told, files)
    tokenizer = load_tokenizer(files, added_tokens(told))
    ids = tokenizer.encode(TEXT * 3, add_special_tokens=False)
    assert len([i for i in ids if i >= 258]) == (9 if "add_tokens" in case.options else 0)
    trained = subject.training.logprobs(pack_batch([Segment(row=0, ids=ids, weights=[1.0] * len(ids))], CPU))[:-1]
    digest = published(subject, tmp_path)
    written = local_files(tmp_path / "model")
    assert digest == model_digest(written)
    served = logprobs(PagedRunner(load_model(written, dtype=torch.float32, device=CPU)).full([ids])[0], ids)
    assert float((served - trained).abs().max()) < 1e-4
    peer = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32, attn_implementation="eager")
    assert peer.config.vocab_size == trained_config(told, files).vocab_size
    with torch.no_grad():
        theirs = logprobs(peer(torch.tensor([ids])).logits[0], ids)
    assert float((theirs - trained).abs().max()) < 1e-4
    assert_same_text(tokenizer.encode(TEXT, add_special_tokens=False), files, written)


def assert_same_text(ids: list[int], files: ModelFiles, written: ModelFiles) -> None:
    theirs = AutoTokenizer.from_pretrained(written.path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
    before, after = load_tokenizer(files), load_tokenizer(written)
    assert after.encode(TEXT, add_special_tokens=False) == ids
    assert (after.chat_template, after.eos_ids) == (before.chat_template, before.eos_ids)
    assert after.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_gguf_file_s_beginning_of_text(bases: dict[str, Path], dataset: Path, tmp_path: Path, adds_bos: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["plain"], base)
    told = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(told | {"add_bos_token": adds_bos}))
    export(local_files(base), {}, tmp_path / "base.gguf", ExportKind.GGUF_F16)
    files = local_files(tmp_path / "base.gguf")
    published(subject_of(spec(base, dataset, method="full", **NEW), files), tmp_path)
    ids = load_tokenizer(files, added_tokens(spec(base, dataset, **NEW))).encode(TEXT, add_special_tokens=True)
    assert (ids[0] == 256) is adds_bos
    assert load_tokenizer(local_files(tmp_path / "model")).encode(TEXT, add_special_tokens=True) == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT)["input_ids"] == ids


def test_spare_rows_in_a_gguf_file(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    """A checkpoint with room for tokens that it does not have; llama.cpp wants a token for each row."""
    spare = Family("spare", "llama", {**SHAPE, "vocab_size": 272})
    files = local_files(with_tokenizer(save_family(spare, tmp_path / "base")))
    told = spec(files.path, dataset, **NEW)
    assert trained_config(told, files).vocab_size == 272
    published(subject_of(told, files), tmp_path)
    export(local_files(tmp_path / "model"), {}, tmp_path / "out.gguf", ExportKind.GGUF_F16)
    metadata = read_metadata(tmp_path / "out.gguf")
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 272
    wanted = load_tokenizer(local_files(tmp_path / "model")).encode(TEXT, add_special_tokens=False)
    assert load_tokenizer(local_files(tmp_path / "out.gguf")).encode(TEXT, add_special_tokens=False) == wanted


def test_other_lists_of_tokens_have_them_too(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["plain"], base)
    told = json.loads((base / "tokenizer_config.json").read_text())
    listed = {str(i): {"content": text, "special": True} for i, text in ((256, "<s>"), (257, "</s>"))}
    (base / "tokenizer_config.json").write_text(json.dumps(told | {"added_tokens_decoder": listed}))
    (base / "added_tokens.json").write_text('{"<s>": 256, "</s>": 257}')
    made = spec(base, dataset, **NEW)
    published(subject_of(made, local_files(base)), tmp_path)
    found = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {number: (told["content"], told["special"]) for number, told in found.items()} == {
        "256": ("<s>", True),
        "257": ("</s>", True),
        "258": ("<place>", False),
        "259": ("surely", False),
        "260": ("<|lamp|>", True),
    }
    assert json.loads((tmp_path / "model" / "added_tokens.json").read_text())["<|lamp|>"] == 260
    tokenizer = load_tokenizer(local_files(base), added_tokens(made))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert_same_text(ids, local_files(base), local_files(tmp_path / "model"))


def test_a_checkpoint_in_nf4_is_made_into_a_dense_one(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["plain"], base)
    import bitsandbytes.functional as bnb

    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
        tensors |= {name: packed, **{f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}}
    save_file(tensors, base / "model.safetensors")
    told = json.loads((base / "config.json").read_text())
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(told | {"quantization_config": nf4}))
    subject = subject_of(spec(base, dataset, lora=BOTH), local_files(base))
    published(subject, tmp_path)
    ids = list(range(60, 140))
    trained = subject.training.logprobs(pack_batch([Segment(row=0, ids=ids, weights=[1.0] * len(ids))], CPU))[:-1]
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert getattr(peer.config, "quantization_config", None) is None
    with torch.no_grad():
        theirs = logprobs(peer(torch.tensor([ids])).logits[0], ids)
    assert float((theirs - trained).abs().max()) < 1e-4


def test_bf16_is_written_as_bf16(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    told = spec(bases["plain"], dataset, **NEW, precision="bf16")
    subject = subject_of(told, local_files(bases["plain"]), Precision.BF16)
    published(subject, tmp_path)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(tensors["lm_head.weight"], subject.parameters["head.weight"].trained.value)


@pytest.mark.parametrize("options", [NEW, {"lora": BOTH, "load_in_4bit": True}, {"method": "full"}])
def test_a_resumed_job_makes_the_same_model(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = bases["gguf" if "method" in options else "plain"]
    told = spec(base, dataset, max_steps=6, **options)
    whole = run(told, tmp_path / "whole")
    assert whole.ended.outcome is Outcome.COMPLETED, whole.ended
    broken = run(told, tmp_path / "parts", After(3, Wish.STOP))
    rest = run(told, tmp_path / "parts")
    assert broken.losses + rest.losses == whole.losses and whole.losses[-1] < whole.losses[0]
    (one,), (other,) = (heard.of(events.Published) for heard in (whole, rest))
    assert one.digest == other.digest and Path(one.folder).name == "model"
    manifest = json.loads((Path(one.folder) / "lmesh_manifest.json").read_text())
    assert manifest["digest"] == one.digest and manifest["method"] == told.method


def test_rows_are_shown_with_the_added_tokens(bases: dict[str, Path], dataset: Path) -> None:
    heard = Heard()
    check_job(spec(bases["plain"], dataset, **NEW), heard)
    (ready,), (plan,) = heard.of(events.DatasetReady), heard.of(events.PlanMade)
    assert [(t.id, t.text, t.trained) for t in ready.preview[0] if t.id >= 258] == [(259, "surely", True)]
    plain = Heard()
    check_job(spec(bases["plain"], dataset), plain)
    before = plain.of(events.PlanMade)[0]
    assert plan.trained_parameters == before.trained_parameters + 2 * 261 * 64
    # The matrices are the model's own: only the adapter's values come on top.
    assert plan.lines["trained values and masters"] == before.lines["trained values and masters"]
    assert plan.lines["weights"] > before.lines["weights"]


@pytest.mark.parametrize("options", [{"lora": BOTH}, {"method": "full"}, NEW])
def test_continued_pretraining(bases: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Plain text, all of it trained."""
    lines = [json.dumps({"text": f"the lamp turns {i} times, surely, and the sea is dark"}) for i in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    rows = DatasetSpec(source=str(tmp_path / "text.jsonl"), format="text")
    told = spec(bases["tied"], tmp_path, dataset=rows, **options)
    heard = run(told, tmp_path / "job")
    assert heard.ended.outcome is Outcome.COMPLETED, heard.ended
    (ready,) = heard.of(events.DatasetReady)
    # A row's first token has nothing before it to be guessed from.
    assert ready.rows == 12 and all(token.trained for row in ready.preview for token in row[1:])
    assert heard.losses[-1] < 0.5 * heard.losses[0]
    (made,) = heard.of(events.Published)
    AutoModelForCausalLM.from_pretrained(made.folder)


def test_a_token_that_is_there_is_refused(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    told = spec(bases["gguf"], dataset, add_tokens=("<new>", "</s>"))
    ended = run(told, tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, "BAD_ADDED_TOKENS")
    assert "'</s>' (id 257)" in ended.message
    with pytest.raises(JobError, match="</s>"):
        check_job(told, Heard())


@pytest.mark.parametrize("options", [{"method": "full"}, {"lora": BOTH}, NEW])
def test_what_could_not_be_written_is_refused_at_once(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    stretched = save_family(Family("l3", "llama", {**SHAPE, "rope_parameters": llama3}), tmp_path / "base")
    export(local_files(with_tokenizer(stretched)), {}, tmp_path / "base.gguf", ExportKind.GGUF_F16)
    heard = run(spec(tmp_path / "base.gguf", dataset, **options), tmp_path / "job")
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "NOT_SUPPORTED")
    assert not heard.of(events.PlanMade)
    adapter = run(spec(tmp_path / "base.gguf", dataset, max_steps=1), tmp_path / "adapter")
    assert adapter.ended.outcome is Outcome.COMPLETED  # an adapter needs no config


def test_other_tokens_are_another_job(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    told = spec(bases["plain"], dataset, **NEW)
    run(told, tmp_path / "job", After(2, Wish.STOP))
    other = msgspec.structs.replace(told, add_tokens=("<place>",))
    assert run(other, tmp_path / "job").ended.reason == "CHECKPOINT_MISMATCH"
