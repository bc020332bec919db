"""The whole way of an adapter: trained by `lmesh train` in a running mesh, served, listed, exported, deleted."""

from __future__ import annotations

from pathlib import Path

from tests.contract.sources import ROOT
from tests.mesh import MODEL, SOURCE, running_mesh

JOB = ROOT / "examples/jobs/lighthouse.yaml"


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
