"""What the pages name exists: files, functions, make targets, lmesh commands and options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer.main
from lmesh_cli.app import app

from tests.contract.sources import ROOT, tracked, tree

PAGES = [ROOT / p for p in tracked() if p.suffix == ".md" and p.parts[0] in ("README.md", "CONTRIBUTING.md", "docs")]
SUFFIXES = (".py", ".md", ".toml", ".txt", ".proto", ".yaml", ".csv")
# A step of a life: the file, then its functions or methods, as in `lmesh_gateway/generate.py` `Generation.run`.
STEP = re.compile(r"`([\w.-]+/[\w/.-]+\.py)`((?:,?\s+`[A-Za-z_]\w*(?:\.\w+)*`)+)")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def locate(name: str, page: Path) -> Path | None:
    """The file or folder that a page means: from the root, from the page, or from a package's parent folder."""
    homes = [ROOT, page.parent, ROOT / "kernels", ROOT / "cli", ROOT / "services", *(ROOT / "services").iterdir()]
    return next((home / name for home in homes if (home / name).exists()), None)


def names_in(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as Class.method."""
    found: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/life-of-a-request.md"} <= {ids(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    # A bare `config.py` speaks of every service's.
    quoted = {q for q in re.findall(r"`([\w./-]+)`", text) if q.endswith((*SUFFIXES, "/"))}
    quoted = {q for q in quoted if "/" in q or not q.endswith(".py")}
    linked = {link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not link.startswith("http")}
    missing = sorted(name for name in quoted | linked if locate(name, page) is None)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_functions_exist(page: Path) -> None:
    for file, functions in STEP.findall(page.read_text()):
        path = locate(file, page)
        assert path is not None, file
        missing = set(re.findall(r"`([^`]+)`", functions)) - names_in(path)
        assert not missing, f"{file} has no {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert target in targets, f"make {target}"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, rest in re.findall(r"(?:`|bin/)lmesh ([a-z]+)([^`\n]*)", page.read_text(), re.MULTILINE):
        assert name in commands, f"lmesh {name}"
        command, word = commands[name], rest.split()[0] if rest.split() else ""
        if word.isalpha() and word.islower() and hasattr(command, "commands"):  # as in `lmesh jobs watch`
            assert word in command.commands, f"lmesh {name} {word}"
            command = command.commands[word]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<![\w-])(--[a-z-]+)", rest):
            assert option in known, f"lmesh {name} {option}"


def test_life_of_a_request_names_every_part() -> None:
    steps = STEP.findall((ROOT / "docs/life-of-a-request.md").read_text())
    packages = {file.split("/")[0] for file, _ in steps}
    assert packages >= {"lmesh_gateway", "lmesh_scheduler", "lmesh_worker", "lmesh_kernels"}
