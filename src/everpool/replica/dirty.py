"""Which blocks of memory were written, and since when."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from everpool.records import payload_size
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.index import Resolved, TailRow
from everpool.verdict import Add, Bind, BindMemory, Effect, Store

# Blocks of memory that have a checksum of their own.
BLOCK_SHIFT = 16


class Flushed(NamedTuple):
    """What was made durable: memory up to `version`, and the checksums of changed blocks."""

    version: int
    blocks: dict[int, dict[int, int]]


class Dirty:
    """Which blocks of which memory were written."""

    def __init__(self) -> None:
        self.blocks: dict[int, set[int]] = {}

    def add(self, effect: Effect) -> None:
        """Note what the effect writes."""
        if isinstance(effect, Store):
            size = payload_size(effect.payload)
        elif isinstance(effect, Add):
            size = len(effect.delta)
        elif isinstance(effect, BindMemory):
            self.blocks.setdefault(effect.id, set())  # its length
            return
        else:
            return
        if size:
            first, last = effect.offset >> BLOCK_SHIFT, (effect.offset + size - 1) >> BLOCK_SHIFT
            self.blocks.setdefault(effect.id, set()).update(range(first, last + 1))

    def add_all(self, effects: Iterator[tuple[int, Effect, Resolved]], after: int) -> None:
        """Note what the effects of versions after `after` write."""
        for version, effect, _ in effects:
            if version > after:
                self.add(effect)


class Written:
    """What a process's own commits of versions after `base`, up to `top`, wrote to memory.

    It spares reading the tail, as long as no other process commits in between.
    """

    def __init__(self, base: int) -> None:
        self.base = self.top = base
        self._dirty = Dirty()

    def add(self, before: int, version: int, applied: list[tuple[Effect, Resolved]]) -> None:
        """Note what the entry wrote that led from version `before` to `version`."""
        if before != self.top:
            self.base, self._dirty = before, Dirty()
        for effect, _ in applied:
            if not isinstance(effect, Bind):
                self._dirty.add(effect)
        self.top = version

    def between(
        self, after: int, up_to: int, tail: Callable[[int], Iterator[tuple[int, TailRow]]]
    ) -> Dirty:
        """Return what the versions after `after`, up to `up_to`, wrote, and what is known of
        earlier ones. `tail` yields the entries behind a version, for what is not known.
        """
        dirty = self._dirty
        for low, high in ((after, min(self.base, up_to)), (max(after, self.top), up_to)):
            if low < high:
                for last, row in tail(low):
                    dirty.add_all(effects_of(entry_of(row), row), low)
                    if last >= high:
                        break
        return dirty
