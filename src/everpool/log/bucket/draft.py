"""What one swap makes of a head: a pure function of the head before and what is asked of it."""

from collections.abc import Sequence
from typing import NamedTuple

from everpool.log.bucket.format import (
    Head,
    Reference,
    Stored,
    encode_chunk,
    encode_head,
    encode_table,
)

MOST_ENTRIES = 1024
"""How many entries a head, and so a chunk, holds at most."""

_FAN = 32
# Large entries of so many heads' bytes stand in one head at most: they go with its chunk only.
_BODIES = 64


class Written(NamedTuple):
    """The head to swap in, its bytes, and what has to be put before: (key, bytes) of each."""

    head: Head
    data: bytes
    objects: list[tuple[str, bytes]]


class Draft:
    """A head in the making, from the one before."""

    def __init__(self, base: Head, limit_bytes: int) -> None:
        self._base = base
        self._limit_bytes = limit_bytes
        self._sealed = base.sealed
        self._references = list(base.references)
        self._old = list(base.entries)
        self._new: list[Stored] = []
        self._used = sum(one.stored_bytes for one in base.entries)
        self._bodies = sum(one.size for one in base.entries if one.data is None)
        self._trimmed, self._note = base.trimmed, base.note
        self._objects: list[tuple[str, bytes]] = []

    @property
    def end(self) -> int:
        """The position of the last entry so far."""
        return self._sealed + len(self._old) + len(self._new)

    def append(self, stored: Stored) -> bool:
        """Add an entry; False when it must wait for the next swap. The first one never must."""
        if self._full(stored) and self._old:
            self._seal()
        if self._full(stored) and self._new:
            return False
        self._new.append(stored)
        self._used += stored.stored_bytes
        self._bodies += stored.size if stored.data is None else 0
        return True

    def trim(self, position: int, note: bytes) -> None:
        """Trim up to `position`, unless more was trimmed already."""
        position = min(position, self.end)
        if position >= self._trimmed:
            self._trimmed, self._note = position, note

    def changed(self) -> bool:
        """Whether there is anything to swap."""
        trimmed = (self._trimmed, self._note) != (self._base.trimmed, self._base.note)
        return bool(self._new) or trimmed

    def write(self, log_id: bytes, nonce: bytes) -> Written:
        """Return the head and all that it names and that is not there yet."""
        self._references = [one for one in self._references if one.last > self._trimmed]
        self._fold(log_id)
        entries = [*self._old, *self._new]
        head = Head(
            log_id=log_id,
            nonce=nonce,
            generation=self._base.generation + 1,
            sealed=self._sealed,
            trimmed=self._trimmed,
            time_ns=entries[-1].time_ns if entries else self._base.time_ns,
            note=self._note,
            references=self._references,
            entries=entries,
        )
        return Written(head, encode_head(head), self._objects)

    def _full(self, stored: Stored) -> bool:
        count = len(self._old) + len(self._new)
        return (
            count >= MOST_ENTRIES
            or self._used + stored.stored_bytes > self._limit_bytes
            or self._bodies > _BODIES * self._limit_bytes
        )

    def _seal(self) -> None:
        """Seal what stood in the head before; never what this swap adds, for it may lose."""
        reference, data = encode_chunk(self._base.log_id, self._sealed + 1, self._old)
        self._objects.append((reference.key, data))
        self._references.append(reference)
        self._sealed = reference.last
        self._old = []
        self._used = sum(one.stored_bytes for one in self._new)
        self._bodies = sum(one.size for one in self._new if one.data is None)

    def _fold(self, log_id: bytes) -> None:
        """Keep the head short: of many references of one level, the oldest go into a table."""
        level = 0
        while True:
            of_level = [one for one in self._references if one.level == level]
            if not of_level and all(one.level < level for one in self._references):
                return
            if len(of_level) > 2 * _FAN:
                self._replace(of_level[:_FAN], log_id)
            level += 1

    def _replace(self, folded: Sequence[Reference], log_id: bytes) -> None:
        reference, data = encode_table(log_id, folded)
        self._objects.append((reference.key, data))
        at = self._references.index(folded[0])
        self._references[at : at + len(folded)] = [reference]
