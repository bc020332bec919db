"""The committed generated code is what the pinned tools make of the protos, and the protos keep their house rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.contract.sources import ROOT

PROTOS = ROOT / "protos"
BUF = Path(sys.executable).parent / "buf"


def proto_files() -> list[str]:
    return sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "lmesh").rglob("*.proto"))


def test_generated_code_is_current(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", "-I.", *outputs, *proto_files()]
    # The mypy plugins are programs beside this interpreter.
    done = subprocess.run(command, cwd=PROTOS, capture_output=True, text=True, env={"PATH": str(BUF.parent)})
    assert done.returncode == 0, done.stderr
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*") if p.is_file()}
    committed = PROTOS / "python"
    kept = {p.relative_to(committed) for p in committed.rglob("*_pb2*.py*") if "__pycache__" not in p.parts}
    assert kept == set(fresh), "`make gen` was not run after a proto came or went"
    stale = [str(name) for name, text in fresh.items() if (committed / name).read_text() != text]
    assert not stale, f"`make gen` was not run: {stale}"


def test_buf_lint_and_format() -> None:
    for command in (["lint"], ["format", "--diff", "--exit-code"]):
        done = subprocess.run([str(BUF), *command], cwd=PROTOS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_protos_import_only_google_protobuf_and_their_own() -> None:
    for name in proto_files():
        for line in (PROTOS / name).read_text().splitlines():
            if line.startswith("import "):
                assert line.startswith(('import "google/protobuf/', 'import "lmesh/')), f"{name}: {line}"
