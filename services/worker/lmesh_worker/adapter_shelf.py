"""The adapters that this worker holds: fetched by digest as the scheduler orders, loaded by the engine, told back."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.folders import fetch_folder
from lmesh_chassis.artifacts.store import ArtifactStore
from lmesh_kernels.text.resolve import cache_folder

from lmesh_worker.errors import ARTIFACTS_DISABLED
from lmesh_worker.messages import AdapterLoaded

_log = logging.getLogger(__name__)


class AdapterState(NamedTuple):
    """How an adapter stands; `reason` is UPPER_SNAKE where loading failed."""

    digest: str
    held: bool
    reason: str = ""
    message: str = ""


class AdapterShelf:
    """Owned by the event loop. `load` and `drop` are the engine's; `on_change` is called when a state is to be told."""

    def __init__(
        self,
        store: ArtifactStore | None,
        *,
        load: Callable[[str, str], Awaitable[AdapterLoaded]],
        drop: Callable[[str], None],
    ) -> None:
        self._store, self._load, self._drop = store, load, drop
        self._held: set[str] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._untold: list[AdapterState] = []
        self.on_change: Callable[[], None] = lambda: None

    @property
    def held(self) -> list[str]:
        """Content digests of what new sequences may run with."""
        return sorted(self._held)

    def restart(self) -> None:
        """A new link begins with all that is held: what was not told need not be."""
        self._untold.clear()

    def take_untold(self) -> list[AdapterState]:
        """States that the scheduler is to be told, once."""
        untold, self._untold = self._untold, []
        return untold

    def load(self, digest: str, artifact: str) -> None:
        """Begins to fetch and load; what is held already is told again."""
        if digest in self._held:
            self._tell(AdapterState(digest, True))
        elif digest not in self._loading:
            self._loading[digest] = asyncio.create_task(self._bring(digest, artifact))

    def drop(self, digests: Iterable[str]) -> None:
        """Takes no new sequence with these; the engine lets go when the last that runs has ended."""
        for digest in digests:
            self._held.discard(digest)
            self._drop(digest)
            self._tell(AdapterState(digest, False))

    async def _bring(self, digest: str, artifact: str) -> None:
        try:
            loaded = await self._fetched(digest, artifact)
        except ArtifactError as error:
            loaded = AdapterLoaded(digest, error.reason, error.message)
        except OSError as error:
            loaded = AdapterLoaded(digest, "ADAPTER_FAILED", f"its files cannot be fetched: {error}")
        del self._loading[digest]
        if loaded.reason:
            _log.error(
                "adapter not loaded", extra={"digest": digest, "reason": loaded.reason, "detail": loaded.message}
            )
        else:
            self._held.add(digest)
            _log.info("adapter loaded", extra={"digest": digest, "rank": loaded.rank, "bytes": loaded.bytes})
        self._tell(AdapterState(digest, not loaded.reason, loaded.reason, loaded.message))

    async def _fetched(self, digest: str, artifact: str) -> AdapterLoaded:
        """Files stay only until the engine has read them: it holds the tensors, and the store the files."""
        if self._store is None:
            return AdapterLoaded(digest, ARTIFACTS_DISABLED, "this worker has no artifact store: set its `artifacts`")
        place = cache_folder() / "adapters"
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as draft:
            folder = await asyncio.to_thread(fetch_folder, self._store, artifact, Path(draft) / "adapter")
            return await self._load(digest, str(folder))

    def _tell(self, state: AdapterState) -> None:
        self._untold.append(state)
        self.on_change()

    async def close(self) -> None:
        """Stops what is on its way."""
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
