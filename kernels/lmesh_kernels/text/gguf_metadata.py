"""The metadata of a GGUF file, vocabulary included, without its tensors.

The format is little-endian: magic, version, counts, then (key, type, value) triples; see the GGUF specification.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufError(ValueError):
    """Not a GGUF file that can be read."""


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of the file; arrays are lists. Raises GgufError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, path)
    except (struct.error, MemoryError, ValueError) as error:  # mmap refuses an empty file with ValueError
        if isinstance(error, GgufError):
            raise
        raise GgufError(f"{path} is cut short or damaged: {error}") from error


def _read(data: mmap.mmap, path: Path) -> dict[str, Any]:
    if data[:4] != b"GGUF":
        raise GgufError(f"{path} is not a GGUF file")
    version = _U32.unpack_from(data, 4)[0]
    if version not in (2, 3):
        raise GgufError(f"{path} is GGUF version {version}; versions 2 and 3 are read")
    return _Reader(data, 16).pairs(_U64.unpack_from(data, 16)[0])


class _Reader:
    """A position in the mapped file."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self._data, self._at = data, offset + 8

    def pairs(self, count: int) -> dict[str, Any]:
        found = {}
        for _ in range(count):
            key = self._string()
            found[key] = self._value(self._take(_U32))
        return found

    def _take(self, form: struct.Struct) -> Any:  # noqa: ANN401 - the format decides
        value = form.unpack_from(self._data, self._at)[0]
        self._at += form.size
        return value

    def _string(self) -> str:
        length = self._take(_U64)
        if length > len(self._data) - self._at:
            raise GgufError(f"a text of {length} bytes does not fit into the file")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:  # noqa: ANN401 - GGUF values are of many types
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._take(_U32), self._take(_U64))
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in (_STRING, _ARRAY):
            return [self._value(kind) for _ in range(count)]
        return list(self._numbers(kind, count))

    def _numbers(self, kind: int, count: int) -> tuple[Any, ...]:
        if kind not in _NUMBERS:
            raise GgufError(f"unknown GGUF value type {kind}")
        form = struct.Struct(f"<{count}{_NUMBERS[kind]}")
        values = form.unpack_from(self._data, self._at)
        self._at += form.size
        return values
