"""Thirty updates beside transformers and PEFT, and what must not change a job: microbatches, packing, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from tests.training_jobs import run, save_dataset, save_model, spec

STEPS = 30
COURSE = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def peer_losses(peer: nn.Module, job: JobSpec) -> list[float]:
    """transformers' model over the same rows in the same order: padded, 4 microbatches an update, torch's AdamW."""
    tokenizer = load_tokenizer(resolve(job.model))
    rows = load_dataset(job.dataset, tokenizer, context=512, seed=job.seed)
    decayed = [p for p in peer.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in peer.parameters() if p.requires_grad and p.dim() == 1]
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


def test_an_adapter_learns_as_with_peft(model: Path, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peer = peft.get_peft_model(load_peer(model), settings)
    peer.save_pretrained(tmp_path / "start")
    told = OptimiserSpec(learning_rate=2e-4, **COURSE)
    job = spec(model, dataset, lora=LoraSpec(start=str(tmp_path / "start")), optimiser=told, max_steps=STEPS)
    wanted, found = peer_losses(peer, job), run(job, tmp_path / "job").losses
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(found) == STEPS and found[-1] < found[0]


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


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_bit_of_a_job(model: Path, dataset: Path, tmp_path: Path, recompute: str) -> None:
    kept = run(spec(model, dataset, max_steps=5, recompute="none"), tmp_path / "kept")
    again = run(spec(model, dataset, max_steps=5, recompute=recompute), tmp_path / "again")
    assert kept.losses == again.losses


RANK = """
import json, sys, msgspec, torch.distributed as dist
from pathlib import Path
from tests.training_jobs import run
from lmesh_trainer.spec import read_spec
dist.init_process_group("gloo")
heard = run(read_spec(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
Path(sys.argv[3] + f".{dist.get_rank()}").write_text(json.dumps(heard.losses))
dist.destroy_process_group()
"""


def test_two_processes_learn_as_one(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = spec(model, dataset, optimiser=OptimiserSpec(learning_rate=1e-3, **COURSE))
    alone = run(job, tmp_path / "alone")
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(job))
    (tmp_path / "rank.py").write_text(RANK)
    root = Path(__file__).resolve().parents[2]
    arguments = [str(tmp_path / name) for name in ("rank.py", "spec.json", "both", "losses")]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        losses = json.loads((tmp_path / f"losses.{rank}").read_text())
        assert losses == pytest.approx(alone.losses, abs=1e-4)
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("alone", "both"))
    tensors, others = load_file(one), load_file(two)
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], atol=1e-4), name


def test_the_same_seed_gives_the_same_job(model: Path, dataset: Path, tmp_path: Path) -> None:
    rows = DatasetSpec(source=str(dataset), eval_rows=3)
    first, second, other = (
        run(spec(model, dataset, dataset=rows, max_steps=3, seed=seed), tmp_path / str(number))
        for number, seed in enumerate((5, 5, 6))
    )
    assert first.losses == second.losses != other.losses
