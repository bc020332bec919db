"""A mesh of real processes with mutual TLS on every link, TLS and API keys for its callers, from the launcher on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.certificates import Authority
from tests.mesh import MODEL, SOURCE, run_cli, running_mesh

QUESTION = ("chat", "-m", "What is the capital of France?", "--temperature", "0", "--max-tokens", "16")


def secured(folder: Path) -> tuple[dict[str, str], str]:
    """Settings of all services and of the command, and one more certificate's CA that is not the mesh's."""
    authority, other = Authority(folder / "ca"), Authority(folder / "other")
    pair = authority.issue("mesh", "127.0.0.1")
    files = {"TLS_CERT_FILE": pair.cert, "TLS_KEY_FILE": pair.key, "TLS_CA_FILE": authority.ca}
    env = {f"LMESH_{name}": path for name, path in files.items()}
    for service in ("GATEWAY", "SCHEDULER", "WORKER", "TRAINER"):
        env |= {f"LMESH_{service}_{name}": path for name, path in files.items()}
    env |= {f"LMESH_{service}_TLS_REQUIRE_CLIENT_CERT": "true" for service in ("SCHEDULER", "WORKER")}
    return env, other.ca


def test_keys_and_mutual_tls(tmp_path: Path) -> None:
    tls, foreign_ca = secured(tmp_path)
    drawn = run_cli(dict(os.environ), "key")
    key, line = drawn.stdout.split("\n")[:2]
    assert key.startswith("lmk_") and key not in line
    (tmp_path / "tenants.toml").write_text(f"[tenants.acme]\n{line}\n")
    env = {
        **tls,
        "LMESH_GATEWAY_TENANTS_FILE": str(tmp_path / "tenants.toml"),
        "LMESH_API_KEY": key,
        "LMESH_WORKER_KV_CACHE_BYTES": "128MiB",
    }
    with running_mesh(tmp_path / "run", "--model", f"{MODEL}={SOURCE}", **env) as mesh:
        answer = mesh.cli(*QUESTION)
        assert answer.returncode == 0, answer.stderr
        assert "Paris" in answer.stdout
        known = json.loads(mesh.cli("status", "--json").stdout)
        assert known["up"] and [(w["id"], w["state"]) for w in known["workers"]] == [("worker-0", "ok")]
        assert known["addresses"]["http"].startswith("https://")

        stranger = run_cli({**mesh.env, "LMESH_API_KEY": "lmk_of-somebody-else"}, *QUESTION)
        assert (stranger.returncode, "UNAUTHENTICATED" in stranger.stderr) == (1, True)
        assert "somebody-else" not in stranger.stderr
        keyless = run_cli({k: v for k, v in mesh.env.items() if k != "LMESH_API_KEY"}, *QUESTION)
        assert (keyless.returncode, "UNAUTHENTICATED" in keyless.stderr) == (1, True)
        misled = run_cli({**mesh.env, "LMESH_TLS_CA_FILE": foreign_ca}, *QUESTION)
        assert (misled.returncode, "no gateway answers" in misled.stderr) == (1, True)
        # Without a certificate of its own the command does not get into the scheduler, only into the gateway.
        bare = {k: v for k, v in mesh.env.items() if k not in ("LMESH_TLS_CERT_FILE", "LMESH_TLS_KEY_FILE")}
        assert "Paris" in run_cli(bare, *QUESTION).stdout
        assert json.loads(run_cli(bare, "status", "--json").stdout)["workers"] == []

        logged = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.log*"))
        assert "ready" in logged
        assert key not in logged and "somebody-else" not in logged
