"""What a job makes of its base's vocabulary: tokens that it adds, and the config that it trains."""

from __future__ import annotations

from lmesh_kernels.models.config import ModelConfig, load_config
from lmesh_kernels.models.growth import Growth
from lmesh_kernels.text.added_tokens import AddedTokenError, AddedTokens, add_tokens
from lmesh_kernels.text.resolve import ModelFiles
from lmesh_kernels.text.tokenizer import raw_tokenizer

from lmesh_trainer.errors import JobError
from lmesh_trainer.export.merged import check_folder
from lmesh_trainer.spec import JobSpec


def added_tokens(spec: JobSpec) -> AddedTokens:
    """As the tokenizer takes them."""
    return AddedTokens(plain=spec.add_tokens, special=spec.add_special_tokens)


def growth(spec: JobSpec, files: ModelFiles) -> Growth | None:
    """Rows that embedding and head are given. Raises JobError BAD_ADDED_TOKENS."""
    added = added_tokens(spec)
    if not added:
        return None
    try:
        ids = add_tokens(raw_tokenizer(files), added)
    except AddedTokenError as error:
        raise JobError("BAD_ADDED_TOKENS", f"add_tokens, add_special_tokens: {error}") from error
    return Growth(known=ids.start, added=len(ids))


def trained_config(spec: JobSpec, files: ModelFiles) -> ModelConfig:
    """The config of what the job trains.

    Raises JobError BAD_ADDED_TOKENS, and NOT_SUPPORTED where the job makes a model that could not be written.
    """
    config, grown = load_config(files), growth(spec, files)
    if not spec.makes_adapter:
        check_folder(files, config)
    return config if grown is None else grown.config(config)
