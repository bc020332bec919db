"""One supervised process: started, watched until ready, started again when it dies, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Literal

from lmesh_cli import log_files, process_table, tether
from lmesh_cli.restart import RestartPolicy
from lmesh_cli.run_dir import RunDir, ServiceState
from lmesh_cli.services import ServiceSpec

_log = logging.getLogger(__name__)
_POLL_S = 0.1


class Child:
    """Runs `spec` until `stop`, or until the policy gives it up; `on_change` hears of every change of `state`."""

    def __init__(
        self, spec: ServiceSpec, run_dir: RunDir, on_change: Callable[[], None], policy: RestartPolicy | None = None
    ) -> None:
        self.spec = spec
        self.state = ServiceState(name=spec.name, log=str(run_dir.log(spec.name)))
        self._log_path = run_dir.log(spec.name)
        self._cwd = run_dir.path
        self._on_change = on_change
        self._policy = policy or RestartPolicy()
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts it in the background."""
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the spec's timeout; returns when its whole process group is gone."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    def kill(self) -> None:
        """Cuts a running `stop` short."""
        self._killing.set()

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            begin = loop.time()
            status = await self._run_once()
            if self._stopping.is_set():
                break
            delay = self._policy.after_death(
                status=status, lived_s=loop.time() - begin, ready=self.state.state == "ready"
            )
            words = _how_it_died(status)
            _log.error("service died", extra={"child": self.spec.name, "how": words, "retry_in_s": delay})
            if delay is None:
                self._change(
                    "failed", f"{self.spec.name} {words}; given up after {self._policy.deaths} deaths in a row"
                )
                return
            self.state.restarts += 1
            self._change("restarting", words)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()
        self._change("stopped")

    async def _run_once(self) -> int:
        self.spec.prepare()
        with log_files.open_append(self._log_path) as log:
            process = await asyncio.create_subprocess_exec(
                *tether.command(list(self.spec.argv)),
                env={**os.environ, **self.spec.env},
                cwd=self._cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own: swept when it ends, spared the terminal's Ctrl-C
            )
        self.state.pid, self.state.born = process.pid, process_table.birth(process.pid) or ""
        self._change("starting")
        prober = asyncio.create_task(self._probe_until_ready())
        exited = asyncio.create_task(process.wait())
        asked = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({exited, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                await self._terminate(process.pid, exited)
        finally:
            prober.cancel()
            asked.cancel()
            await asyncio.gather(prober, asked, return_exceptions=True)
            process_table.signal_group(process.pid, signal.SIGKILL)
        return await exited

    async def _probe_until_ready(self) -> None:
        while not await self.spec.probe():  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(_POLL_S)
        self._change("ready")

    async def _terminate(self, pid: int, exited: asyncio.Task[int]) -> None:
        # The leader alone is asked: it stops its own processes in its own order.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        killed = asyncio.create_task(self._killing.wait())
        await asyncio.wait({exited, killed}, timeout=self.spec.stop_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if not exited.done():
            _log.error("service did not stop in time", extra={"child": self.spec.name})

    def _change(
        self, state: Literal["starting", "ready", "restarting", "failed", "stopped"], message: str = ""
    ) -> None:
        self.state.state, self.state.message = state, message
        self._on_change()


def _how_it_died(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
