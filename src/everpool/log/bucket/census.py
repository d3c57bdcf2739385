"""What a log consists of, as one of its heads says: for whoever wants to keep all of it."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from everpool.log import Appended
from everpool.log.bucket.archive import Archive
from everpool.log.bucket.format import HEAD_KEY, decode_head
from everpool.store import Store

_CACHE_BYTES = 32 << 20


class Census(NamedTuple):
    """The note that came with the last trim, the keys of the objects, and the entries behind it."""

    start: bytes
    objects: list[str]
    entries: Iterator[Appended]


def head_key(prefix: str) -> str:
    """Return the key of a log's head."""
    return f"{prefix}/{HEAD_KEY}"


@contextlib.contextmanager
def census(store: Store, prefix: str, data: bytes) -> Iterator[Census]:
    """Yield what the log consisted of when the bytes of its head were `data`, without the head.

    Raises `NotFoundError` for what is gone, which may be what was trimmed since.
    """
    head = decode_head(data)
    archive = Archive(store, prefix, _CACHE_BYTES)
    try:
        keys = [f"{prefix}/{key}" for key in archive.keys(head, head.trimmed)]
        yield Census(head.note, keys, archive.history(head, head.trimmed, head.end))
    finally:
        archive.close()
