"""Models of the Hugging Face hub: from its own cache where they are whole, else fetched with a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

# What a model needs here; checkpoints in other formats beside the safetensors are left on the hub.
TEXT_FILES = ["*.json", "*.jinja", "tokenizer.model"]
WEIGHT_FILES = ["*.safetensors"]
NOT_WANTED = ["*/*", "consolidated*.safetensors"]  # the same weights once more, for other programs
_ETAG_TIMEOUT_S = 10.0


class HubError(LookupError):
    """The hub and its cache do not have the model; the message says what each of them answered."""


def snapshot(repo: str, revision: str | None, *, text_only: bool, say: Callable[[str], None]) -> Path:
    """The folder of a snapshot, named by its commit. Raises HubError.

    With `text_only` weights are neither asked for nor fetched.
    """
    patterns = TEXT_FILES if text_only else TEXT_FILES + WEIGHT_FILES
    folder = _cached(repo, revision, patterns)
    if folder is None or missing_files(folder, text_only=text_only):
        folder = _fetched(repo, revision, patterns, say)
    if missing := missing_files(folder, text_only=text_only):
        raise HubError(f"{repo} has no {missing}")
    return folder


def missing_files(folder: Path, *, text_only: bool) -> str:
    """The first thing that a model's folder lacks, "" where it is whole."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if text_only:
        return ""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return "" if any(folder.glob("*.safetensors")) else "safetensors weights"
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return next((shard for shard in shards if not (folder / shard).is_file()), "")


def _cached(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_WANTED, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise HubError(f"{repo!r} is not a hub id: {error}") from error


def _fetched(repo: str, revision: str | None, patterns: list[str], say: Callable[[str], None]) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if is_offline_mode():
        raise HubError(f"{repo} is not whole in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it")
    say(f"fetching {repo} from the Hugging Face hub")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=NOT_WANTED,
                etag_timeout=_ETAG_TIMEOUT_S,
            )
        )
    except HfHubHTTPError as error:
        raise HubError(f"{repo} is not whole in the hub's cache, and the hub refuses it: {error}") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {cause}"
        raise HubError(f"{repo} is not whole in the hub's cache, and the hub cannot be reached ({why})") from error
    except Exception as error:  # the client lets through what its HTTP and storage libraries raise
        raise HubError(f"fetching {repo} from the hub failed ({type(error).__name__}: {error})") from error
