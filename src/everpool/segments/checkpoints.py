"""Checkpoints in an object store: written part by part, the manifest last, and read back."""

from collections.abc import Iterable, Iterator, Sequence

from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, InvalidError, NotFoundError
from everpool.segments.format import (
    Manifest,
    Page,
    Row,
    Run,
    decode_manifest,
    decode_run,
    encode_manifest,
    encode_run,
    new_name,
    read_page_row,
)
from everpool.store import Store

_RUN_BYTES = 8 << 20
_ROW_BYTES = 32
_MOST_DELTAS = 7
_SEGMENT_BYTES = 64 << 20


def write_pages(store: Store, began: int, pages: Iterable[bytes | bytearray]) -> list[Page]:
    """Upload pages, in as few segments as will do; returns where each is, in order.

    `began` is the version at which this, and what follows it, began.
    """
    found: list[Page] = []
    pieces: list[bytes | bytearray] = []
    name, offset = new_name(began), 0
    for page in pages:
        found.append(Page(name, offset, len(page), xxh3_64_intdigest(page)))
        pieces.append(page)
        offset += len(page)
        if offset >= _SEGMENT_BYTES:
            store.put_pieces(key_of_pages(name), pieces, offset)
            name, offset, pieces = new_name(began), 0, []
    if pieces:
        store.put_pieces(key_of_pages(name), pieces, offset)
    return found


def read_pages(store: Store, rows: Sequence[bytes]) -> list[bytes]:
    """Return pages by their index rows, in order; neighbours in a segment are read at once.

    Raises `CorruptionError` for one that is missing or does not match its checksum.
    """
    pages = [read_page_row(row) for row in rows]
    by_segment: dict[str, list[int]] = {}
    for at, page in enumerate(pages):
        by_segment.setdefault(page.segment, []).append(at)
    found: list[bytes] = [b""] * len(pages)
    for segment, places in by_segment.items():
        places.sort(key=lambda at: pages[at].offset)
        ranges: list[tuple[int, int]] = []
        for at in places:
            start, end = pages[at].offset, pages[at].offset + pages[at].length
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        key = key_of_pages(segment)
        try:
            pieces = dict(zip(ranges, store.get_ranges(key, ranges), strict=True))
        except (InvalidError, NotFoundError) as error:
            raise CorruptionError(
                f"the segment {key} is missing or too short ({error.message}): restore it from a "
                "copy of the bucket"
            ) from error
        spans = iter(ranges)
        span = next(spans)
        for at in places:
            page = pages[at]
            while not span[0] <= page.offset < span[1]:
                span = next(spans)
            start = page.offset - span[0]
            data = bytes(pieces[span][start : start + page.length])
            if xxh3_64_intdigest(data) != page.checksum:
                raise CorruptionError(
                    f"bytes {page.offset} to {page.offset + page.length} of the segment {key} do "
                    "not match their checksum: restore it from a copy of the bucket"
                )
            found[at] = data
    return found


def write_runs(
    store: Store, began: int, rows: Iterable[Row], after: int, version: int
) -> list[Run]:
    """Upload rows, which are in the order of their keys, as runs of some megabytes each."""
    runs: list[Run] = []
    part: list[Row] = []
    size = 0
    for key, row in rows:
        part.append((key, row))
        size += len(key) + len(row or b"") + _ROW_BYTES
        if size >= _RUN_BYTES:
            runs.append(_write_run(store, began, part, after, version))
            part, size = [], 0
    if part:
        runs.append(_write_run(store, began, part, after, version))
    return runs


def _write_run(store: Store, began: int, rows: list[Row], after: int, version: int) -> Run:
    data = encode_run(rows)
    key = f"index/{new_name(began)}"
    store.put(key, data)
    return Run(key, len(data), after, version)


def is_due_whole(runs: Sequence[Run], least_bytes: int) -> bool:
    """Whether the next checkpoint writes the whole index, and no more changes on top of these runs.

    So it is when there are none, when there are many changes, or when they are more than the base;
    less than `least_bytes` of them do not count.
    """
    deltas = [run for run in runs if run.after]
    base = sum(run.size for run in runs if not run.after)
    many = len({run.version for run in deltas}) >= _MOST_DELTAS
    return not runs or many or sum(run.size for run in deltas) > max(base, least_bytes)


def read_run(store: Store, run: Run) -> list[Row]:
    """Return a run's rows."""
    return decode_run(run.key, store.get(run.key).data)


def read_runs(store: Store, runs: Iterable[Run]) -> Iterator[Row]:
    """Yield the rows of runs, in order; of rows with one key the last one counts."""
    for run in runs:
        yield from read_run(store, run)


def write_manifest(store: Store, began: int, manifest: Manifest) -> str:
    """Upload a manifest, whose parts are there; returns its key."""
    key = f"checkpoints/{manifest.version:016x}-{new_name(began)}"
    store.put(key, encode_manifest(manifest))
    return key


def read_manifest(store: Store, key: str) -> Manifest:
    """Return a manifest; raises `NotFoundError` when it was collected."""
    return decode_manifest(key, store.get(key).data)


def key_of_pages(segment: str) -> str:
    """Return the key of a page segment."""
    return f"pages/{segment}"
