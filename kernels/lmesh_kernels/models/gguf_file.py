"""A GGUF file's scalars and tensors, mapped. Its vocabulary arrays are stepped over: the tokenizer half reads them.

The gguf package's own reader makes array views of every token, seconds for a large vocabulary; this takes a tenth.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from lmesh_kernels.models.config import UnsupportedModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # little-endian, 64-bit counts
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_UINT64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor: shape with rows first, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: Bytes

    def floats(self) -> Floats:
        """The values in float32, a new array. Raises UnsupportedModelError for a type that cannot be unfolded."""
        if self.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            stored = np.float32 if self.kind == GGMLQuantizationType.F32 else np.float16
            return self.data.view(stored).astype(np.float32).reshape(self.shape)
        try:
            return np.asarray(dequantize(self.data, self.kind), dtype=np.float32).reshape(self.shape)
        except NotImplementedError as error:
            message = f"tensor {self.name}: GGUF type {self.kind.name} is not supported"
            raise UnsupportedModelError("UNSUPPORTED_GGUF_TYPE", message) from error


class _Cursor:
    """Reads values one after the other from the mapped bytes."""

    def __init__(self, data: Bytes) -> None:
        self.view = memoryview(data.data)
        self.offset = 0

    def take(self, form: str) -> Any:  # noqa: ANN401 - of the format's type
        value = struct.unpack_from(form, self.view, self.offset)[0]
        self.offset += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.offset += length
        return bytes(self.view[self.offset - length : self.offset]).decode()

    def value(self, kind: GGUFValueType) -> Any:  # noqa: ANN401 - GGUF values are of many types
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._skip_array()
        return self.take(_SCALARS[kind])

    def _skip_array(self) -> None:
        kind, count = GGUFValueType(self.take("<I")), self.take("<Q")
        if kind == GGUFValueType.ARRAY:
            for _ in range(count):
                self._skip_array()
        elif kind == GGUFValueType.STRING:
            offset, read, view = self.offset, _UINT64.unpack_from, self.view
            for _ in range(count):
                offset += 8 + read(view, offset)[0]
            self.offset = offset
        else:
            self.offset += count * struct.calcsize(_SCALARS[kind])


class GgufFile:
    """An open GGUF file: `metadata` without arrays, and `tensors` by name."""

    def __init__(self, path: Path) -> None:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        if bytes(data[:4]) != MAGIC:
            raise UnsupportedModelError("NOT_GGUF", f"{path} is not a GGUF file")
        try:
            self._read(_Cursor(data), data)
        except UnsupportedModelError:
            raise
        except (struct.error, ValueError, KeyError) as error:
            raise UnsupportedModelError("BROKEN_GGUF", f"{path} is cut short or damaged: {error}") from error

    def _read(self, cursor: _Cursor, data: Bytes) -> None:
        cursor.offset = len(MAGIC)
        version = cursor.take("<I")
        if version not in VERSIONS:
            raise UnsupportedModelError("UNSUPPORTED_GGUF_VERSION", f"GGUF version {version} is not among {VERSIONS}")
        num_tensors, num_values = cursor.take("<Q"), cursor.take("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text()
            self.metadata[key] = cursor.value(GGUFValueType(cursor.take("<I")))
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.offset // alignment) * alignment
        self.tensors = {info.name: _tensor(data, start, info) for info in infos}


class _TensorInfo(NamedTuple):
    """A tensor's entry in the header; the offset counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.text()
    dims = [cursor.take("<Q") for _ in range(cursor.take("<I"))]
    return _TensorInfo(name, tuple(reversed(dims)), cursor.take("<I"), cursor.take("<Q"))


def _tensor(data: Bytes, start: int, info: _TensorInfo) -> GgufTensor:
    kind = GGMLQuantizationType(info.kind)
    stored = quant_shape_to_byte_shape(info.shape, kind)
    first, size = start + info.offset, math.prod(stored)
    if first + size > data.size:
        raise UnsupportedModelError("BROKEN_GGUF", f"tensor {info.name} reaches past the end of the file")
    return GgufTensor(name=info.name, shape=info.shape, kind=kind, data=data[first : first + size].reshape(stored))
