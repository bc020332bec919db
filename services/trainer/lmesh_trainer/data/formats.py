"""The shapes that rows come in, and the one that training takes: a conversation, a completion, or a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.records import Record


class Format(StrEnum):
    """Named as the field names them."""

    MESSAGES = "messages"  # ChatML's roles: {"messages": [{role, content}], "tools"?}
    SHAREGPT = "sharegpt"  # {"conversations": [{from, value}], "system"?, "tools"?}
    ALPACA = "alpaca"  # {instruction, input?, output, system?, history?}
    PROMPT_COMPLETION = "prompt-completion"  # {prompt, completion}, texts or messages
    TEXT = "text"  # {text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages as the chat template takes them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A text, and what is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to be learnt whole."""

    text: str


Example = Chat | Completion | Text

_COLUMNS: dict[Format, tuple[frozenset[str], frozenset[str]]] = {  # needed, allowed besides
    Format.MESSAGES: (frozenset({"messages"}), frozenset({"tools"})),
    Format.SHAREGPT: (frozenset({"conversations"}), frozenset({"system", "tools"})),
    Format.ALPACA: (frozenset({"instruction", "output"}), frozenset({"input", "system", "history"})),
    Format.PROMPT_COMPLETION: (frozenset({"prompt", "completion"}), frozenset({"tools"})),
    Format.TEXT: (frozenset({"text"}), frozenset()),
}
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"observation": "tool", "tool": "tool", "function_call": "assistant"}
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "train"}


def detect(record: Record, line: int) -> Format:
    """The format whose columns a row has. Raises DatasetError UNKNOWN_FORMAT, naming what is there and is known."""
    for form, (needed, _) in _COLUMNS.items():
        if needed <= record.keys():
            return form
    known = "; ".join(f"{form}: {', '.join(sorted(needed))}" for form, (needed, _) in _COLUMNS.items())
    raise DatasetError("UNKNOWN_FORMAT", f"columns {sorted(record)} are none of: {known}", line=line)


def convert(record: Record, form: Format, line: int, *, ignore: Collection[str] = ()) -> Example:
    """One row of a format. `ignore` are columns that mean nothing.

    Raises DatasetError MIXED_FORMATS, UNKNOWN_COLUMN, BAD_COLUMN or BAD_MESSAGE with the line.
    """
    needed, allowed = _COLUMNS[form]
    told = {name: value for name, value in record.items() if name not in ignore and value is not None}
    if missing := sorted(needed - told.keys()):
        raise DatasetError("MIXED_FORMATS", f"a row of format {form} needs {', '.join(missing)}", line=line)
    if strange := sorted(told.keys() - needed - allowed):
        hint = "name them in ignore_columns if they mean nothing"
        raise DatasetError("UNKNOWN_COLUMN", f"format {form} does not know {', '.join(strange)}: {hint}", line=line)
    return _CONVERTERS[form](told, line)


def _text_of(record: Record, name: str, line: int, default: str | None = None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str):
        raise DatasetError("BAD_COLUMN", f"{name} must be a text, not {type(value).__name__}", line=line)
    return value


def _list_of(record: Record, name: str, line: int) -> list[Any]:
    value = record.get(name)
    if isinstance(value, str):  # CSV has no lists, and some sets keep theirs as text
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DatasetError("BAD_COLUMN", f"{name} is no JSON: {error}", line=line) from error
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DatasetError("BAD_COLUMN", f"{name} must be a list of objects, at least one", line=line)
    return value


def _tools(record: Record, line: int) -> list[dict[str, Any]] | None:
    return _list_of(record, "tools", line) if record.get("tools") else None


def _checked(messages: list[dict[str, Any]], line: int) -> list[dict[str, Any]]:
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in _ROLES:
            known = ", ".join(sorted(_ROLES))
            raise DatasetError("BAD_MESSAGE", f"message {number}: role {role!r} is none of {known}", line=line)
        if strange := sorted(message.keys() - _MESSAGE_FIELDS):
            raise DatasetError("BAD_MESSAGE", f"message {number}: unknown {', '.join(strange)}", line=line)
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DatasetError("BAD_MESSAGE", f"message {number}: content must be a text", line=line)
    if not any(message["role"] == "assistant" for message in messages):
        raise DatasetError("BAD_MESSAGE", "no message of an assistant: there is nothing to learn", line=line)
    return messages


def _messages(record: Record, line: int) -> Example:
    return Chat(messages=_checked(_list_of(record, "messages", line), line), tools=_tools(record, line))


def _sharegpt(record: Record, line: int) -> Example:
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text_of(record, "system", line)})
    for number, turn in enumerate(_list_of(record, "conversations", line), 1):
        speaker = turn.get("from")
        if speaker not in _SPEAKERS or not isinstance(turn.get("value"), str):
            known = ", ".join(_SPEAKERS)
            raise DatasetError("BAD_MESSAGE", f"turn {number} needs from (one of {known}) and value", line=line)
        message = {"role": _SPEAKERS[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": [_call(turn["value"], number, line)]}
        messages.append(message)
    return Chat(messages=_checked(messages, line), tools=_tools(record, line))


def _call(value: str, number: int, line: int) -> dict[str, Any]:
    try:
        told = json.loads(value)
        return {"type": "function", "function": {"name": told["name"], "arguments": told["arguments"]}}
    except (ValueError, KeyError, TypeError) as error:
        hint = 'JSON such as {"name": ..., "arguments": {...}}'
        raise DatasetError("BAD_MESSAGE", f"turn {number}: a function_call is {hint}", line=line) from error


def _alpaca(record: Record, line: int) -> Example:
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text_of(record, "system", line)})
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(h, list) and len(h) == 2 for h in history):
        raise DatasetError("BAD_COLUMN", "history must be a list of [instruction, output]", line=line)
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked, more = _text_of(record, "instruction", line), _text_of(record, "input", line, "")
    messages.append({"role": "user", "content": f"{asked}\n\n{more}" if more else asked})
    messages.append({"role": "assistant", "content": _text_of(record, "output", line)})
    return Chat(messages=_checked(messages, line))


def _prompt_completion(record: Record, line: int) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt=prompt, completion=completion)
    asked, answered = _list_of(record, "prompt", line), _list_of(record, "completion", line)
    silent = [{**message, "train": False} for message in asked]
    return Chat(messages=_checked(silent + answered, line), tools=_tools(record, line))


def _plain(record: Record, line: int) -> Example:
    text = _text_of(record, "text", line)
    if not text.strip():
        raise DatasetError("BAD_COLUMN", "text is empty", line=line)
    return Text(text=text)


_CONVERTERS: dict[Format, Callable[[Record, int], Example]] = {
    Format.MESSAGES: _messages,
    Format.SHAREGPT: _sharegpt,
    Format.ALPACA: _alpaca,
    Format.PROMPT_COMPLETION: _prompt_completion,
    Format.TEXT: _plain,
}
