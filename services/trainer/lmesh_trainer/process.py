"""A job's process: `python -P -m lmesh_trainer.process --folder JOB --socket PATH`.

Its settings are `spec.json` in the folder. Under torchrun every rank is one of these, and rank 0 speaks for all. On
other hosts the first local rank says how it ended, and nothing else.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from lmesh_kernels.platforms.host_memory import keep_freed_memory

from lmesh_trainer import events
from lmesh_trainer.errors import JobError, unforeseen
from lmesh_trainer.folder_lock import JobBusyError, own_folder
from lmesh_trainer.job import run_job
from lmesh_trainer.messages import Wish, frame
from lmesh_trainer.ranks import is_lost
from lmesh_trainer.spec import read_spec

log = logging.getLogger("lmesh_trainer.process")


class ServerGoneError(ConnectionError):
    """Nobody is left to run this job for; its checkpoints are."""


class Line:
    """The socket to the trainer's server."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = b""
        threading.Thread(target=self._leave_with_server, daemon=True).start()

    def _leave_with_server(self) -> None:
        """Ends the process when the server is gone, also while a model loads and nothing is said for minutes: another
        trainer may be waiting for the folder. What is on disk is whole at any moment.
        """
        gone = select.poll()
        gone.register(self._socket, getattr(select, "POLLRDHUP", 0))  # POLLHUP is always told
        gone.poll()
        os._exit(1)

    def report(self, event: events.Event) -> None:
        """Tells the server. Raises ServerGoneError."""
        try:
            self._socket.sendall(frame(event))
        except OSError as error:
            raise ServerGoneError(str(error)) from error

    def asked(self) -> Wish | None:
        """The latest wish; CANCEL is never taken back. Raises ServerGoneError."""
        while self._poll.poll(0):
            data = self._socket.recv(4096)
            if not data:
                raise ServerGoneError("the server closed the line")
            self._buffer += data
        told = self._buffer.decode().split()
        return None if not told else Wish.CANCEL if Wish.CANCEL in told else Wish.STOP


def _silent(event: events.Event) -> None:
    """What ranks other than the first say."""


def _voice(line: Line) -> Callable[[events.Event], None]:
    """What this rank may say: all of it, only its end, or nothing."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        return line.report
    if os.environ.get("LOCAL_RANK") != "0":
        return _silent
    return lambda event: line.report(event) if isinstance(event, events.Ended) else None


def _agreed(line: Line) -> Wish | None:
    """What rank 0 was asked, on every rank: all must leave at the same step."""
    if not dist.is_initialized():
        return line.asked()
    wish = line.asked() if dist.get_rank() == 0 else None
    told = torch.tensor([0 if wish is None else 1 + list(Wish).index(wish)])
    dist.broadcast(told, 0)
    return None if not int(told) else list(Wish)[int(told) - 1]


def main() -> int:
    """Runs the job; the exit status is 0 whenever the server was told how it ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--socket", required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    line = Line(args.socket)  # every rank's: none outlives its server
    report: Callable[[events.Event], None] = line.report
    ranked = int(os.environ.get("WORLD_SIZE", "1")) > 1
    keep_freed_memory()
    try:
        if ranked:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        report = _voice(line)
        first = not dist.is_initialized() or dist.get_rank() == 0
        with own_folder(args.folder) if first else nullcontext():
            run_job(read_spec((args.folder / "spec.json").read_bytes()), args.folder, report, lambda: _agreed(line))
    except JobBusyError as error:
        report(events.Ended(outcome=events.Outcome.FAILED, reason="JOB_BUSY", message=str(error)))
        return 1
    except ServerGoneError:
        log.warning("the trainer's server is gone; leaving")
        return 1
    except Exception as error:  # the process's edge: the server is told, whatever it was
        log.exception("the job failed")
        told = JobError("JOB_DIED", str(error)) if ranked and is_lost(error) else unforeseen(error)
        with suppress(ServerGoneError):
            report(events.Ended(outcome=events.Outcome.FAILED, reason=told.reason, message=told.message))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def leave_ranks(status: int) -> NoReturn:
    """Ends a process that was one of several ranks, without the interpreter's own end.

    While that goes on, threads of the collectives may ask for the interpreter, are made to exit in the midst of C++,
    and abort the process ("terminate called without an active exception"; seen once in some 30 runs of all tests). The
    launcher then kills the other ranks, of which one may still be publishing.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    ended = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave_ranks(ended)
    sys.exit(ended)
