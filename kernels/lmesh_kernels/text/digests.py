"""Digests of a model's files: what its weights and its text handling are, by content."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

from lmesh_kernels.text.resolve import ModelFiles, cache_folder

log = logging.getLogger(__name__)

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",  # both configs may add end-of-sequence ids
)
WEIGHT_PATTERNS = ("config.json", "*.safetensors")


def model_digest(files: ModelFiles) -> str:
    """Digest of configuration and weights, 64 hex digits."""
    if files.format == "gguf":
        return _combined([files.path])
    return _combined([p for pattern in WEIGHT_PATTERNS for p in sorted(files.path.glob(pattern))])


def base_digest(files: ModelFiles, *, nf4: bool = False) -> str:
    """Of a base as it is computed with: its `model_digest`, and the recipe by which loading quantises it, if it does.

    The same weights quantised are another base: neither keys and values nor adapters pass between the two unasked.
    """
    digest = model_digest(files)
    return f"{digest}+nf4" if nf4 and not is_quantised(files) else digest


def dummy_digest(files: ModelFiles, *, nf4: bool = False) -> str:
    """Of a base whose weights are random (load format `dummy`): "dummy-" and the digest of its configuration.

    No weights are read. No real base has such a digest, so what was trained on one never fits the other.
    """
    digest = f"dummy-{_combined([files.path / 'config.json'])}"
    return f"{digest}+nf4" if nf4 and not is_quantised(files) else digest


def is_quantised(files: ModelFiles) -> bool:
    """Whether the checkpoint's own configuration says that its weights are quantised."""
    if files.format == "gguf":
        return False
    return bool(json.loads((files.path / "config.json").read_text()).get("quantization_config"))


def text_digest(files: ModelFiles) -> str:
    """Digest of everything that turns text into ids and back, 64 hex digits."""
    if files.format == "gguf":
        return _combined([files.path])  # one file holds both
    return _combined([files.path / name for name in TEXT_FILES if (files.path / name).is_file()])


def _combined(paths: list[Path]) -> str:
    lines = "".join(f"{path.name}\0{file_digest(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, remembered by (path, size, modification time): a large model is read once."""
    real = path.resolve()
    stat = real.stat()
    stamp = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}"
    note = cache_folder() / "digests" / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
    known = _remembered(note)
    if known is not None:
        return known
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(note, {"path": str(real), "sha256": digest})
    return digest


def _remembered(note: Path) -> str | None:
    try:
        return str(json.loads(note.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        return None


def _remember(note: Path, found: dict[str, str]) -> None:
    """Keeps a digest for next time, atomically; a cache that cannot be written costs only that."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as part:
            json.dump(found, part)
        Path(part.name).replace(note)
    except OSError as error:
        log.warning("the digest of %s is not kept: %s", found["path"], error)
