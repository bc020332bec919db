"""What a trainer's server and a job's process say to each other, torch-free: frames on a Unix socket.

Up: events, each a 4-byte little-endian length and msgpack. Down: wishes, a line each.
"""

from __future__ import annotations

import struct
from enum import StrEnum

import msgspec

from lmesh_trainer.events import Event

LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Event)


class Wish(StrEnum):
    """What a job may be asked while it runs."""

    STOP = "stop"  # with a checkpoint
    CANCEL = "cancel"  # at once


def frame(event: Event) -> bytes:
    """An event as it goes over the socket."""
    body = _encoder.encode(event)
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Event:
    """The event of a frame's body. Raises msgspec.DecodeError."""
    event: Event = _decoder.decode(body)
    return event
