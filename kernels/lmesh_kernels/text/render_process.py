"""The helper process of `TemplateSandbox`: reads a job, renders it, writes the answer, until its input ends."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

from lmesh_kernels.text.template import TemplateError, render

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
LONGEST_TEXT = 16 << 20  # characters; what a template writes must not fill the memory of the process that asked


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit()


def _answer(job: bytes) -> dict[str, str]:
    try:
        text = render(**json.loads(job))
    except TemplateError as error:
        return {"reason": error.reason, "message": error.message}
    if len(text) > LONGEST_TEXT:
        message = f"the chat template wrote {len(text)} characters; at most {LONGEST_TEXT} are taken"
        return {"reason": "TEMPLATE_FAILED", "message": message}
    return {"text": text}


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    sink.write(b".")  # ready
    sink.flush()
    while header := source.read(_LENGTH.size):
        out = json.dumps(_answer(source.read(_LENGTH.unpack(header)[0]))).encode()
        sink.write(_LENGTH.pack(len(out)) + out)
        sink.flush()


def main() -> None:
    """Runs until standard input ends; arguments: the parent's process id, the address space in bytes."""
    parent, limit = map(int, sys.argv[1:])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's business
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
