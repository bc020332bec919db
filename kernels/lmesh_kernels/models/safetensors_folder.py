"""A checkpoint's safetensors files: their tensors as views into memory, or as places in files that others read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmesh_kernels.quant.bitsandbytes_tensors import QuantisedTensorError, owner, read_nf4
from lmesh_kernels.quant.nf4 import Nf4Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8  # of the header's length, little-endian, which a file begins with


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not fit; `reason` is UPPER_SNAKE, the message names the tensors."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor that lies in a file, not read yet: `nbytes` bytes at `offset`, row by row."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightsError("MISSING_SHARDS", f"{folder} lacks {some(absent)}, named by its index")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise WeightsError(
            "NO_SAFETENSORS",
            f"{folder} has no model.safetensors nor an index of shards (load_format dummy serves random weights)",
        )
    return [single]


def read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor | Nf4Tensor]]:
    """Name and tensor of all shards; tensors are views into the mapped file, read as they are copied.

    What bitsandbytes packed comes as one NF4 tensor. Raises WeightsError, also with the reasons of `read_nf4`.
    """
    for path in safetensors_files(folder):
        with _opened(path) as shard:
            beside = _parts(shard)
            for name in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if name in beside:
                    yield name, _packed(name, {part: shard.get_tensor(part) for part in (name, *beside[name])})
                elif owner(name) is None:
                    yield name, shard.get_tensor(name)


def stored_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor | Nf4Tensor]]:
    """As `read_safetensors`, but of plain tensors only where they lie: nothing of them is read here."""
    for path in safetensors_files(folder):
        with _opened(path) as shard:
            beside, places = _parts(shard), _places(path)
            for name in shard.keys():  # noqa: SIM118
                if name in beside:
                    yield name, _packed(name, {part: shard.get_tensor(part) for part in (name, *beside[name])})
                elif owner(name) is None:
                    yield name, places[name]


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(sorted(names)[:8]) + rest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        shard = safe_open(path, framework="pt")  # checks the header, and the file's length against it
    except SafetensorError as error:
        raise WeightsError("BAD_SAFETENSORS", f"{path.name} is no whole safetensors file: {error}") from error
    with shard:
        yield shard


def _parts(shard: Any) -> dict[str, list[str]]:  # noqa: ANN401 - safetensors has no types
    """Of each packed weight, the names of what stands beside it."""
    beside: dict[str, list[str]] = {}
    for part in shard.keys():  # noqa: SIM118
        if (name := owner(part)) is not None:
            beside.setdefault(name, []).append(part)
    return beside


def _places(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor lies, from the header (which `safe_open` has found to be right)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({told["dtype"] for told in header.values()} - set(_DTYPES))
    if unknown:
        raise WeightsError("UNKNOWN_DTYPE", f"{path.name} has tensors of type {some(unknown)}, which torch has not")
    return {
        name: StoredTensor(
            path=path,
            offset=_LENGTH_BYTES + length + told["data_offsets"][0],
            dtype=_DTYPES[told["dtype"]],
            shape=tuple(told["shape"]),
        )
        for name, told in header.items()
    }


def _packed(name: str, parts: dict[str, Tensor]) -> Nf4Tensor:
    try:
        return read_nf4(name, parts)
    except QuantisedTensorError as error:
        raise WeightsError(error.reason, str(error)) from error
