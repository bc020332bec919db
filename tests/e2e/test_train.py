"""The whole way of what `lmesh train` makes in a running mesh: an adapter served, exported, deleted; a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.text.resolve import local_files, resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.sources import ROOT
from tests.kernels.paged_runner import PagedRunner
from tests.mesh import MODEL, SOURCE, running_mesh

JOB = ROOT / "examples/jobs/lighthouse.yaml"
FULL = ROOT / "examples/jobs/lighthouse-full.yaml"
CPU = torch.device("cpu")


def test_a_trained_adapter_serves(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "run", "--model", f"{MODEL}={SOURCE}", LMESH_WORKER_KV_CACHE_BYTES="128MiB") as mesh:
        trained = mesh.cli("train", "-c", str(JOB), "--max-steps", "2", "--batch-size", "2", timeout=280)
        assert trained.returncode == 0, f"{trained.stdout}\n{trained.stderr}"
        assert "step 2/2  loss" in trained.stdout
        assert f"published: {MODEL}:lighthouse@1" in trained.stdout

        answer = mesh.cli("chat", f"{MODEL}:lighthouse", "-m", "Hello!", "--temperature", "0", "--max-tokens", "8")
        assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr

        assert f"{MODEL}:lighthouse@1" in mesh.cli("adapters").stdout
        exported = mesh.cli("export", "--adapter", "lighthouse", "--out", str(tmp_path / "out"))
        assert exported.returncode == 0, exported.stderr
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        again = mesh.cli("adapters", "publish", "again", "--folder", str(tmp_path / "out"), "--model", MODEL)
        assert (again.returncode, again.stdout.strip()) == (0, f"published {MODEL}:again@1"), again.stderr
        assert mesh.cli("adapters", "delete", "lighthouse").returncode == 0
        gone = mesh.cli("chat", f"{MODEL}:lighthouse", "-m", "Hello!")
        assert gone.returncode == 1, gone.stdout


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_whole_model_trained_from_a_gguf_file(tmp_path: Path) -> None:
    """Two steps of the example: the demo's model is a GGUF file, what is made of it is a Hugging Face folder."""
    out = tmp_path / "out"
    small = {"LMESH_WORKER_KV_CACHE_BYTES": "128MiB"}
    with running_mesh(tmp_path / "run", "--model", f"{MODEL}={SOURCE}", **small) as mesh:
        flags = ("--max-steps", "2", "--batch-size", "2", "--job-id", "keeper")
        trained = mesh.cli("train", "-c", str(FULL), *flags, timeout=600)
        assert trained.returncode == 0, f"{trained.stdout}\n{trained.stderr}"
        exported = mesh.cli(
            *("export", "--job", "keeper", "--format", "merged", "--dtype", "float32", "--out", str(out)), timeout=600
        )
        assert exported.returncode == 0, exported.stderr
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    written = local_files(out)
    ids = load_tokenizer(resolve(SOURCE)).encode(text, add_special_tokens=False)
    assert ids == AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert ids == load_tokenizer(written).encode(text, add_special_tokens=True)
    peer = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits[0]
    ours = PagedRunner(load_model(written, dtype=torch.float32, device=CPU)).full([ids])[0]
    assert float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()) < 1e-3
    base = PagedRunner(load_model(resolve(SOURCE), dtype=torch.float32, device=CPU)).full([ids])[0]
    assert float((ours - base).abs().max()) > 1e-3
    with running_mesh(tmp_path / "again", "--model", f"keeper={out}", **small) as mesh:
        answer = mesh.cli("chat", "keeper", "-m", "Hello!", "--temperature", "0", "--max-tokens", "8")
        assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
