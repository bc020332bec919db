"""The hand-written sources of the workspace, for tests about all of them."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "lmesh_kernels": ROOT / "kernels/lmesh_kernels",
    "lmesh_chassis": ROOT / "services/chassis/lmesh_chassis",
    "lmesh_gateway": ROOT / "services/gateway/lmesh_gateway",
    "lmesh_scheduler": ROOT / "services/scheduler/lmesh_scheduler",
    "lmesh_worker": ROOT / "services/worker/lmesh_worker",
    "lmesh_trainer": ROOT / "services/trainer/lmesh_trainer",
    "lmesh_cli": ROOT / "cli/lmesh_cli",
}
SERVICES = {name: path for name, path in PACKAGES.items() if path.parent.parent.name == "services"}


@cache
def tracked() -> tuple[Path, ...]:
    """Files that belong to the repository, or would if they were added, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return tuple(sorted(Path(name) for name in set(names) if (ROOT / name).is_file()))


def hand_written() -> list[Path]:
    """Python files that people write, relative to the root."""
    return [p for p in tracked() if p.suffix == ".py" and p.parts[:2] != ("protos", "python")]


def product_files() -> list[Path]:
    """Python files of the packages, absolute."""
    return [file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))]


def tree(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(), str(path))


def strings(path: Path) -> Iterator[str]:
    """String constants in a file, docstrings included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def table(page: Path, heading: str) -> list[tuple[str, ...]]:
    """Rows of the first Markdown table under a heading, without the header; backticks are taken off the cells."""
    lines = page.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.lstrip("# ") == heading and line.startswith("#"))
    rows: list[tuple[str, ...]] = []
    for line in lines[begin + 1 :]:
        if line.startswith("|"):
            rows.append(tuple(cell.strip().strip("`") for cell in line.strip().strip("|").split("|")))
        elif rows or line.startswith("#"):
            break
    return rows[2:]
