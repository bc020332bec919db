"""How often a client is written to: all streams of a process share its event loop."""

from __future__ import annotations

# A message costs a gateway 0.04 to 0.15 ms, by the machine, and its client about as much; an id 0.015 ms. So a loop
# with many streams writes fewer messages with more ids each, rather than fall behind its workers: it writes for half of
# its time at most, to 16 streams 5 ms apart each, and to a lone one each id as it comes.
# Of one core of an Intel Xeon a token of one of 13 streams at 600 steps a second takes 0.066 ms so, and 0.098 without.
STREAM_S = 0.0003
LONGEST_S = 0.1  # however many there are: text should not seem to stutter


class Pace:
    """Of one gateway process; `streams` counts the choices that clients are reading."""

    def __init__(self) -> None:
        self.streams = 0

    @property
    def interval_s(self) -> float:
        """A stream's next message follows its last no sooner than this."""
        return min(STREAM_S * self.streams, LONGEST_S)
