"""From a job file's plain values to lmesh.training.v1's JobSpec: every key known, every value of its type."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from lmesh.training.v1 import training_pb2

from lmesh_cli.training.job_file import JobFileError

_TEXT, _TRUTH = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BOOL
_WHOLE, _REAL = FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_DOUBLE
_WORDS = {_TEXT: "a text", _TRUTH: "true or false", _WHOLE: "a whole number, 0 or more", _REAL: "a number"}
_MOST = 2**32 - 1


def job_spec(values: Mapping[str, Any]) -> training_pb2.JobSpec:
    """The message. Raises JobFileError, which names the key by its path and says what would be right."""
    spec = training_pb2.JobSpec()
    _fill(spec, values, "")
    return spec


def known_keys() -> set[str]:
    """Paths of all keys, such as `dataset.source`."""
    return set(_paths(training_pb2.JobSpec.DESCRIPTOR, ""))


def _paths(descriptor: Descriptor, prefix: str) -> Iterator[str]:
    for field in descriptor.fields:
        yield f"{prefix}{field.name}"
        if field.message_type is not None and not _is_map(field):
            yield from _paths(field.message_type, f"{prefix}{field.name}.")


def _fill(message: Message, values: Mapping[str, Any], prefix: str) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in fields:
            raise JobFileError(f"{path}: no such key{_suggestion(str(key), list(fields), prefix)}")
        _set(message, cast(FieldDescriptor, fields[key]), value, path)


def _set(message: Message, field: FieldDescriptor, value: Any, path: str) -> None:  # noqa: ANN401 - a file says it
    if field.message_type is None:
        if field.is_repeated:
            getattr(message, field.name).extend(_items(field, value, path))
        else:
            setattr(message, field.name, _scalar(field, value, path))
        return
    if not isinstance(value, dict):
        raise JobFileError(f"{path}: must be a mapping of keys, not {_shown(value)}")
    if _is_map(field):
        kind = field.message_type.fields_by_name["value"]
        told = {str(key): _scalar(kind, item, f"{path}.{key}") for key, item in value.items()}
        getattr(message, field.name).update(told)
        return
    part = getattr(message, field.name)
    part.SetInParent()  # a mapping without keys is there too
    _fill(part, value, f"{path}.")


def _items(field: FieldDescriptor, value: Any, path: str) -> list[Any]:  # noqa: ANN401
    # One regular expression is a text where a list of names may stand.
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise JobFileError(f"{path}: must be a list, not {_shown(value)}")
    return [_scalar(field, item, f"{path}[{index}]") for index, item in enumerate(items)]


def _scalar(field: FieldDescriptor, value: Any, path: str) -> Any:  # noqa: ANN401
    kind = field.type
    if kind == _REAL and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind == _WHOLE and isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST:
        return value
    if (kind == _TEXT and isinstance(value, str)) or (kind == _TRUTH and isinstance(value, bool)):
        return value
    raise JobFileError(f"{path}: must be {_WORDS[kind]}, not {_shown(value)}")


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _shown(value: object) -> str:
    if value is None:
        return "nothing: leave the key out for its default"
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


def _suggestion(key: str, names: list[str], prefix: str) -> str:
    if near := difflib.get_close_matches(key, names, 1):
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = [path for path in sorted(known_keys()) if path.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; there are {', '.join(f'{prefix}{name}' for name in names)}"
