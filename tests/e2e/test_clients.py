"""The example clients, as a person would run them, against a running mesh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mesh import MODEL, SOURCE, Mesh, running_mesh

CLIENTS = Path(__file__).parents[2] / "clients"
ANSWER = "The capital of France is Paris."
USAGE = re.compile(r"^usage: prompt=37 \(cached \d+\) new=8$", re.MULTILINE)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(tmp_path_factory.mktemp("run"), "--model", f"{MODEL}={SOURCE}") as running:
        yield running


def python_client(_: Path) -> list[str]:
    return [sys.executable, "-P", str(CLIENTS / "python/lmesh_client.py")]


def node_client(folder: Path) -> list[str]:
    """The client in a copy of its folder, installed there by its lock file; the protos stay where they are."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no Node.js on this machine")
    home = folder / "clients/node"
    shutil.copytree(CLIENTS / "node", home, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "protos").symlink_to(CLIENTS.parent / "protos")
    install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(install, cwd=home, capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"npm ci failed: {done.stderr.strip().splitlines()[-1:]}")
    return ["node", str(home / "lmesh_client.mjs")]


def shell_client(_: Path) -> list[str]:
    if shutil.which("jq") is None:
        pytest.skip("no jq on this machine")
    return [str(CLIENTS / "buf-curl/lmesh.sh")]


@pytest.fixture(scope="module", params=[python_client, node_client, shell_client])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return request.param(tmp_path_factory.mktemp("client"))


def run(client: list[str], mesh: Mesh, command: str) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent  # where buf is
    env = os.environ | {"LMESH_TARGET": mesh.target, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run([*client, command], env=env, capture_output=True, text=True, timeout=120)


def test_lists_models(client: list[str], mesh: Mesh) -> None:
    done = run(client, mesh, "models")
    assert (done.returncode, done.stdout) == (0, f"{MODEL}: context 8192, workers 1\n"), done.stderr


def test_streams_an_answer_and_its_usage(client: list[str], mesh: Mesh) -> None:
    done = run(client, mesh, "chat")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ANSWER}\nusage:")
    assert USAGE.search(done.stdout)


def test_reads_a_refusals_reason(client: list[str], mesh: Mesh) -> None:
    done = run(client, mesh, "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("error: NOT_FOUND reason=MODEL_NOT_FOUND")
    assert "no worker serves 'no-such-model'" in done.stdout


def test_cancels(client: list[str], mesh: Mesh) -> None:
    done = run(client, mesh, "cancel")
    assert done.returncode == 0, done.stderr
    assert re.search("CANCELL?ED", done.stdout)


def test_resumes_at_its_cursor(client: list[str], mesh: Mesh) -> None:
    done = run(client, mesh, "resume")
    if "reason=NOT_SUPPORTED" in done.stdout + done.stderr:
        pytest.skip("this gateway does not serve Resume")
    assert done.returncode == 0, done.stdout + done.stderr
    text = re.sub(r"\n-- lost the stream after \d+ tokens --\n", "", done.stdout)
    assert text.startswith(f"{ANSWER}\nusage:")
