"""Object lock, and the versions of objects: what only some buckets have.

A power of its own beside `Store`, for buckets of S3 and of what is compatible, by the `botocore`
package: obstore knows neither locks nor versions.

A bucket with object lock keeps every version of an object. A put adds one, and a plain delete
adds a *delete marker*, which hides those before. A version that is locked cannot be deleted before
its time, in the mode `compliance` by nobody, in the mode `governance` by nobody who lacks the right
`s3:BypassGovernanceRetention`. A lock can be prolonged, and in `compliance` not shortened. A
bucket may have a *default retention*, with which it locks every version that is put.

A lock is never taken for granted: what is told of it is what the store says after it was set.
"""

import datetime
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from everpool.errors import InvalidError, NotFoundError, UnavailableError
from everpool.store import check_key
from everpool.store.objects import Place, read_url

T = TypeVar("T")
PARALLEL = 16
GOVERNANCE, COMPLIANCE = "governance", "compliance"
_TRIES = 4
_TRANSIENT = (408, 425, 429)
_NO_LOCKS = ("ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed")
_DAY_S = 86_400
_YEAR_S = 365 * _DAY_S
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_KEYS = {
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
    "region": "region_name",
    "endpoint": "endpoint_url",
}


class Rule(NamedTuple):
    """How a bucket locks what is put; `seconds` is 0 when it does not do so by itself."""

    mode: str
    seconds: int


class Lock(NamedTuple):
    """How a version of an object is locked, and until when (nanoseconds since 1970)."""

    mode: str
    until_ns: int


class Version(NamedTuple):
    """One version of an object, or a delete marker. The store's clock often has whole seconds.

    What has the same `content` is the same; what has another one mostly is not.
    """

    key: str
    id: str
    time_ns: int
    content: str
    is_latest: bool
    is_marker: bool


class Locks:
    """The locks and versions of a bucket's objects, below a prefix. Threads may share it.

    Raises `UnavailableError` when the store cannot be reached, `InvalidError` when it refuses.
    """

    def __init__(self, place: Place) -> None:
        self._where = place.where
        self._bucket = place.bucket
        self._root = f"{place.prefix}/" if place.prefix else ""
        self._session: Any = _import("botocore.session", place.where)
        self._errors: Any = _import("botocore.exceptions", place.where)
        self._client = self._connect(place)

    def _connect(self, place: Place) -> Any:
        place.may_use_http()  # or raise
        given = {
            name: str(place.settings[key])
            for key, name in _KEYS.items()
            if place.settings.get(key) is not None
        }
        region = next((os.environ[name] for name in _REGIONS if os.environ.get(name)), "us-east-1")
        given.setdefault("region_name", region)
        hosted = str(place.settings.get("virtual_hosted_style_request", "")).lower() == "true"
        style = "virtual" if hosted else "path" if _has_endpoint(given) else "auto"
        config = _import("botocore.config", place.where).Config(
            connect_timeout=min(5.0, place.timeout_s),
            read_timeout=place.bulk_timeout_s,
            max_pool_connections=PARALLEL,
            retries={"mode": "standard", "total_max_attempts": _TRIES},
            s3={"addressing_style": style},
        )
        try:
            return self._session.get_session().create_client("s3", config=config, **given)
        except Exception as error:
            raise InvalidError(
                f"{place.where} cannot be opened for its locks ({type(error).__name__}): see that "
                "its endpoint, its region and the profile are right"
            ) from None

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    # Locks

    def rule(self) -> Rule | None:
        """Return how the bucket locks what is put; None when it has no object lock."""
        try:
            found = self._do(
                "see the object lock of",
                "",
                lambda: self._client.get_object_lock_configuration(Bucket=self._bucket),
            )
        except NotFoundError:
            return None
        except InvalidError as error:
            if error.facts.get("code") in _NO_LOCKS:
                return None
            raise
        told = found.get("ObjectLockConfiguration", {})
        if told.get("ObjectLockEnabled") != "Enabled":
            return None
        default = told.get("Rule", {}).get("DefaultRetention", {})
        seconds = int(default.get("Days", 0)) * _DAY_S + int(default.get("Years", 0)) * _YEAR_S
        return Rule(_mode(default.get("Mode", "")) or COMPLIANCE, seconds)

    def read(self, key: str) -> tuple[str, bytes]:
        """Return the id of an object's newest version, and its bytes."""
        check_key(key)

        def call() -> tuple[str, bytes]:
            found = self._client.get_object(Bucket=self._bucket, Key=self._root + key)
            return found.get("VersionId", "null"), found["Body"].read()

        return self._do("get", key, call)

    def hold(self, key: str, mode: str, until_ns: int, version: str | None = None) -> Lock | None:
        """Have a version of an object, else the newest, locked at least until then, and see that
        it is.

        One that is locked keeps its mode. Returns the lock that the store tells of afterwards,
        which ends earlier, or is None, where the store refuses; raises `NotFoundError`.
        """
        version, known = self._look(key, version)
        now_ns = int(datetime.datetime.now(datetime.UTC).timestamp() * 1e9)
        if known is not None and known.until_ns >= until_ns:
            return known
        if known is not None and known.until_ns > now_ns:
            mode = known.mode
        until = datetime.datetime.fromtimestamp(-(-until_ns // 10**9), datetime.UTC)
        try:
            self._do(
                "lock",
                key,
                lambda: self._client.put_object_retention(
                    Bucket=self._bucket,
                    Key=self._root + key,
                    VersionId=version,
                    Retention={"Mode": mode.upper(), "RetainUntilDate": until},
                ),
            )
        except InvalidError:
            return known
        return self._look(key, version)[1]

    def _look(self, key: str, version: str | None) -> tuple[str, Lock | None]:
        check_key(key)
        which = {} if version is None else {"VersionId": version}
        found = self._do(
            "look at",
            key,
            lambda: self._client.head_object(Bucket=self._bucket, Key=self._root + key, **which),
        )
        mode, until = _mode(found.get("ObjectLockMode", "")), found.get("ObjectLockRetainUntilDate")
        lock = Lock(mode, round(until.timestamp()) * 10**9) if mode and until else None
        return found.get("VersionId", "null"), lock

    # Versions

    def keeps_versions(self) -> bool:
        """Whether a delete in this bucket hides an object, and does not destroy it."""
        found = self._do(
            "see the versioning of",
            "",
            lambda: self._client.get_bucket_versioning(Bucket=self._bucket),
        )
        return found.get("Status") == "Enabled"

    def versions(self) -> Iterator[Version]:
        """Yield all versions and markers, each key's together and newest first.

        Of one second, markers come behind versions, whichever was first: stores do not tell.
        """
        pages = self._client.get_paginator("list_object_versions")
        found = iter(pages.paginate(Bucket=self._bucket, Prefix=self._root))
        while True:
            page: Any = self._do("list the versions in", "", lambda: next(found, None))
            if page is None:
                return
            some = [(one, False) for one in page.get("Versions", [])]
            some += [(one, True) for one in page.get("DeleteMarkers", [])]
            # A page has its versions and its markers apart. A key's may go on in the next one.
            some.sort(key=_order)
            for one, is_marker in some:
                key = str(one["Key"])[len(self._root) :]
                content = f"{one.get('Size')} {one.get('ETag')}"
                latest = bool(one["IsLatest"])
                yield Version(key, str(one["VersionId"]), _time(one), content, latest, is_marker)

    def remove_marker(self, marker: Version) -> None:
        """Remove a delete marker, for what it hides to be seen again."""
        assert marker.is_marker, "only a marker is ever deleted for good"
        self._do(
            "remove the delete marker of",
            marker.key,
            lambda: self._client.delete_object(
                Bucket=self._bucket, Key=self._root + marker.key, VersionId=marker.id
            ),
        )

    def put_back(self, version: Version) -> None:
        """Copy an older version over those that came after it; up to 5 GiB on S3."""
        source = {"Bucket": self._bucket, "Key": self._root + version.key, "VersionId": version.id}
        self._do(
            "put back",
            version.key,
            lambda: self._client.copy_object(
                Bucket=self._bucket, Key=self._root + version.key, CopySource=source
            ),
        )

    def hide(self, key: str) -> None:
        """Delete an object, of which the versions stay where they are kept."""
        self._do(
            "delete",
            key,
            lambda: self._client.delete_object(Bucket=self._bucket, Key=self._root + key),
        )

    def _do(self, what: str, key: str, call: Callable[[], T]) -> T:
        """Call botocore, and raise our errors instead of its own."""
        words = f"cannot {what} {key!r} in {self._where}" if key else f"cannot {what} {self._where}"
        try:
            return call()
        except self._errors.ClientError as error:
            told = error.response
        except (self._errors.HTTPClientError, self._errors.ConnectionError) as error:
            raise UnavailableError(
                f"{words} now ({type(error).__name__}): see that the endpoint is up and can be "
                "reached"
            ) from None
        except self._errors.BotoCoreError as error:
            raise InvalidError(
                f"{words} ({type(error).__name__}): check the credentials, the region and the "
                "endpoint"
            ) from None
        status = int(told.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(told.get("Error", {}).get("Code", ""))
        words = f"{words} ({status} {code})"
        facts: dict[str, Any] = {"key": key, "status": status, "code": code}
        if code == "NoSuchBucket":
            raise InvalidError(f"{words}: create the bucket first", **facts)
        if status == 404:
            raise NotFoundError(f"there is no object {key!r} in {self._where}", **facts)
        if status in (401, 403):
            raise InvalidError(f"{words}: check the credentials, and their rights", **facts)
        if (status < 500 and status not in _TRANSIENT) or code in _NO_LOCKS:
            raise InvalidError(f"{words}: the store refuses this, see the status", **facts)
        raise UnavailableError(f"{words}: try again", **facts)


def open_locks(url: str, **options: Any) -> Locks | None:
    """Return the locks of the bucket at a URL, which is that of a store.

    None for stores whose locks are not known of: directories, Google's and Azure's. Raises
    `InvalidError` when the package for it is not installed.
    """
    if not url.lower().startswith("s3://"):
        return None
    return Locks(read_url(url, **options))


def _mode(told: str) -> str:
    return told.lower() if told.lower() in (GOVERNANCE, COMPLIANCE) else ""


def _order(one: tuple[Any, bool]) -> tuple[bytes, bool, int, bool]:
    found, is_marker = one
    return found["Key"].encode(), not found["IsLatest"], -_time(found), is_marker


def _time(found: Any) -> int:
    return round(found["LastModified"].timestamp() * 1000) * 10**6


def _has_endpoint(given: dict[str, str]) -> bool:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    address = next((os.environ[name] for name in names if os.environ.get(name)), "")
    if "endpoint_url" not in given and address:
        given["endpoint_url"] = address
    host = urlsplit(given.get("endpoint_url", "")).hostname or ""
    return bool(host) and not host.endswith(".amazonaws.com")


def _import(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InvalidError(
            f"the locks of {where} need the package botocore: pip install 'everpool[lock]'"
        ) from None
