"""Starts a trainer: settings, a look at the device by a process that may load torch, then the server."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from lmesh_chassis import lifecycle, logs, tls, tracing
from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.settings import exit_unless, load_or_exit

from lmesh_trainer.config import TrainerSettings
from lmesh_trainer.queries.inquiry import inquire
from lmesh_trainer.queries.questions import Probe, Probed, Refused
from lmesh_trainer.trainer import Trainer

_log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 120.0


def main() -> None:
    """The process's entry; exits 0 after a drain, 1 when the device or the artifacts' folder cannot be used, 2 on a
    bad setting.
    """
    settings = load_or_exit(TrainerSettings, service="trainer")
    logs.setup("trainer", settings.log_level)
    exit_unless(lambda: tls.from_settings(settings), service="trainer")
    sys.exit(lifecycle.run(lambda shutdown: _serve(settings, shutdown)))


async def _serve(settings: TrainerSettings, shutdown: Shutdown) -> int:
    tracing.setup("trainer", settings.otlp_endpoint)
    try:
        device = await _device(settings)
        return 1 if device is None else await Trainer(settings, device).run(shutdown)
    except (OSError, ArtifactError) as error:
        _log.error("the trainer cannot start", extra={"detail": str(error)})
        return 1
    finally:
        tracing.shutdown()


async def _device(settings: TrainerSettings) -> str | None:
    """The device in words; None, and an error in the log, where it cannot be used."""
    with tempfile.TemporaryDirectory(prefix="lmesh-probe-") as place:
        question = Probe(device=settings.device, threads=settings.threads)
        reply = await inquire(question, Path(place), timeout_s=_PROBE_TIMEOUT_S)
    if isinstance(reply, Probed):
        return reply.device
    reason, message = (reply.reason, reply.message) if isinstance(reply, Refused) else ("QUERY_FAILED", str(reply))
    _log.error("the device cannot be used", extra={"reason": reason, "detail": message})
    return None


if __name__ == "__main__":
    main()
