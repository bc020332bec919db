"""Records of the Hub's datasets, streamed by the package `datasets`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.extras import extra
from lmesh_trainer.data.records import START, Place, Reading, Record


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One split of a dataset by its name."""

    name: str
    split: str

    @property
    def streamable(self) -> bool:
        """See Source."""
        return True

    def identity(self) -> str:
        """See Source."""
        return f"hub:{self.name}, split {self.split}"

    def read(self, place: Place = START) -> Reading:
        """See Source. Raises DatasetError NO_DATASET or MISSING_EXTRA."""
        return _Streamed(self.name, self.split, place)


class _Streamed(Reading):
    """The place is the package's own: it goes on in the shard where it was, and opens none before it again."""

    def __init__(self, name: str, split: str, place: Place) -> None:
        datasets = extra("datasets")
        self._what, self._line = f"{name}, split {split}", place.line
        try:
            self._rows = datasets.load_dataset(name, split=split, streaming=True)
            if place.state:
                self._rows.load_state_dict(json.loads(place.state))
            self._records = iter(self._rows)
        except (OSError, ValueError) as error:
            raise DatasetError("NO_DATASET", f"{self._what}: {error}") from error

    def __next__(self) -> tuple[int, Record]:
        try:
            record = dict(next(self._records))
        except (OSError, ValueError) as error:
            raise DatasetError("NO_DATASET", f"{self._what}: {error}", line=self._line + 1) from error
        self._line += 1
        return self._line, record

    @property
    def place(self) -> Place:
        return Place(line=self._line, state=json.dumps(self._rows.state_dict()))

    def close(self) -> None:
        self._records = iter(())
