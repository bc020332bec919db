"""A Hugging Face tokenizer's vocabulary in GGUF's keys, where it is of a kind that llama.cpp cuts text alike."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from lmesh_kernels.text.gguf_tokenizer import pre_tokenizer
from lmesh_kernels.text.resolve import ModelFiles
from lmesh_kernels.text.tokenizer import load_tokenizer
from tokenizers import Tokenizer, models

from lmesh_trainer.errors import JobError

_KNOWN = ("smollm", "llama-bpe", "qwen2", "gpt-2")


def add_vocabulary(writer: GGUFWriter, files: ModelFiles, *, rows: int = 0) -> None:
    """Tokens, merges, special ids and chat template. Raises JobError UNSUPPORTED_TOKENIZER.

    The model's embedding has `rows`: llama.cpp wants a token for each, and those to spare have none.
    """
    told = json.loads((files.path / "tokenizer.json").read_text(encoding="utf-8"))
    if told["model"].get("type") != "BPE" or told["model"].get("byte_fallback"):
        raise JobError("UNSUPPORTED_TOKENIZER", "only byte-level BPE vocabularies are written to GGUF")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_name(told))
    tokens, kinds = _tokens(told, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = told["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    tokenizer = load_tokenizer(files)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_ids:
        writer.add_eos_token_id(tokenizer.eos_ids[0])
    if len(tokenizer.eos_ids) > 1:
        writer.add_eot_token_id(tokenizer.eos_ids[1])
    first = tokenizer.encode("a", add_special_tokens=True)[0]
    writer.add_add_bos_token(first == tokenizer.bos_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_name(told: dict[str, Any]) -> str:
    """GGUF's name of the way that text is cut before merging: the one of ours that is the same."""
    for name in _KNOWN:
        ours = Tokenizer(models.BPE())
        ours.pre_tokenizer = pre_tokenizer(name)
        if _plain(json.loads(ours.to_str())["pre_tokenizer"]) == _plain(told.get("pre_tokenizer")):
            return name
    known = ", ".join(_KNOWN)
    raise JobError("UNSUPPORTED_TOKENIZER", f"the tokenizer cuts text like none of {known}")


def _plain(part: Any) -> Any:  # noqa: ANN401 - JSON
    """Without `trim_offsets`, which changes no id."""
    if isinstance(part, dict):
        return {name: _plain(value) for name, value in part.items() if name != "trim_offsets"}
    return [_plain(value) for value in part] if isinstance(part, list) else part


def _tokens(told: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    by_id = {index: (token, TokenType.NORMAL) for token, index in told["model"]["vocab"].items()}
    for added in told.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    filled = [by_id.get(index, (f"[UNUSED{index}]", TokenType.UNUSED)) for index in range(max(max(by_id) + 1, rows))]
    return [token for token, _ in filled], [int(kind) for _, kind in filled]
