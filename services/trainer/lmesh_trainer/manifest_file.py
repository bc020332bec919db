"""lmesh_manifest.json in a published folder, torch-free; no part of an adapter's content digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFEST = "lmesh_manifest.json"
Manifest = dict[str, Any]  # JSON


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it into a folder that is about to be published."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> str:
    """A folder's manifest as text; empty where it has none, or one that is no JSON object."""
    try:
        text = (folder / MANIFEST).read_text()
        return text if isinstance(json.loads(text), dict) else ""
    except (OSError, ValueError):
        return ""
