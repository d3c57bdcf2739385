"""S3, Google Cloud Storage and Azure Blob Storage, by the `obstore` package.

Each is configured as its own tools are, by the environment, and by options of `open_store`, which
have the names that obstore gives them (`obstore.store.S3Config`, `GCSConfig`, `AzureConfig`):

    s3://   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
            AWS_ENDPOINT_URL, AWS_PROFILE and the files in ~/.aws, or a role of the machine
    gs://   GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine
    az://   AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or a managed identity

and by two of this module: `timeout_s`, for a request of a few kilobytes, and `bulk_timeout_s`, for
one part of a large object. Plain HTTP is allowed to an endpoint on this machine only.

A swap is sent once: obstore's own retry of one whose answer was lost would find the new object in
its way, and report a conflict with itself.
"""

import datetime
import importlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.store import Data, Listed, Object, check_key, check_ranges
from everpool.store.profile import aws_profile

T = TypeVar("T")

_STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
# What may stand in a URL, which ends up in logs and shell histories: nothing that is a secret.
_OPEN_OPTIONS = {
    "account_name",
    "bulk_timeout_s",
    "checksum_algorithm",
    "endpoint",
    "profile",
    "region",
    "skip_signature",
    "timeout_s",
    "virtual_hosted_style_request",
}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_ENDPOINT_OPTIONS = ("endpoint", "aws_endpoint_url_s3", "base_url")
_PART_BYTES = 8 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARALLEL_PARTS = 4
_RETRIES = 3
_GAP_BYTES = 256 << 10
_EMPTY = memoryview(b"")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_TRANSIENT = (408, 425, 429)
_MACHINE_ROLE = "169.254."  # where a cloud's machines ask for their role
_used_by: int | None = None


class Place(NamedTuple):
    """What an address and the options beside it say. `where` is how messages call it."""

    where: str
    scheme: str
    bucket: str
    prefix: str
    settings: dict[str, object]
    timeout_s: float
    bulk_timeout_s: float

    def may_use_http(self) -> bool:
        """Whether the endpoint is one of plain HTTP on this machine; raises for one elsewhere."""
        return _may_use_http(self.where, self.scheme, self.settings)


def open_objects(url: str, **options: Any) -> "ObjectStore":
    """Return the store at `url`; see `everpool.store.open_store`."""
    return ObjectStore(*read_url(url, **options))


def read_url(
    url: str, *, timeout_s: float = 10.0, bulk_timeout_s: float = 120.0, **options: object
) -> Place:
    """Return what an address and options say; raises `InvalidError`."""
    parts = urlsplit(url)
    scheme, bucket, prefix = parts.scheme.lower(), parts.netloc, unquote(parts.path).strip("/")
    where = f"{scheme}://{bucket.rpartition('@')[2]}" + (f"/{prefix}" if prefix else "")
    if "@" in bucket or not bucket or parts.fragment:
        raise InvalidError(f"{where} is no address of a bucket: write {scheme}://bucket/prefix")
    if prefix:
        check_key(prefix)
    settings: dict[str, object] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _OPEN_OPTIONS:
            raise InvalidError(
                f"{where} has the option {name!r}, which may not stand in an address:"
                " give it by the environment, or as an option"
            )
        settings[name] = value
    settings |= {"timeout_s": timeout_s, "bulk_timeout_s": bulk_timeout_s} | settings | options
    timeouts = _seconds(settings.pop("timeout_s")), _seconds(settings.pop("bulk_timeout_s"))
    if scheme == "s3":
        _add_profile(settings)
    return Place(where, scheme, bucket, prefix, settings, *timeouts)


class ObjectStore:
    """A `Store` in a bucket, below a prefix. `where` is how messages call it."""

    def __init__(
        self,
        where: str,
        scheme: str,
        bucket: str,
        prefix: str,
        settings: Mapping[str, object],
        timeout_s: float,
        bulk_timeout_s: float,
    ) -> None:
        self._where = where
        self._root = f"{prefix}/" if prefix else ""
        self._obstore = _obstore(where)
        self._versions = scheme == "gs"
        self._timeout_s = timeout_s
        make = getattr(importlib.import_module("obstore.store"), _STORES[scheme])
        allow_http = _may_use_http(where, scheme, settings)

        def client(seconds: float, retries: int) -> Any:
            try:
                return make(
                    bucket,
                    config=dict(settings),
                    client_options={
                        "allow_http": allow_http,
                        "timeout": datetime.timedelta(seconds=seconds),
                        "connect_timeout": datetime.timedelta(seconds=min(5.0, seconds)),
                    },
                    retry_config={
                        "max_retries": retries,
                        "retry_timeout": datetime.timedelta(seconds=seconds),
                        "backoff": {
                            "init_backoff": datetime.timedelta(milliseconds=50),
                            "max_backoff": datetime.timedelta(seconds=1),
                            "base": 2,
                        },
                    },
                )
            except Exception as error:
                # The message may quote what it was given, so only its kind is told.
                raise InvalidError(
                    f"{where} cannot be opened with the options {sorted(settings)}"
                    f" ({type(error).__name__}): see everpool.store.objects for their names"
                ) from None

        self._once: Any = client(timeout_s, 0)
        self._small: Any = client(timeout_s, _RETRIES)
        self._bulk: Any = client(bulk_timeout_s, _RETRIES)
        self._closed = False

    def get(self, key: str) -> Object:
        """Return the object, by one request."""
        return self._get(key, None)

    def get_if_changed(self, key: str, e_tag: str) -> Object | None:
        """Return the object unless its tag is `e_tag`, by one conditional request."""
        try:
            return self._get(key, {"if_none_match": e_tag.partition("\n")[0]})
        except _NotModified:
            return None

    def _get(self, key: str, options: object) -> Object:
        def call() -> Object:
            found = self._obstore.get(self._small, self._path(key), options=options)
            meta = found.meta
            modified_ns = round(meta["last_modified"].timestamp() * 1000) * 1_000_000
            return Object(found.bytes().to_bytes(), self._tag(meta), modified_ns)

        return self._do("get", key, call)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return views of what obstore received; near ranges share a request."""
        check_ranges(key, ranges)
        spans = _spans(ranges)
        if not spans:
            if ranges:
                self._get(key, {"head": True})
            return [_EMPTY for _ in ranges]
        path = self._path(key)

        def call() -> Any:
            starts, ends = zip(*spans, strict=True)
            # Spans with gaps between them, which obstore must not join: it panics when one that
            # it joined begins behind the end of the object.
            return self._obstore.get_ranges(
                self._bulk, path, starts=list(starts), ends=list(ends), coalesce=0
            )

        found = [memoryview(data).toreadonly() for data in self._do("get", key, call)]
        for (start, end), view in zip(spans, found, strict=True):
            if len(view) != end - start:
                size = start + len(view)
                raise InvalidError(
                    f"{key!r} in {self._where} has {size} bytes, not the {end} that were asked for"
                )
        views: list[memoryview] = []
        for start, end in ranges:
            at = bisect_right(spans, start, key=_first) - 1
            offset = start - spans[at][0]
            views.append(found[at][offset : offset + end - start] if end > start else _EMPTY)
        return views

    def put(self, key: str, data: Data) -> None:
        """Put the object by one request, sent again when it failed."""
        path = self._path(key)
        client = self._small if len(data) <= _PART_BYTES // 8 else self._bulk
        self._do(
            "put", key, lambda: self._obstore.put(client, path, _plain(data), use_multipart=False)
        )

    def put_pieces(self, key: str, pieces: Iterable[Data], size: int) -> None:
        """Put the object by one request, or in parts of 8 MiB, four at a time."""
        self._begin()  # who cannot use the store has not lost the pieces
        path = self._path(key)
        failed: list[BaseException] = []
        source: Any = _watched(pieces, size, key, failed)
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        multipart = size > part_bytes
        if not multipart:
            source = list(source)  # complete before anything is sent

        def call() -> object:
            return self._obstore.put(
                self._bulk,
                path,
                source,
                use_multipart=multipart,
                chunk_size=part_bytes,
                max_concurrency=_PARALLEL_PARTS,
            )

        try:
            self._do("put", key, call)
        except Exception:
            if failed:
                raise failed[0] from None
            raise

    def swap(self, key: str, data: Data, e_tag: str | None) -> str:
        """Put the object under a condition, by one request that is never sent again."""
        path = self._path(key)
        mode: object = "create"
        if e_tag is not None:
            tag, _, version = e_tag.partition("\n")
            mode = {"e_tag": tag, "version": version} if version else {"e_tag": tag}

        def call() -> str:
            put = self._obstore.put(self._once, path, _plain(data), mode=mode, use_multipart=False)
            return self._tag(put)

        return self._do("swap", key, call)

    def list(self, prefix: str, after: str = "") -> Iterator[Listed]:
        """List by requests of a thousand keys."""
        if prefix:
            check_key(prefix)
        folder = self._root + prefix
        offset = self._root + after if after else None

        def start() -> Any:
            return iter(
                self._obstore.list(
                    self._bulk, folder.rstrip("/") or None, offset=offset, chunk_size=1000
                )
            )

        found = self._do("list", prefix, start)
        last = after.encode()
        while True:
            some: list[dict[str, Any]] | None = self._do("list", prefix, lambda: next(found, None))
            if some is None:
                return
            for meta in some:
                key = str(meta["path"]).removeprefix(self._root)
                order = key.encode()
                if order > last:
                    last = order
                    modified_ns = round(meta["last_modified"].timestamp() * 1000) * 1_000_000
                    yield Listed(key, int(meta["size"]), modified_ns)
                elif order > after.encode():
                    raise InvalidError(
                        f"{self._where} lists its keys in no order, so it cannot hold a pool:"
                        " use a bucket of another class of storage"
                    )

    def delete(self, keys: Sequence[str]) -> None:
        """Delete the objects, many by one request where the store can do that."""
        paths = [self._path(key) for key in keys]
        if not paths:
            return self._begin()
        try:
            self._do("delete", keys[0], lambda: self._obstore.delete(self._bulk, paths))
        except NotFoundError:
            # Some stores end at the first one that is gone already.
            for key, path in zip(keys, paths, strict=True):
                try:
                    self._do(
                        "delete", key, lambda path=path: self._obstore.delete(self._bulk, path)
                    )
                except NotFoundError:
                    continue

    def close(self) -> None:
        """Let go of the connections."""
        self._closed = True
        self._once = self._small = self._bulk = None

    def _path(self, key: str) -> str:
        check_key(key)
        return self._root + key

    def _tag(self, meta: Mapping[str, Any]) -> str:
        """Return the tag; Google's swaps go by the generation, its reads by the tag."""
        version = meta["version"] if self._versions else None
        return f"{meta['e_tag']}\n{version}" if version else str(meta["e_tag"])

    def _begin(self) -> None:
        global _used_by
        if self._closed:
            raise ClosedError(f"{self._where} is closed")
        if _used_by is None:
            _used_by = os.getpid()
        if _used_by != os.getpid():
            # obstore's threads are not in the child: a call would wait for them for ever.
            raise ClosedError(
                f"{self._where} cannot be used in a process that was forked from one that used"
                " a bucket: start processes by 'spawn' or 'forkserver'"
            )

    def _do(self, call: str, key: str, function: Callable[[], T]) -> T:
        """Call obstore, and raise our errors instead of its own."""
        self._begin()
        try:
            return function()
        except EverpoolError:
            raise
        except Exception as error:
            # Not chained: obstore's message quotes the request, whose address may hold a token.
            raise self._translated(call, key, error) from None

    def _translated(self, call: str, key: str, error: Exception) -> Exception:
        name, text = type(error).__name__, str(error)
        status = int(found[1]) if (found := _STATUS.search(text)) else 0
        code = found[1] if (found := _CODE.search(text)) else ""
        kind = found[1] if (found := _KIND.search(text)) else ""
        what = f"{call} {key!r} in {self._where}" if key else f"{call} {self._where}"
        told = " ".join(word for word in (str(status or ""), code, kind) if word) or name
        facts: dict[str, object] = {"key": key, "status": status, "code": code}

        def invalid(remedy: str) -> InvalidError:
            return InvalidError(f"cannot {what} ({told}): {remedy}", **facts)

        if name == "NotModifiedError":
            return _NotModified()
        if code in ("NoSuchBucket", "ContainerNotFound"):
            return invalid("create the bucket first")
        if isinstance(error, FileNotFoundError):
            return NotFoundError(f"there is no object {key!r} in {self._where}", **facts)
        if name in ("PreconditionError", "AlreadyExistsError"):
            return ConflictError(f"{key!r} in {self._where} is another object by now", **facts)
        if name in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
            return invalid("check the credentials, their rights to the bucket, and the clock")
        if status == 416 and call == "get":
            return invalid("a range is not within the object")
        if _MACHINE_ROLE in text:
            return invalid("no credentials were found; set them in the environment or as options")
        if "region" in text and "redirect" in text:
            return invalid("the bucket is in another region; name it by AWS_REGION or region=")
        if status == 400 and "x-amz-checksum" in text:
            return invalid("the bucket locks what is put: set AWS_CHECKSUM_ALGORITHM=sha256")
        if 400 <= status < 500 and status not in _TRANSIENT:
            return invalid("the store refuses this, see the status")
        if not status and not kind and name != "GenericError":
            return invalid("the call or the configuration is wrong")
        if kind == "Unknown" and "Builder" in text:
            return invalid("the endpoint is no address that can be asked")
        if call == "swap" and kind != "Connect" and status not in _TRANSIENT:
            return CommitUnknownError(
                f"no answer to {what} ({told}): read it, to see whether it was replaced",
                id=key,
                status=status,
                code=code,
            )
        return UnavailableError(
            f"cannot {what} now ({told}): see that the endpoint is up and can be reached", **facts
        )


class _NotModified(Exception):
    """The object's tag is still the one that is known."""


def _obstore(where: str) -> Any:
    try:
        module: ModuleType = importlib.import_module("obstore")
    except ImportError:
        raise InvalidError(
            f"{where} needs the package obstore: pip install 'everpool[bucket]'"
        ) from None
    return module


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise InvalidError(f"{value!r} is no time-out: give a number of seconds")
    return seconds


def _add_profile(settings: dict[str, object]) -> None:
    """Add what a profile of ~/.aws says and nothing else does."""
    asked = settings.pop("profile", None) or os.environ.get("AWS_PROFILE")
    given = "access_key_id" in settings or "credential_provider" in settings
    if asked is None and (given or "AWS_ACCESS_KEY_ID" in os.environ):
        return
    found = aws_profile(str(asked or "default"), required=asked is not None and not given)
    if given:
        found = {name: found[name] for name in found if name in ("region", "endpoint")}
    for name, value in found.items():
        settings.setdefault(name, value)


def _may_use_http(where: str, scheme: str, settings: Mapping[str, object]) -> bool:
    """Whether the endpoint is one of plain HTTP on this machine; raises for one elsewhere."""
    given = [settings[name] for name in _ENDPOINT_OPTIONS if name in settings]
    given += [os.environ[name] for name in _ENDPOINTS[scheme] if name in os.environ]
    if not given:
        return False
    parts = urlsplit(str(given[0]))
    if parts.scheme == "https":
        return False
    host = parts.hostname or ""
    if parts.scheme != "http" or not _is_loopback(host):
        raise InvalidError(
            f"the endpoint of {where} must begin with https://: plain http is for this machine,"
            f" not for {host!r}"
        )
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that are near each other: a gap costs less than another request."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(one for one in ranges if one[0] < one[1]):
        if spans and start <= spans[-1][1] + _GAP_BYTES:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def _first(span: tuple[int, int]) -> int:
    return span[0]


def _plain(data: Data) -> Data:
    """Return what obstore takes: it wants bytes one after the other."""
    return data if isinstance(data, bytes) else memoryview(data).cast("B")


def _watched(
    pieces: Iterable[Data], size: int, key: str, failed: list[BaseException]
) -> Iterator[Data]:
    """Yield the pieces, and check their size; notes what goes wrong with them."""

    def wrong(total: int) -> NoReturn:
        raise InvalidError(f"{key!r} was to have {size} bytes, its pieces have {total}")

    total = 0
    try:
        for piece in pieces:
            total += len(piece)
            if total > size:
                wrong(total)
            if len(piece):
                yield _plain(piece)
        if total != size:
            wrong(total)
    except BaseException as error:
        failed.append(error)
        raise
