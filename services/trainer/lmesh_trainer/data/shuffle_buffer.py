"""A stream in a drawn order: a bounded number of its items is held, and each draw takes one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from lmesh_trainer.data.order import drawn_index

T = TypeVar("T")


class ShuffleBuffer(Generic[T]):
    """Every item of a source once, in an order that is a function of seed, epoch, size and the source alone.

    `held` and `drawn` are all there is to save: given back with a source that goes on where the first one was, the
    draws go on as they would have. Whatever the source raises comes out when its item is read, `size` draws before it
    could be taken.
    """

    def __init__(
        self, source: Iterator[T], *, size: int, seed: int, epoch: int, held: Iterable[T] = (), drawn: int = 0
    ) -> None:
        self._source, self._seed, self._epoch = source, seed, epoch
        self.held = list(held)
        self.drawn = drawn
        while len(self.held) < size and self._read(len(self.held)):
            pass

    @property
    def empty(self) -> bool:
        """Whether every item was taken."""
        return not self.held

    def draw(self) -> T:
        """The next item; IndexError when there is none."""
        if not self.held:
            raise IndexError("every item of the stream was taken")
        at = drawn_index(self._seed, self._epoch, self.drawn, len(self.held))
        self.drawn += 1
        item = self.held[at]
        if not self._read(at):
            self.held[at] = self.held[-1]
            self.held.pop()
        return item

    def _read(self, at: int) -> bool:
        """The source's next item into a place, which may be one behind the last; False at the source's end."""
        for item in self._source:
            self.held[at : at + 1] = [item]
            return True
        return False
