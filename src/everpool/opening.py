"""Opening a pool: at a path or at a URL."""

import os
import re
from pathlib import Path

from everpool import embedded
from everpool.engine import DEFAULT_TIMEOUT_S, Engine
from everpool.errors import InvalidError
from everpool.pool import Pool
from everpool.store import without_secrets

# What pathlib makes of a URL.
_CUT_URL = re.compile(r"(s3|gs|az|file):/(?!/)", re.IGNORECASE)


def open_pool(
    path: str | os.PathLike[str],
    *,
    create: bool = True,
    read_only: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Pool:
    """Open the pool at `path`, and make it when there is none and `create` is true.

    `path` is a folder of this machine, or the URL of a folder in a bucket: `s3://bucket/pool`,
    `gs://...`, `az://...`, or `file:///folder`. Any number of processes may have a pool open at
    once, and any number of machines one in a bucket. `timeout_s` says how long a commit may take
    before it is given up: because another process holds the writer's lock, or the bucket is away.

    `cache_dir`, for a pool in a bucket, is where this host keeps its replica (also
    `EVERPOOL_CACHE_DIR`; by default the user's cache folder). Processes with different ones count
    as different hosts.

    Raises `NotFoundError` when there is no pool and none is to be created, `InvalidError` when
    the path cannot be a pool, `CorruptionError` when it is damaged.
    """
    try:
        given = os.fsdecode(os.fspath(path))
    except TypeError:
        given = ""
    if not given or "\0" in given:
        raise InvalidError(f"{path!r} is no path: give the folder of a pool, or a URL")
    create = create and not read_only
    if _CUT_URL.match(given):
        raise InvalidError(
            f"{given!r} looks like a URL that lost a slash: write two behind the colon, three for "
            "file:///, and in Python give a str, not a Path"
        )
    if isinstance(path, str) and "://" in path:
        from everpool import remote

        cache = remote.cache_folder(cache_dir)

        def join(create: bool) -> Engine:
            return remote.acquire(
                path, cache, create=create, read_only=read_only, timeout_s=timeout_s
            )

        return Pool(without_secrets(path), join, create=create, read_only=read_only)
    folder = Path(given).absolute()

    def acquire(create: bool) -> Engine:
        return embedded.acquire(folder, create=create, read_only=read_only, timeout_s=timeout_s)

    return Pool(folder, acquire, create=create, read_only=read_only)


def reopen(path: str, read_only: bool, timeout_s: float, cache_dir: str | None) -> Pool:
    """Open a pool that another process had open."""
    return open_pool(
        path, create=False, read_only=read_only, timeout_s=timeout_s, cache_dir=cache_dir
    )


def reopen_past(url: str, version: int, timeout_s: float, cache_dir: str | None) -> Pool:
    """Open a pool as it was, as another process had it open."""
    with reopen(url, True, timeout_s, cache_dir) as pool:
        return pool.at(version)
