"""Added tokens in a Hugging Face folder: tokenizer.json, and where other files list them too."""

from __future__ import annotations

import json
from pathlib import Path

from lmesh_kernels.text.added_tokens import AddedTokens, add_tokens
from lmesh_kernels.text.resolve import ModelFiles
from lmesh_kernels.text.tokenizer import raw_tokenizer


def write_added(folder: Path, files: ModelFiles, added: AddedTokens) -> None:
    """Puts them into a folder that has the base's tokenizer files."""
    tokenizer = raw_tokenizer(files)
    ids = dict(zip(added.all, add_tokens(tokenizer, added), strict=True))
    tokenizer.save(str(folder / "tokenizer.json"))
    _in_config(folder / "tokenizer_config.json", ids, added)
    listed = folder / "added_tokens.json"
    if listed.is_file():
        _write(listed, json.loads(listed.read_text(encoding="utf-8")) | ids)


def _in_config(path: Path, ids: dict[str, int], added: AddedTokens) -> None:
    """Only where the config has the list: transformers takes it for the whole of them."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" not in told:
        return
    same = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    told["added_tokens_decoder"] |= {
        str(number): {"content": text, "special": text in added.special, **same} for text, number in ids.items()
    }
    _write(path, told)


def _write(path: Path, told: object) -> None:
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
