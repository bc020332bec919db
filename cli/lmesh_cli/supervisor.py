"""The supervisor of a local mesh: starts the services in order, keeps them up, publishes their state, stops them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence

from lmesh_cli import log_files, process_table
from lmesh_cli.child import Child
from lmesh_cli.restart import RestartPolicy
from lmesh_cli.run_dir import MeshState, Phase, RunDir
from lmesh_cli.services import ServiceSpec

_log = logging.getLogger(__name__)
_LOG_CHECK_S = 5.0
SUPERVISOR = "supervisor"

OnStage = Callable[[int, MeshState], Awaitable[None]]


async def _nothing(stage: int, state: MeshState) -> None:
    """No work between the stages."""


class Supervisor:
    """Runs `specs` in `run_dir`, which the caller has locked.

    `after_stage(stage, state)` is called when all services of a start stage are ready and may add to the state.
    """

    def __init__(
        self,
        run_dir: RunDir,
        specs: Sequence[ServiceSpec],
        *,
        plan: dict[str, object] | None = None,
        redis: dict[str, str] | None = None,
        after_stage: OnStage = _nothing,
        policy: Callable[[], RestartPolicy] = RestartPolicy,
    ) -> None:
        self._run_dir = run_dir
        self._children = [Child(spec, run_dir, self._publish, policy()) for spec in specs]
        self._after_stage = after_stage
        self._changed = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self.state = MeshState(
            pid=os.getpid(),
            born=process_table.birth(os.getpid()) or "",
            plan=plan or {},
            redis=redis or {},
            services=[child.state for child in self._children],
        )

    async def run(self) -> int:
        """Until SIGTERM or SIGINT, or until the mesh cannot start; the exit status. A second signal kills at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        bounding = asyncio.create_task(self._bound_logs())
        try:
            if await self._start():
                self._set_phase("ready")
                _log.info("mesh ready")
                await self._stop_asked.wait()
        finally:
            bounding.cancel()
            failed = self.state.phase == "failed"
            if not failed:
                self._set_phase("stopping")
            await self._stop()
        if not failed:
            self._set_phase("stopped")
        return 1 if failed else 0

    def request_stop(self) -> None:
        """Asks for the orderly stop; asked again, kills what is left."""
        if self._stop_asked.is_set():
            for child in self._children:
                child.kill()
        self._stop_asked.set()
        self._changed.set()

    async def _start(self) -> bool:
        for stage, children in _by_stage(self._children, lambda child: child.spec.start_stage):
            for child in children:
                child.start()
            if not await self._stage_ready(children):
                return False
            await self._after_stage(stage, self.state)
            self._publish()
        return True

    async def _stage_ready(self, children: Sequence[Child]) -> bool:
        while not self._stop_asked.is_set():
            self._changed.clear()
            if failed := next((c for c in children if c.state.state == "failed"), None):
                self.state.error = failed.state.message
                self._set_phase("failed")
                return False
            if all(child.state.state == "ready" for child in children):
                return True
            await self._changed.wait()
        return False

    async def _stop(self) -> None:
        for _, children in _by_stage(self._children, lambda child: child.spec.stop_stage):
            await asyncio.gather(*(child.stop() for child in children))

    async def _bound_logs(self) -> None:
        paths = [self._run_dir.log(name) for name in (SUPERVISOR, *(child.spec.name for child in self._children))]
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            for path in paths:
                await asyncio.to_thread(log_files.bound, path)

    def _set_phase(self, phase: Phase) -> None:
        self.state.phase = phase
        self._publish()

    def _publish(self) -> None:
        if self.state.phase in ("ready", "degraded"):
            well = all(child.state.state == "ready" for child in self._children)
            self.state.phase = "ready" if well else "degraded"
        self._run_dir.write(self.state)
        self._changed.set()


def _by_stage(children: Sequence[Child], key: Callable[[Child], int]) -> Iterator[tuple[int, list[Child]]]:
    for stage, group in itertools.groupby(sorted(children, key=key), key=key):
        yield stage, list(group)
