"""Thirty updates beside transformers and PEFT, and what must not change a job: microbatches, packing, processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer.data.dataset import load_dataset
from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec, OptimiserSpec
from lmesh_trainer.vocabulary import added_tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, get_cosine_schedule_with_warmup

from tests import sharded_rank
from tests.kernels.tiny_families import Family, save_family
from tests.ranked_jobs import run_ranked, run_ranks
from tests.tiny_model import byte_tokenizer
from tests.training_jobs import TEMPLATE, run, save_dataset, save_model, spec

STEPS = 30
COURSE = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def peer_losses(peer: nn.Module, job: JobSpec) -> list[float]:
    """transformers' model over the same rows in the same order: padded, 4 microbatches an update, torch's AdamW with
    the groups that transformers' Trainer makes.
    """
    tokenizer = load_tokenizer(resolve(job.model), added_tokens(job))
    rows = load_dataset(job.dataset, tokenizer, context=512, seed=job.seed)
    decaying = set(Trainer.get_decay_parameter_names(None, peer))
    named = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    decayed = [p for name, p in named.items() if name in decaying]
    others = [p for name, p in named.items() if name not in decaying]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    told = job.optimiser
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=told.learning_rate, eps=told.adam_epsilon)
    course = get_cosine_schedule_with_warmup(adamw, told.warmup_steps, STEPS)
    losses = []
    for step in range(STEPS):
        taken = rows.step_rows(step, seed=job.seed, batch_size=job.batch_size)
        count = sum(row.trained_tokens for row in taken)
        total = 0.0
        for at in range(0, len(taken), -(-len(taken) // 4)):
            part = taken[at : at + -(-len(taken) // 4)]
            width = max(len(row.ids) for row in part)
            ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in part])
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in part])
            labels = torch.full_like(ids, -100)
            for line, row in zip(labels, part, strict=True):
                for i, (token, trained) in enumerate(zip(row.ids, row.trained, strict=True)):
                    line[i] = token if trained else -100
            loss = peer(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        course.step()
        adamw.zero_grad()
        losses.append(total)
    return losses


def load_peer(model: Path) -> nn.Module:
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peer.train()
    return peer


def beside_peft(
    model: Path, dataset: Path, tmp_path: Path, base: nn.Module, *, modules_to_save: tuple[str, ...] = ()
) -> tuple[JobSpec, nn.Module]:
    """A job, and PEFT's model with the same factors around `base`."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    start = peft.get_peft_model(load_peer(model), peft.LoraConfig(**settings))
    start.save_pretrained(tmp_path / "start")
    peer = peft.get_peft_model(base, peft.LoraConfig(**settings, modules_to_save=list(modules_to_save) or None))
    factors = {name: tensor for name, tensor in start.state_dict().items() if "lora_" in name}
    assert not peer.load_state_dict(factors, strict=False).unexpected_keys
    told = OptimiserSpec(learning_rate=2e-4, **COURSE)
    lora = LoraSpec(start=str(tmp_path / "start"), modules_to_save=modules_to_save)
    return spec(model, dataset, lora=lora, optimiser=told, max_steps=STEPS), peer


def test_an_adapter_learns_as_with_peft(model: Path, dataset: Path, tmp_path: Path) -> None:
    job, peer = beside_peft(model, dataset, tmp_path, load_peer(model))
    wanted, found = peer_losses(peer, job), run(job, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0]


@pytest.mark.parametrize("named", [("embed_tokens",), ("embed_tokens", "lm_head")])
def test_whole_modules_learn_as_with_peft(model: Path, dataset: Path, tmp_path: Path, named: tuple[str, ...]) -> None:
    job, peer = beside_peft(model, dataset, tmp_path, load_peer(model), modules_to_save=named)
    wanted, found = peer_losses(peer, job), run(job, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0]


def test_added_tokens_learn_as_with_peft(model: Path, dataset: Path, tmp_path: Path) -> None:
    """transformers' model resized, its new rows the mean of the others."""
    base = load_peer(model)
    base.resize_token_embeddings(260, mean_resizing=False)
    with torch.no_grad():
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            module.weight[258:] = module.weight[:258].mean(0)
    both = ("embed_tokens", "lm_head")
    job, peer = beside_peft(model, dataset, tmp_path, base, modules_to_save=both)
    added = msgspec.structs.replace(job, add_tokens=("surely",), add_special_tokens=("please",))
    plain = run(job, tmp_path / "plain").losses
    wanted, found = peer_losses(peer, added), run(added, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0] and found[0] != pytest.approx(plain[0], abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_biases_stay_frozen_or_learn_undecayed(dataset: Path, tmp_path: Path, method: str) -> None:
    """Qwen 2 has biases on q, k and v, inside the fused product: an adapter leaves them, a whole model trains them."""
    shape = {"vocab_size": 258, "max_position_embeddings": 512}
    model = save_family(Family("qwen2", "qwen2", shape), tmp_path / "base")
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    if method == "lora":
        job, peer = beside_peft(model, dataset, tmp_path, load_peer(model))
    else:
        told = OptimiserSpec(learning_rate=1e-3, **COURSE)  # enough for the decay to show
        job, peer = spec(model, dataset, method="full", optimiser=told, max_steps=STEPS), load_peer(model)
    wanted, found = peer_losses(peer, job), run(job, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0]
    before = load_file(model / "model.safetensors")
    if method == "full":
        after = load_file(tmp_path / "job" / "model" / "model.safetensors")
        theirs = dict(peer.named_parameters())
        for name in [name for name in before if name.endswith(("bias", "norm.weight"))]:
            assert not torch.equal(after[name], before[name])
            assert torch.allclose(after[name], theirs[name], atol=2e-4), name


def test_a_whole_model_learns_as_with_transformers(model: Path, dataset: Path, tmp_path: Path) -> None:
    told = OptimiserSpec(learning_rate=1e-5, **COURSE)
    job = spec(model, dataset, method="full", optimiser=told, max_steps=STEPS)
    wanted, found = peer_losses(load_peer(model), job), run(job, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0]


@pytest.mark.parametrize("options", [{}, {"method": "full"}, {"lora": LoraSpec(lora_dropout=0.3)}])
def test_how_rows_are_cut_into_microbatches_changes_nothing(
    model: Path, dataset: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    told = OptimiserSpec(learning_rate=1e-3, **COURSE)
    whole, apart = (
        run(spec(model, dataset, batch_size=8, optimiser=told, micro_tokens=tokens, **options), tmp_path / str(tokens))
        for tokens in (100_000, 1)
    )
    assert len(whole.losses) == 20 and whole.losses == pytest.approx(apart.losses, abs=1e-4)


@pytest.mark.parametrize("lora", [LoraSpec(), LoraSpec(lora_dropout=0.3)], ids=["plain", "dropout"])
def test_recomputing_changes_no_bit_of_a_job(model: Path, dataset: Path, tmp_path: Path, lora: LoraSpec) -> None:
    kept, *others = (
        run(spec(model, dataset, max_steps=5, lora=lora, recompute=policy), tmp_path / policy)
        for policy in ("none", "selective", "full", "offload")
    )
    assert len(kept.losses) == 5 and kept.ended.outcome == "completed"
    tensors = published(tmp_path / "none")
    for policy, again in zip(("selective", "full", "offload"), others, strict=True):
        assert kept.losses == again.losses, policy
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in published(tmp_path / policy).items()), policy


KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"lora": LoraSpec(lora_dropout=0.1)},
    "added tokens": {"add_tokens": ("surely",)},
    "full": {"method": "full"},
    "nf4": {"load_in_4bit": True},
}


def published(folder: Path) -> dict[str, Tensor]:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(file)


def test_two_processes_learn_as_one(model: Path, dataset: Path, tmp_path: Path) -> None:
    told = OptimiserSpec(learning_rate=1e-3, **COURSE)
    jobs = {kind: spec(model, dataset, optimiser=told, max_steps=10, **options) for kind, options in KINDS.items()}
    ranks = run_ranked(tmp_path / "both", jobs)
    for kind, job in jobs.items():
        alone = run(job, tmp_path / "alone" / kind)
        assert len(alone.losses) == 10 and alone.losses[-1] < alone.losses[0]
        for rank in ranks:
            assert rank[kind].outcome == "completed"
            assert rank[kind].losses == pytest.approx(alone.losses, abs=1e-4), kind
        tensors, others = published(tmp_path / "alone" / kind), published(tmp_path / "both" / kind)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, others[name], atol=1e-4), (kind, name)


def test_gradients_of_two_processes_are_those_of_one(model: Path, dataset: Path, tmp_path: Path) -> None:
    jobs = {kind: spec(model, dataset, micro_tokens=90, **options) for kind, options in KINDS.items()}
    sharded_rank.write(jobs, tmp_path, "ddp")
    run_ranks(sharded_rank.__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"measured.{rank}") for rank in (0, 1)]
    for kind, job in jobs.items():
        alone = sharded_rank.measure(job)
        for measured in ranks:
            sharded_rank.assert_same_gradients(alone, measured[kind], kind)
            assert measured[kind]["held"] == alone["held"]  # each has the model whole


def test_the_same_seed_gives_the_same_job(model: Path, dataset: Path, tmp_path: Path) -> None:
    rows = DatasetSpec(source=str(dataset), eval_rows=3)
    first, second, other = (
        run(spec(model, dataset, dataset=rows, max_steps=3, seed=seed), tmp_path / str(number))
        for number, seed in enumerate((5, 5, 6))
    )
    assert first.losses == second.losses != other.losses
