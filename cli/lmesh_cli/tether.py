"""Runs a command that the kernel kills when its parent dies: `python -I -S tether.py PARENT_PID COMMAND...`.

A file of its own, run before the command, because the death signal has to be armed between fork and exec: doing that
in the parent's forked child would run Python code beside the parent's threads, and arming it inside the command would
leave the time until then uncovered. The signal survives the exec. Linux only; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def command(argv: list[str]) -> list[str]:
    """`argv` wrapped so that it dies with the calling process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def main(parent: int, argv: list[str]) -> None:
    """Arms the death signal and becomes `argv`; does not return."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before the signal was armed
            os._exit(1)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
