"""The engine's adapters: read and checked beside the step loop, held while anything runs with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lmesh_kernels.lora.bank import AdapterBank, AdapterBankError, Resident
from lmesh_kernels.lora.peft_config import AdapterFilesError
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.models.config import ModelConfig

from lmesh_worker.messages import AdapterLoaded

ADAPTER_NOT_LOADED = "ADAPTER_NOT_LOADED"


class Adapters:
    """Loads in a thread of its own, so that no step waits for a disk; the step loop takes what is ready."""

    def __init__(self, bank: AdapterBank, config: ModelConfig, *, depth: int) -> None:
        """`depth`: steps that may be in flight beside the one that is committed."""
        self.bank, self._config, self._depth = bank, config, depth
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._reading: dict[str, Future[Resident]] = {}
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._parted: list[tuple[int, Resident]] = []  # with the steps to commit before no step reads them

    @property
    def reading(self) -> bool:
        """Whether something is on its way."""
        return bool(self._reading)

    def load(self, digest: str, folder: str) -> None:
        """Begins to read; `loaded` tells how it went. One that was leaving stays."""
        self._leaving.discard(digest)
        if digest not in self._reading:
            self._reading[digest] = self._reader.submit(self._read, digest, folder)

    def _read(self, digest: str, folder: str) -> Resident:
        held = self.bank.get(digest)
        return held or self.bank.prepare(digest, read_adapter(Path(folder), self._config))

    def loaded(self) -> Iterator[AdapterLoaded]:
        """What has been read since the last call, now held or refused."""
        for digest in [digest for digest, reading in self._reading.items() if reading.done()]:
            yield self._take(digest, self._reading.pop(digest))

    def _take(self, digest: str, reading: Future[Resident]) -> AdapterLoaded:
        try:
            resident = reading.result()
            self.bank.hold(resident)
        except (AdapterBankError, AdapterFilesError) as error:
            return AdapterLoaded(digest, error.reason, str(error))
        except Exception as error:  # noqa: BLE001 - files from elsewhere may fail in any way, and harm nobody else
            return AdapterLoaded(digest, "ADAPTER_FAILED", f"{type(error).__name__}: {error}")
        return AdapterLoaded(digest, rank=resident.rank, bytes=resident.bytes)

    def available(self, digest: str) -> bool:
        """Whether a new sequence may run with it."""
        return self.bank.get(digest) is not None and digest not in self._leaving

    def retain(self, digest: str) -> None:
        """A sequence runs with it."""
        self._users[digest] += 1

    def release(self, digest: str) -> None:
        """A sequence that ran with it has ended; it goes if it was to go and this was the last."""
        self._users[digest] -= 1
        if self._users[digest] <= 0:
            del self._users[digest]
            if digest in self._leaving:
                self._let_go(digest)

    def drop(self, digest: str) -> None:
        """Lets it go, at once or with its last sequence."""
        if self._users[digest]:
            self._leaving.add(digest)
        else:
            self._let_go(digest)

    def _let_go(self, digest: str) -> None:
        self._leaving.discard(digest)
        # A step in flight may have a row of it: of a sequence that has just ended, or was aborted.
        if (resident := self.bank.drop(digest)) is not None:
            self._parted.append((self._depth + 1, resident))

    def settle(self, in_flight: int) -> None:
        """A step was committed, or none is there: frees what no step in flight can read any more."""
        if self._parted:
            self._parted = [(left - 1, resident) for left, resident in self._parted if in_flight and left > 1]

    def close(self) -> None:
        """Waits for what is being read."""
        self._reader.shutdown(cancel_futures=True)
