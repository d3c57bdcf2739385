"""What an entry did, worked out once and written down, so that it can be done again.

`resolve` and `effects_of` are inverse: the tail keeps an entry's bytes with what its operations
came to, and from both the effects come back without asking the index.
"""

from collections.abc import Callable, Iterator

import numpy as np

from everpool.errors import CorruptionError
from everpool.records import (
    Allocate,
    Checkpoint,
    Collect,
    Delete,
    Entry,
    Fence,
    FetchAdd,
    Floor,
    Operation,
    Pin,
    Put,
    Restore,
    Retain,
    Unpin,
    Write,
    decode_entry,
)
from everpool.replica.index import Resolved, TailRow
from everpool.verdict import (
    Add,
    Bind,
    BindMemory,
    Effect,
    SetCheckpoint,
    SetFence,
    SetFloor,
    SetHorizon,
    SetPin,
    Store,
    Unbind,
    Verdict,
)

_PAGE_SHIFT = 12
_PAGE_BYTES = 1 << _PAGE_SHIFT


def add_numbers(old: bytes, delta: bytes, dtype: str) -> bytes:
    """Return `old + delta` as numbers of type `dtype`; integers wrap around."""
    with np.errstate(all="ignore"):
        total = np.frombuffer(old, dtype) + np.frombuffer(delta, dtype)
        return total.astype(dtype).tobytes()  # sums come in the machine's byte order


def effects_of(entry: Entry, row: TailRow) -> Iterator[tuple[int, Effect, Resolved]]:
    """Yield version, effect and what it came to, for all that the entry's records did."""
    if len(entry.records) != len(row.outcomes):
        raise CorruptionError(f"the tail's entry after {row.first_version - 1} is inconsistent")
    for at, (record, outcome) in enumerate(zip(entry.records, row.outcomes, strict=True)):
        if outcome.verdict == Verdict.COMMITTED:
            for operation, resolved in zip(record.operations, outcome.resolved, strict=True):
                yield row.first_version + at, _effect(operation, resolved), resolved


def entry_of(row: TailRow) -> Entry:
    """Return the entry that a row of the tail holds."""
    return decode_entry(row.entry)


def _effect(operation: Operation, resolved: Resolved) -> Effect:
    match operation:
        case Write(_, offset, payload):
            return Store(resolved.id, offset, payload)
        case Put(name, payload):
            return Bind(name, resolved.id, payload, resolved.size)
        case FetchAdd(_, offset, dtype, delta):
            return Add(resolved.id, offset, dtype, delta)
        case Delete(name):
            return Unbind(name, resolved.id, resolved.size)
        case Allocate(name, size, header):
            return BindMemory(name, resolved.id, size, header)
        case Floor():
            return SetFloor(resolved.size)
        case Fence(session, _):
            return SetFence(session, None)
        case Checkpoint(version, key):
            return SetCheckpoint(version, key)
        case Pin(name, _, until_ns, lock):
            return SetPin(name, resolved.size, until_ns, lock)
        case Unpin(name):
            return SetPin(name, -1)
        case Collect():
            return SetHorizon(None, operation)
        case Retain() | Restore():
            return SetHorizon(None, None)


class PendingStores:
    """The stores of one entry that memory does not have yet, for additions to read.

    Whole pages are built only where an addition looks. `read_memory(id, offset, size)` returns
    bytes as they are before the entry.
    """

    def __init__(self, read_memory: Callable[[int, int, int], bytes]) -> None:
        self._read = read_memory
        self._stores: dict[int, list[tuple[int, bytes | memoryview]]] = {}
        self._pages: dict[int, dict[int, bytearray]] = {}

    def store(self, id: int, offset: int, data: bytes | memoryview) -> None:
        """Note a store."""
        known = self._stores.get(id)
        if known is None:
            self._stores[id] = [(offset, data)]
        else:
            known.append((offset, data))
        pages = self._pages.get(id)
        if pages:
            first, last = offset >> _PAGE_SHIFT, (offset + len(data) - 1) >> _PAGE_SHIFT
            touched = range(first, last + 1) if last - first < len(pages) else list(pages)
            for number in touched:
                page = pages.get(number)
                if page is not None:
                    overlay(page, number << _PAGE_SHIFT, offset, data)

    def read(self, id: int, offset: int, size: int, limit: int) -> bytes:
        """Return bytes of memory `id`, which has `limit` of them, with the pending stores."""
        found = b""
        while len(found) < size:
            at = offset + len(found)
            page = self._page(id, at >> _PAGE_SHIFT, limit)
            start = at & (_PAGE_BYTES - 1)
            found += page[start : start + size - len(found)]
        return found

    def _page(self, id: int, number: int, limit: int) -> bytearray:
        pages = self._pages.setdefault(id, {})
        page = pages.get(number)
        if page is None:
            start = number << _PAGE_SHIFT
            page = bytearray(self._read(id, start, min(_PAGE_BYTES, limit - start)))
            for offset, data in self._stores.get(id, ()):
                overlay(page, start, offset, data)
            pages[number] = page
        return page


def overlay(target: bytearray, start: int, offset: int, data: bytes | memoryview) -> None:
    """Copy into `target`, whose first byte is at `start`, what `data` at `offset` covers of it."""
    low = max(start, offset)
    high = min(start + len(target), offset + len(data))
    if low < high:
        target[low - start : high - start] = memoryview(data)[low - offset : high - offset]
