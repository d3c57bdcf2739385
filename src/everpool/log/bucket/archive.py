"""Reading what is sealed: chunks, tables and large entries, fetched in parallel, and a cache."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from xxhash import xxh3_128_digest

from everpool.errors import ClosedError, CorruptionError, NotFoundError
from everpool.log import Appended
from everpool.log.bucket.draft import MOST_ENTRIES
from everpool.log.bucket.format import (
    CHUNKS,
    ENTRIES,
    TABLES,
    Head,
    Reference,
    Stored,
    decode_chunk,
    decode_table,
    parse_entry,
    parse_span,
)
from everpool.store import Listed, Store

_PARALLEL = 8
_MOST_CHUNKS = 64
A = TypeVar("A")
B = TypeVar("B")
Span = tuple[int, int]

# How much of the chunks is fetched at a time when all is read in order.
_HISTORY_BYTES = 16 << 20


class Archive:
    """The immutable objects of one log.

    All that comes out was compared with its checksum. A `NotFoundError` names an object that is
    gone: whoever reads behind what is trimmed may meet that when its head is an old one.
    """

    def __init__(self, store: Store, prefix: str, cache_bytes: int) -> None:
        self._store = store
        self._prefix = prefix
        self._cache = _Cache(cache_bytes)
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False

    def read(self, head: Head, after: int, limit_bytes: int) -> list[Appended]:
        """Return the entries behind `after`, which must not be trimmed; see `Log.read`."""
        found: list[tuple[int, Stored]] = []
        size = 0
        for position, stored in self._behind(head, after, limit_bytes):
            size += stored.size
            if found and size > limit_bytes:
                break
            found.append((position, stored))
        return list(self._with_bodies(found))

    def _with_bodies(self, found: Sequence[tuple[int, Stored]]) -> Iterator[Appended]:
        """Yield the entries up to the first one that is gone; raises `NotFoundError` there."""
        bodies = self._map(self._body_if_there, [stored for _, stored in found])
        for (position, stored), body in zip(found, bodies, strict=True):
            if isinstance(body, NotFoundError):
                raise body
            yield Appended(position, stored.time_ns, body)

    def history(self, head: Head, after: int, last: int) -> Iterator[Appended]:
        """Yield the entries behind `after` up to `last`, trimmed or not.

        Of what follows nothing is looked at. Before an entry that is gone raises, all that is there
        before it is yielded, for whoever wants no more.
        """
        found: list[tuple[int, Stored]] = []
        size = 0
        gone: NotFoundError | None = None
        entries = self._all(head, after, _HISTORY_BYTES)
        while after < last:
            try:
                after, stored = next(entries, (last, None))
            except NotFoundError as error:
                gone = error
                break
            if stored is not None:
                found.append((after, stored))
                size += stored.size
            if size >= _HISTORY_BYTES:
                yield from self._with_bodies(found)
                found, size = [], 0
        yield from self._with_bodies(found)
        if gone is not None:
            raise gone

    def keys(self, head: Head, after: int) -> Iterator[str]:
        """Yield the keys, below the log's prefix, of what holds the entries behind `after`, which
        must not be trimmed.
        """
        waiting = list(head.references)
        while waiting:
            reference = waiting.pop()
            if reference.last > after:
                yield reference.key
                if reference.level:
                    waiting += self._table(reference, head.log_id)
        for _, stored in self._behind(head, after, _HISTORY_BYTES):
            if stored.data is None:
                yield stored.key

    def find(self, head: Head, id: bytes, after: int) -> int | None:
        """Return where behind `after` the entry of the append `id` is; None: nowhere.

        Raises `NotFoundError` when the entries there cannot be looked through any more.
        """
        for position, stored in self._all(head, after, 1 << 62):
            if stored.id == id:
                return position
        return None

    def garbage(self, head: Head, kept: Sequence[Span]) -> Iterator[Listed]:
        """Yield what only entries outside of the spans need; see `ArchivedLog.garbage`."""
        limit = min(head.sealed, head.trimmed)
        bodies = self._lost_bodies(head, kept, limit)
        for listed in self._store.list(f"{self._prefix}/{CHUNKS}"):
            span = parse_span(listed.key)
            if span is None or span[1] > limit or _meets(span, kept):
                continue
            # Its large entries first: nothing else tells of them.
            for stored in self._chunk_if_there(listed, span, head):
                if stored.data is None:
                    key = f"{self._prefix}/{stored.key}"
                    yield Listed(key, stored.size, listed.modified_ns)
                    bodies.pop(key, None)
            yield listed
        yield from bodies.values()
        for listed in self._store.list(f"{self._prefix}/{TABLES}"):
            span = parse_span(listed.key)
            if span is not None and span[1] <= limit:
                yield listed

    def _lost_bodies(self, head: Head, kept: Sequence[Span], limit: int) -> dict[str, Listed]:
        """Return the large entries of appends that came to nothing, by key."""
        found: dict[bytes, Listed] = {}
        first = limit
        for listed in self._store.list(f"{self._prefix}/{ENTRIES}"):
            parsed = parse_entry(listed.key)
            if parsed is None or parsed[0] >= limit:
                continue
            put_at, id = parsed
            if not any(after <= put_at <= last for after, last in kept):
                found[id] = listed
                first = min(first, put_at)
        # An append may have taken a while, so that the entry stands further on.
        for listed in self._store.list(f"{self._prefix}/{CHUNKS}") if found else ():
            span = parse_span(listed.key)
            if span is not None and span[1] > first and (span[1] > limit or _meets(span, kept)):
                for stored in self._chunk_if_there(listed, span, head):
                    found.pop(stored.id, None)
        for stored in head.entries:
            found.pop(stored.id, None)
        return {listed.key: listed for listed in found.values()}

    def close(self) -> None:
        """End the threads."""
        with self._lock:
            self._closed = True
            if self._threads is not None:
                self._threads.shutdown(wait=False)

    def _all(self, head: Head, after: int, limit_bytes: int) -> Iterator[tuple[int, Stored]]:
        """Yield the entries behind `after`, trimmed or not."""
        trimmed = min(head.sealed, head.trimmed)
        if after < trimmed:
            yield from self._old(head.log_id, after, trimmed)
            after = trimmed
        yield from self._behind(head, after, limit_bytes)

    def _behind(self, head: Head, after: int, limit_bytes: int) -> Iterator[tuple[int, Stored]]:
        """Yield the entries behind `after`; chunks are fetched by the group, as far as needed."""
        if after < head.sealed:
            group: list[Reference] = []
            for reference in self._chunks(head, after):
                group.append(reference)
                if len(group) >= _MOST_CHUNKS or sum(one.size for one in group) >= limit_bytes:
                    yield from self._entries(group, head.log_id, after)
                    group = []
            yield from self._entries(group, head.log_id, after)
        for at in range(max(0, after - head.sealed), len(head.entries)):
            yield head.sealed + 1 + at, head.entries[at]

    def _entries(
        self, group: Sequence[Reference], log_id: bytes, after: int
    ) -> Iterator[tuple[int, Stored]]:
        for reference, entries in zip(
            group, self._map(lambda one: self._chunk(one, log_id), group), strict=True
        ):
            for position, stored in enumerate(entries, reference.first):
                if position > after:
                    yield position, stored

    def _chunks(self, head: Head, after: int) -> Iterator[Reference]:
        """Yield the references to the chunks that hold what is behind `after`."""
        waiting = list(reversed(head.references))
        while waiting:
            reference = waiting.pop()
            if reference.last <= after:
                continue
            if reference.level:
                waiting += reversed(self._table(reference, head.log_id))
            else:
                yield reference

    def _old(self, log_id: bytes, after: int, last: int) -> Iterator[tuple[int, Stored]]:
        """Yield entries that no head refers to any more, from the chunks that are still there.

        Every chunk that exists is true, so any that cover the positions will do.
        """
        start = f"{self._prefix}/{CHUNKS}/{max(0, after + 1 - MOST_ENTRIES):020d}"
        for listed in self._store.list(f"{self._prefix}/{CHUNKS}", after=start):
            span = parse_span(listed.key)
            if span is None or span[1] <= after:
                continue
            if after >= last or span[0] > after + 1:
                break
            chunk = self._chunk(_reference(listed, span), log_id)
            for position, stored in enumerate(chunk, span[0]):
                if after < position <= last:
                    after = position
                    yield position, stored
        if after < last:
            raise NotFoundError(f"the entries {after + 1} to {last} are not there any more")

    def _chunk(self, reference: Reference, log_id: bytes) -> list[Stored]:
        return self._cache.get(
            reference.key,
            lambda: decode_chunk(self._fetch(reference.key), reference, log_id),
            reference.size,
        )

    def _chunk_if_there(self, listed: Listed, span: Span, head: Head) -> list[Stored]:
        """Return a chunk's entries; none when others deleted it, and so its large entries."""
        try:
            return self._chunk(_reference(listed, span), head.log_id)
        except NotFoundError:
            return []

    def _table(self, reference: Reference, log_id: bytes) -> list[Reference]:
        return self._cache.get(
            reference.key,
            lambda: decode_table(self._fetch(reference.key), reference, log_id),
            reference.size,
        )

    def _body(self, stored: Stored) -> bytes:
        if stored.data is not None:
            return stored.data
        key = stored.key

        def fetch() -> bytes:
            data = self._fetch(key)
            if len(data) != stored.size or xxh3_128_digest(data) != stored.hash:
                raise CorruptionError(
                    f"{self._prefix}/{key} is not what was written: restore it from a copy", key=key
                )
            return data

        return self._cache.get(key, fetch, stored.size)

    def _body_if_there(self, stored: Stored) -> bytes | NotFoundError:
        try:
            return self._body(stored)
        except NotFoundError as error:
            return error

    def _fetch(self, key: str) -> bytes:
        return self._store.get(f"{self._prefix}/{key}").data

    def _map(self, function: Callable[[A], B], items: Sequence[A]) -> Iterable[B]:
        """Call the function for all items, in parallel when there are several."""
        if len(items) < 2 or all(isinstance(one, Stored) and one.data is not None for one in items):
            return [function(item) for item in items]
        with self._lock:
            if self._closed:
                raise ClosedError(f"the log in {self._prefix!r} is closed")
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_PARALLEL, "everpool-log")
            results = self._threads.map(function, items)
        return list(results)


def _reference(listed: Listed, span: Span) -> Reference:
    """Return what refers to a chunk, by its name."""
    return Reference(0, listed.size, *span, bytes.fromhex(listed.key.rpartition("-")[2]))


def _meets(span: Span, kept: Sequence[Span]) -> bool:
    """Whether positions from first to last lie in one of the spans, behind after up to last."""
    return any(span[0] <= last and span[1] > after for after, last in kept)


class _Cache:
    """What was fetched last, up to a number of bytes. Two threads may fetch one thing at a time."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[object, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, fetch: Callable[[], B], size: int) -> B:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]  # type: ignore[return-value]
        found = fetch()
        with self._lock:
            if key not in self._kept and size <= self._limit_bytes // 2:
                self._kept[key] = (found, size)
                self._bytes += size
                while self._bytes > self._limit_bytes:
                    self._bytes -= self._kept.popitem(last=False)[1][1]
        return found
