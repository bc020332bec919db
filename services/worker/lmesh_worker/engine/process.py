"""The engine process: `python -P -m lmesh_worker.engine.process --source MODEL --fd N`.

Its settings, an `EngineConfig`, are the first frame on the descriptor.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import sys

import msgspec
from lmesh_kernels.blocks import granule_blocks
from lmesh_kernels.models.config import UnsupportedModelError
from lmesh_kernels.models.safetensors_folder import WeightsError
from lmesh_kernels.platforms.platform import PlatformError
from lmesh_kernels.text.resolve import ModelNotFoundError, resolve

from lmesh_worker.engine import log_lines
from lmesh_worker.engine.channel import Channel, PeerGoneError
from lmesh_worker.engine.config import ConfigError, EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.engine.quarantine import EngineBrokenError
from lmesh_worker.messages import (
    Abort,
    Command,
    DropAdapter,
    Fatal,
    LoadAdapter,
    Progress,
    ProgressChange,
    Ready,
    Shutdown,
    Start,
)

log = logging.getLogger("lmesh_worker.engine")

_POLL_S = 0.02  # how often an idle engine looks for an adapter that is being read
# What a person can put right: said in their own words, without a traceback.
_START_ERRORS = (
    ConfigError,
    ModelNotFoundError,
    PlatformError,
    UnsupportedModelError,
    WeightsError,
    msgspec.DecodeError,
)


def main() -> int:
    """Serves one server until it says Shutdown or goes away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--fd", type=int, required=True)
    args = parser.parse_args()
    log_lines.setup(os.environ.get("LMESH_WORKER_LOG_LEVEL", "info"))
    # Both signals are the server's business: it drains its requests, and they need this process until then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=args.fd))
    try:
        return _serve(channel, args.source)
    except PeerGoneError:
        log.warning("the server is gone; leaving")
        return 0


def _serve(channel: Channel, source: str) -> int:
    try:
        config = msgspec.msgpack.decode(channel.first_frame(), type=EngineConfig)
        channel.send(ProgressChange(Progress.COMPILING))
        engine = Engine(config, resolve(source, text_only=config.load_format == "dummy"))
        engine.warm_up()
    except _START_ERRORS as error:
        channel.send(Fatal("ENGINE_START_FAILED", str(error)))
        return 1
    except PeerGoneError:
        raise
    except Exception as error:  # the process's edge: the server is told, whatever it was
        log.exception("the engine did not start")
        channel.send(Fatal("ENGINE_START_FAILED", f"{type(error).__name__}: {error}"))
        return 1
    _settle()
    channel.send(ProgressChange(Progress.OK))
    channel.send(_ready(engine))
    try:
        loop(engine, channel)
    except EngineBrokenError as error:
        channel.send(Fatal("ENGINE_DEVICE_LOST", str(error)))
        return 1
    except PeerGoneError:
        raise
    except Exception as error:  # a bug of ours outside of any step
        log.exception("the engine cannot go on")
        channel.send(Fatal("ENGINE_FAILED", f"{type(error).__name__}: {error}"))
        return 1
    engine.close()
    return 0


def loop(engine: Engine, channel: Channel) -> None:
    """Commands, a step, its report; waits for commands only when there is nothing to do."""
    while True:
        idle = not engine.has_work
        wait = idle and not engine.cold
        for command in channel.receive(wait=wait, at_most_s=_POLL_S if engine.adapters.reading else None):
            if not _apply(engine, command):
                return
        if idle and engine.cold and not engine.has_work:
            _warm_next(engine, channel)
        for loaded in engine.adapters.loaded():
            channel.send(loaded)
        report = engine.step()
        if report is not None:
            channel.send(report)


def _warm_next(engine: Engine, channel: Channel) -> None:
    """First-time work while nobody waits; a request that comes meanwhile waits for one piece of it."""
    channel.send(ProgressChange(Progress.COMPILING))
    try:
        engine.warm_next()
    except Exception as error:  # noqa: BLE001 - nobody asked for it, and a request may ask for less
        log.warning("a step that came for the first time failed: %s: %s", type(error).__name__, error)
    if not engine.cold:
        _settle()
        log.info("the usual steps have come for the first time", extra={"captures": engine.captures})
    channel.send(ProgressChange(Progress.OK))


def _settle() -> None:
    """What is alive now lives as long as the process: a full collection of it stopped an engine's steps for 99 ms."""
    gc.collect()
    gc.freeze()


def _apply(engine: Engine, command: Command) -> bool:
    """Carries out one command; False for Shutdown."""
    if isinstance(command, Start):
        engine.add(command)
    elif isinstance(command, Abort):
        engine.abort(command.key)
    elif isinstance(command, LoadAdapter):
        engine.adapters.load(command.digest, command.folder)
    elif isinstance(command, DropAdapter):
        engine.adapters.drop(command.digest)
    return not isinstance(command, Shutdown)


def _ready(engine: Engine) -> Ready:
    info, plan = engine.platform.describe(), engine.plan
    return Ready(
        device=f"{info.kind}: {info.name} ({', '.join(info.notes)})",
        max_model_len=plan.max_model_len,
        vocab_size=engine.limits.vocab_size,
        block_size=plan.block_size,
        kv_blocks=plan.kv_blocks,
        max_seqs=plan.max_seqs,
        max_step_tokens=plan.max_step_tokens,
        weights_version=engine.config.weights_version,
        plan=plan.lines,
        pid=os.getpid(),
        kv_format=engine.kv_format,
        kv_granule_blocks=granule_blocks(plan.block_size),
    )


if __name__ == "__main__":
    sys.exit(main())
