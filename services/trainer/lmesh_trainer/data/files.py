"""Records of files, read piece by piece: lines of JSON, CSV, and Parquet; and arrays of JSON, which are read whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.extras import extra
from lmesh_trainer.data.records import START, Place, Reading, Record

_LONGEST_FIELD = 64 << 20  # bytes of one CSV field
_PARQUET_ROWS = 256  # made of columns at once


@dataclass(frozen=True, slots=True)
class File:
    """A file whose ending says how it is read."""

    path: Path

    @property
    def streamable(self) -> bool:
        """See Source. An array of JSON ends where its last byte is."""
        return self.path.suffix.lower() != ".json"

    def identity(self) -> str:
        """Its size: where it lies may differ from trainer to trainer."""
        return f"file of {self.path.stat().st_size} bytes"

    def read(self, place: Place = START) -> Reading:
        """See Source. Raises DatasetError NOT_JSON, NOT_A_ROW or MISSING_EXTRA."""
        return READINGS[self.path.suffix.lower()](self.path, place)


class _TextFile(Reading):
    """Lines counted, and the place of the next one known, after the end too."""

    def __init__(self, path: Path, place: Place) -> None:
        self._file = path.open("rb")
        self._line, self._end = place.line, 0

    def _lines(self) -> Iterator[bytes]:
        while not self._file.closed and (line := self._file.readline()):
            self._line += 1
            yield line
        self.close()

    @property
    def place(self) -> Place:
        return Place(line=self._line, offset=self._end if self._file.closed else self._file.tell())

    def close(self) -> None:
        if not self._file.closed:
            self._end = self._file.tell()
            self._file.close()


class _JsonLines(_TextFile):
    def __init__(self, path: Path, place: Place) -> None:
        super().__init__(path, place)
        self._file.seek(place.offset)
        self._written = (line for line in self._lines() if line.strip())

    def __next__(self) -> tuple[int, Record]:
        text = next(self._written)
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DatasetError("NOT_JSON", f"no JSON: {error}", line=self._line) from error
        return self._line, _checked(record, self._line)


class _Csv(_TextFile):
    """The reader of the standard library takes a line at a time and none ahead, so the file is behind its record."""

    def __init__(self, path: Path, place: Place) -> None:
        super().__init__(path, START)
        csv.field_size_limit(_LONGEST_FIELD)
        self._name = path.name
        self._reader = csv.reader(self._decoded(), strict=True)
        self._header = self._fields() or []
        if place.offset:
            self._file.seek(place.offset)
            self._line = place.line

    def _decoded(self) -> Iterator[str]:
        encoding = "utf-8-sig"  # of the first line alone
        for line in self._lines():
            yield line.decode(encoding)
            encoding = "utf-8"

    def _fields(self) -> list[str] | None:
        try:
            return next((fields for fields in self._reader if fields), None)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError("NOT_A_ROW", f"{self._name} is no CSV in UTF-8: {error}", line=self._line) from error

    def __next__(self) -> tuple[int, Record]:
        fields = self._fields()
        if fields is None:
            raise StopIteration
        if len(fields) != len(self._header):
            raise DatasetError("NOT_A_ROW", "more or fewer fields than the header", line=self._line)
        return self._line, dict(zip(self._header, fields, strict=True))


class _JsonArray(Reading):
    def __init__(self, path: Path, place: Place) -> None:
        try:
            told = json.loads(path.read_bytes())
        except ValueError as error:
            raise DatasetError("NOT_JSON", f"{path.name} is no JSON: {error}; lines of JSON are .jsonl") from error
        if not isinstance(told, list):
            raise DatasetError("NOT_A_ROW", f"{path.name} must be an array of rows")
        self._rows, self._line = told, place.line

    def __next__(self) -> tuple[int, Record]:
        if self._line >= len(self._rows):
            raise StopIteration
        self._line += 1
        return self._line, _checked(self._rows[self._line - 1], self._line)

    @property
    def place(self) -> Place:
        return Place(line=self._line)

    def close(self) -> None:
        self._rows = []


class _Parquet(Reading):
    """Begins with the row group that a place lies in; what lies before it is not read."""

    def __init__(self, path: Path, place: Place) -> None:
        parquet = extra("pyarrow.parquet")
        self._name, self._line = path.name, place.line
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DatasetError("NOT_A_ROW", f"{path.name} is no Parquet: {error}") from error
        self._records = self._read()

    def _read(self) -> Iterator[Record]:
        before, groups = 0, self._file.metadata.num_row_groups
        first = 0
        while first < groups and before + (rows := self._file.metadata.row_group(first).num_rows) <= self._line:
            before, first = before + rows, first + 1
        if first == groups:
            return
        skipped = self._line - before
        for batch in self._file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=list(range(first, groups))):
            if skipped >= len(batch):
                skipped -= len(batch)
                continue
            yield from batch.slice(skipped).to_pylist()
            skipped = 0

    def __next__(self) -> tuple[int, Record]:
        try:
            record = next(self._records)
        except (OSError, ValueError) as error:
            raise DatasetError("NOT_A_ROW", f"{self._name} is no Parquet: {error}", line=self._line + 1) from error
        self._line += 1
        return self._line, record

    @property
    def place(self) -> Place:
        return Place(line=self._line)

    def close(self) -> None:
        self._file.close()


READINGS: dict[str, type[_JsonLines] | type[_Csv] | type[_JsonArray] | type[_Parquet]] = {
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".json": _JsonArray,
    ".csv": _Csv,
    ".parquet": _Parquet,
}


def _checked(record: object, line: int) -> Record:
    if not isinstance(record, dict):
        raise DatasetError("NOT_A_ROW", f"a row is a JSON object, not {type(record).__name__}", line=line)
    return record
