"""Ports on the loopback interface: whether one is free, and which one to take."""

from __future__ import annotations

import errno
import socket

HOST = "127.0.0.1"


class PortTakenError(ValueError):
    """A port that the user asked for is in use."""


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that has just stopped do not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
        return True


def require(port: int, *, purpose: str, option: str) -> None:
    """Raises PortTakenError, naming the port and the option that chooses another, unless `port` is free."""
    if not is_free(port):
        raise PortTakenError(
            f"port {port} on {HOST}, wanted for {purpose}, is taken; choose another with {option} PORT"
        )


def pick(count: int, *, preferred: tuple[int, ...] = (), avoid: frozenset[int] = frozenset()) -> list[int]:
    """`count` different free ports: first the preferred ones that are free, then any; none of `avoid`."""
    found = [port for port in dict.fromkeys(preferred) if port not in avoid and is_free(port)][:count]
    held: list[socket.socket] = []  # kept bound until all are found, so that none comes twice
    try:
        while len(found) < count:
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(probe)
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
            if port not in avoid and port not in found:
                found.append(port)
    finally:
        for probe in held:
            probe.close()
    return found
