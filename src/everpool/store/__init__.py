"""The object store: immutable objects under keys, and a few that are replaced by compare-and-swap.

This is the seam to S3, Google Cloud Storage, Azure and a plain directory. What is built on it asks
for four things only: an object that was put is durable and read back whole, a swap succeeds for
one of those who based it on the same content, a read begun after a write returned sees it, and
every error is one of `everpool.errors`.

    with contextlib.closing(open_store("s3://bucket/pool")) as store:
        store.put("segments/1", data)

Keys are relative paths like `chunks/7`, up to 900 bytes of UTF-8. A key must not be the folder of
another one (`a` and `a/b`): a directory cannot hold both.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from everpool.errors import InvalidError

__all__ = [
    "Data",
    "Listed",
    "Object",
    "Store",
    "check_key",
    "check_ranges",
    "open_store",
    "without_secrets",
]

Data = bytes | bytearray | memoryview
"""What can be written: contiguous bytes. A view must be one of bytes (`memoryview.cast("B")`)."""

_KEY_BYTES = 900  # S3 takes 1,024; the rest is for the prefix that a store was opened with
_SCHEMES = ("s3", "gs", "az", "file")


class Object(NamedTuple):
    """An object as it was at one moment.

    `e_tag` is opaque and names the content: equal contents may have equal tags, so what is
    swapped must hold something unique. `modified_ns` is the store's clock, in nanoseconds since
    1970, often in whole seconds.
    """

    data: bytes
    e_tag: str
    modified_ns: int


class Listed(NamedTuple):
    """A key and how many bytes are under it; see `Object` for `modified_ns`."""

    key: str
    size: int
    modified_ns: int


class Store(Protocol):
    """A folder of objects, shared by any number of processes.

    *Errors.* `UnavailableError`: not now, and nothing was changed unless said otherwise below.
    `InvalidError`: it will fail again until the call, the configuration or the rights are
    changed. `NotFoundError`: no such object. After `close`, and in a forked child, `ClosedError`.
    No message ever holds a credential.

    *Threads.* All methods may be called from several threads at once. Every request has a
    time-out, so no call lasts for ever.
    """

    def get(self, key: str) -> Object:
        """Return the object as some moment of this call left it; raises `NotFoundError`."""
        ...

    def get_if_changed(self, key: str, e_tag: str) -> Object | None:
        """Return what `get` returns, or None when its tag is still `e_tag`."""
        ...

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of several ranges, each from its start to before its end.

        They are fetched in parallel; the views are read-only. Raises `InvalidError` when a range
        is not within the object.
        """
        ...

    def put(self, key: str, data: Data) -> None:
        """Store an immutable object, durably.

        Putting the same content again is harmless, so an `UnavailableError`, after which it may be
        there or not, may be answered by putting it again.
        """
        ...

    def swap(self, key: str, data: Data, e_tag: str | None) -> str:
        """Replace the object whose tag is `e_tag`, durably, and return the new tag.

        With None, the object must not exist. Raises `ConflictError` when it is another one, or
        `UnavailableError`: neither changed anything, nor will. Raises `CommitUnknownError` when
        the answer was lost: the swap may have taken effect, or may do so later, for as long as
        the tag is `e_tag`. Never tries twice by itself.
        """
        ...

    def put_pieces(self, key: str, pieces: Iterable[Data], size: int) -> None:
        """Store an immutable object of `size` bytes from its pieces, sent in parallel parts.

        A few parts are in memory at a time. The pieces must not change until the call returns.
        Either the whole object is there afterwards, or an error is raised and nothing is; what
        was said of `put` about trying again holds. Raises `InvalidError` when the pieces are not
        `size` bytes; an error of the iterator ends the upload and is raised as it is.
        """
        ...

    def list(self, prefix: str, after: str = "") -> Iterator[Listed]:
        """Yield the objects in the folder `prefix` and below, in the order of their keys' bytes.

        `""` is everything; with `after`, only keys behind it. What is put or deleted meanwhile
        may be there or not.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are passed over. May be repeated."""
        ...

    def close(self) -> None:
        """Release what the store holds. May be called twice."""
        ...


def open_store(url: str, **options: Any) -> Store:
    """Return the store at `url`.

    `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix` are configured as the
    vendors' own tools are, by the environment and, for S3, a profile of `~/.aws`; or by options,
    or by a query behind the URL for those that are no secrets
    (`s3://bucket?endpoint=https://host&region=eu-west-1`). `everpool.store.objects` lists them.
    `file:///folder` is a directory of this machine, not of a network file system. Nothing is
    requested yet, so what is wrong with bucket or rights shows at the first call.

    Raises `InvalidError` for what cannot be a store.
    """
    scheme = url.partition("://")[0].lower()
    if "://" not in url or scheme not in _SCHEMES:
        use = "use s3://, gs://, az:// or file:///"
        if url and ":" not in url:
            use = f"for that folder, use {Path(url).absolute().as_uri()}"
        raise InvalidError(f"no store has an address that begins like {url[:16]!r}: {use}")
    if scheme == "file":
        from everpool.store.directory import open_directory

        return open_directory(url, **options)
    from everpool.store.objects import open_objects

    return open_objects(url, **options)


def without_secrets(url: str) -> str:
    """Return a URL for messages: without its query, where settings are."""
    return url.partition("?")[0]


def check_key(key: str) -> None:
    """Raise `InvalidError` unless every store takes `key`."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidError(f"{key!r} is no key: it must be a relative path without empty parts")
    plain = key.isascii() and key.isprintable()
    if not plain and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in key):
        raise InvalidError(f"{key!r} is no key: it has a control character")
    if len(key.encode()) > _KEY_BYTES:
        raise InvalidError(f"{key[:40]!r}... is no key: it has more than {_KEY_BYTES} bytes")


def check_ranges(key: str, ranges: Sequence[tuple[int, int]]) -> None:
    """Raise `InvalidError` unless all ranges begin at 0 or behind, and none ends before it."""
    for start, end in ranges:
        if not 0 <= start <= end:
            raise InvalidError(f"bytes {start} to {end} of {key!r} are no range")
