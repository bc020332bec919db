"""The helper process of `TemplateSandbox`: reads a job, renders it, writes the answer, until its input ends."""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import struct
import sys
from typing import BinaryIO

from lmesh_kernels.text.template import TemplateError, render

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answer(job: bytes) -> dict[str, str]:
    try:
        return {"text": render(**json.loads(job))}
    except TemplateError as error:
        return {"reason": error.reason, "message": error.message}


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    sink.write(b".")  # ready
    sink.flush()
    while header := source.read(4):
        out = json.dumps(_answer(source.read(_LENGTH.unpack(header)[0]))).encode()
        sink.write(_LENGTH.pack(len(out)) + out)
        sink.flush()


def main() -> None:
    """Runs until standard input ends; the argument is the address space in bytes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's business
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
