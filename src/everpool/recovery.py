"""Bringing back what was deleted or overwritten in a bucket that keeps versions.

A pool's own past (`Pool.restore`) answers changes that were made through Everpool. This answers
those that were made behind its back: by a script, or by somebody who has the pool's credentials.
In a bucket with versions, a delete hides an object and a put covers it, and both can be undone.
What is locked cannot be deleted for good, so all that a locked snapshot needs can come back.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import NamedTuple

from everpool.errors import InvalidError, NotFoundError
from everpool.store import without_secrets
from everpool.store.locks import PARALLEL, Locks, Version, open_locks

# What says that there is a pool comes last: nobody opens a half of one.
_LAST = ("log/head", "everpool.json")


class Undeleted(NamedTuple):
    """How many objects were brought back, put back over later versions, and hidden."""

    shown: int
    replaced: int
    hidden: int


class _Step(NamedTuple):
    """What to do for one key: remove markers, or put a version back, or hide all there is."""

    key: str
    markers: list[Version]
    version: Version | None = None


def undelete(url: str, to: datetime | None = None, *, dry_run: bool = False) -> Undeleted:
    """Bring back what was deleted from the bucket of the pool at `url`.

    Without `to`, what is hidden by deletes is shown again, garbage that Everpool itself had deleted
    included, which does no harm, and nothing else is changed. With it,
    the pool's whole folder becomes what it was then, to the second: what was overwritten since is
    put back, and what was added since is hidden, commits included. A naive `to` is local.

    Nothing is deleted for good, so another call can take it back. The pool need not be there, and
    nobody should have it open: hosts that do, begin anew. A branch needs its parent's bucket, too.

    Raises `InvalidError` when the bucket keeps no versions that can be seen, `NotFoundError` when
    there is nothing to bring back: no version of a pool.
    """
    locks = open_locks(url)
    where = without_secrets(url)
    if locks is None:
        raise InvalidError(
            f"the versions of {where} are not known of: for gs:// and az://, see the guide about "
            "going back in time"
        )
    with contextlib.closing(locks):
        if not locks.keeps_versions():
            raise InvalidError(
                f"the bucket of {where} keeps no versions, so what was deleted there is gone: "
                "bring it back from a copy"
            )
        time_ns = None if to is None else int(to.timestamp() * 1e9)
        steps = list(_steps(locks, time_ns, where))
        if not dry_run:
            with ThreadPoolExecutor(PARALLEL, "everpool-undelete") as threads:
                first = [step for step in steps if step.key not in _LAST]
                for _ in threads.map(partial(_take, locks), first):
                    pass
            last = (step for step in steps if step.key in _LAST)
            for step in sorted(last, key=lambda step: _LAST.index(step.key)):
                _take(locks, step)
    shown = sum(1 for step in steps if step.markers)
    replaced = sum(1 for step in steps if step.version is not None)
    return Undeleted(shown, replaced, len(steps) - shown - replaced)


def _steps(locks: Locks, time_ns: int | None, where: str) -> Iterator[_Step]:
    is_pool = False
    for key, group in groupby(locks.versions(), lambda version: version.key):
        versions = list(group)
        if time_ns is None:
            at = next((one for one in versions if not one.is_marker), None)
        else:
            at = next((one for one in versions if one.time_ns <= time_ns), None)
        is_pool = is_pool or (key == "everpool.json" and at is not None and not at.is_marker)
        if at is None or at.is_marker:
            if not versions[0].is_marker:
                yield _Step(key, [])
        elif not at.is_latest:
            # A marker of the same second may be older: it hides nothing then, and may go as well.
            markers = [one for one in versions if one.is_marker and one.time_ns >= at.time_ns]
            covered = any(not one.is_marker for one in versions[: versions.index(at)])
            if not covered:
                yield _Step(key, markers)
            elif versions[0].is_marker or versions[0].content != at.content:
                yield _Step(key, [], at)
    if not is_pool:
        then = "" if time_ns is None else " that is old enough"
        raise NotFoundError(f"there is no version of a pool at {where}{then}: check the address")


def _take(locks: Locks, step: _Step) -> None:
    if step.version is not None:
        locks.put_back(step.version)
    elif step.markers:
        for marker in step.markers:
            locks.remove_marker(marker)
    else:
        locks.hide(step.key)
