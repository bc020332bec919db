"""Rules of the house that hold over all sources: who may import what, what may be named how, how long a file may be."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.sources import PACKAGES, ROOT, hand_written, product_files, tree

MOST_LINES = 400
FORBIDDEN_STEMS = {"common", "utils", "util", "misc", "helpers", "helper"}
# Nothing of these loads torch. Of the worker it is the server process; the engine process is where torch lives.
TORCH_FREE = (
    "lmesh_kernels.text",
    "lmesh_kernels.blocks",
    "lmesh_chassis",
    "lmesh_gateway",
    "lmesh_scheduler",
    "lmesh_cli",
)
TORCH_FREE_WORKER = ("lmesh_worker.__main__", "lmesh_worker.servicer", "lmesh_worker.engine_client")
TORCH_FREE_TRAINER = ("lmesh_trainer.__main__",)  # its jobs and queries have processes of their own


def python(code: str, *args: str) -> str:
    """Output of a fresh interpreter in the repository's root, which -P keeps off sys.path."""
    command = [sys.executable, "-P", "-c", code, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_under(name: str) -> list[str]:
    """A module or, for a package, all modules in it except the ones that run a program when imported."""
    folder = PACKAGES[name.split(".")[0]].joinpath(*name.split(".")[1:])
    if not folder.is_dir():
        return [name]
    found = [m.name for m in pkgutil.walk_packages([str(folder)], f"{name}.")]
    return [name, *found]


def test_nothing_above_the_line_loads_torch() -> None:
    names = [module for name in TORCH_FREE for module in modules_under(name)]
    names += [*TORCH_FREE_WORKER, *TORCH_FREE_TRAINER]
    code = (
        "import importlib, json, sys\nguilty = None\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [t for t in ('torch', 'transformers') if t in sys.modules]\n"
        "    guilty = guilty or (heavy and f'{name} loads {heavy}') or None\n"
        "print(json.dumps(guilty))"
    )
    assert json.loads(python(code, *names)) is None


def test_text_does_without_grpc() -> None:
    code = "import lmesh_kernels.text.tokenizer, lmesh_kernels.blocks, sys; print('grpc' in sys.modules)"
    assert python(code).strip() == "False"


class TestKernelsFolder:
    """transformers looks for a package named `kernels`; ours must never be taken for it."""

    def test_is_no_package(self) -> None:
        assert not (ROOT / "kernels" / "__init__.py").exists()

    def test_is_not_found_from_the_root(self) -> None:
        assert python("import importlib.util; print(importlib.util.find_spec('kernels'))").strip() == "None"

    def test_transformers_does_not_load_ours(self) -> None:
        code = "import sys, transformers.modeling_utils; print([m for m in sys.modules if m.startswith('lmesh')])"
        assert python(code).strip() == "[]"


def test_messages_stay_at_the_edge() -> None:
    """Only servicers, links and `wire` files know the messages; what wires a server up may name its stub."""
    for path in product_files():
        if path.stem.startswith("servicer") or path.stem.endswith(("_servicer", "_link", "wire")):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmesh."):
                guilty = [alias.name for alias in node.names if alias.name.endswith("_pb2")]
                assert not guilty, f"{path.relative_to(ROOT)} imports {guilty}"


@pytest.mark.parametrize("path", hand_written(), ids=str)
def test_file_size_and_name(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= MOST_LINES
    assert path.stem not in FORBIDDEN_STEMS


def test_product_files_say_what_they_are_for() -> None:
    silent = [p for p in product_files() if p.read_text().strip() and not ast.get_docstring(tree(p))]
    assert not silent


def test_import_rules() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
