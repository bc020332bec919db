"""Where rows come from: JSONL, JSON, CSV, Parquet, and the Hub's datasets, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lmesh_trainer.data.errors import DatasetError

Record = dict[str, Any]
HUB = "hub:"
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_LONGEST_FIELD = 64 << 20  # bytes of one CSV field


def read_records(source: str, *, split: str = "train") -> Iterator[tuple[int, Record]]:
    """(line, row) of a file by its ending, or of `hub:owner/name`; lines count from 1, rows where there are no lines.

    Raises DatasetError NO_DATASET, UNKNOWN_FILE_TYPE, NOT_JSON, NOT_A_ROW, or MISSING_EXTRA for what needs the package
    `datasets`.
    """
    if source.startswith(HUB):
        yield from _hub(source.removeprefix(HUB), split)
        return
    path = Path(source)
    if not path.is_file():
        raise DatasetError("NO_DATASET", f"there is no file {source}")
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            yield from _json_lines(path)
        case ".json":
            yield from _json_array(path)
        case ".csv":
            yield from _csv(path)
        case ".parquet":
            yield from _parquet(path)
        case ending:
            known = ", ".join(ENDINGS)
            raise DatasetError("UNKNOWN_FILE_TYPE", f"{path.name}: {ending or 'no ending'}; known are {known}")


def _json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DatasetError("NOT_JSON", f"no JSON: {error}", line=line) from error
            yield line, _checked(record, line)


def _json_array(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        told = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError("NOT_JSON", f"{path.name} is no JSON: {error}; lines of JSON are .jsonl") from error
    if not isinstance(told, list):
        raise DatasetError("NOT_A_ROW", f"{path.name} must be an array of rows")
    yield from ((row, _checked(record, row)) for row, record in enumerate(told, 1))


def _csv(path: Path) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise DatasetError("NOT_A_ROW", "more or fewer fields than the header", line=reader.line_num)
                yield reader.line_num, record
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError("NOT_A_ROW", f"{path.name} is no CSV in UTF-8: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Record]]:
    parquet = _extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            batches = (record for batch in file.iter_batches(batch_size=256) for record in batch.to_pylist())
            yield from enumerate(batches, 1)
    except (OSError, ValueError) as error:
        raise DatasetError("NOT_A_ROW", f"{path.name} is no Parquet: {error}") from error


def _hub(name: str, split: str) -> Iterator[tuple[int, Record]]:
    datasets = _extra("datasets")
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from ((number, dict(row)) for number, row in enumerate(rows, 1))
    except (OSError, ValueError) as error:
        raise DatasetError("NO_DATASET", f"{name}, split {split}: {error}") from error


def _extra(module: str) -> Any:  # noqa: ANN401 - a module that may not be there
    try:
        return import_module(module)
    except ImportError as error:
        package = "datasets"
        raise DatasetError("MISSING_EXTRA", f"this needs the package {package}: lmesh-trainer[data]") from error


def _checked(record: object, line: int) -> Record:
    if not isinstance(record, dict):
        raise DatasetError("NOT_A_ROW", f"a row is a JSON object, not {type(record).__name__}", line=line)
    return record
