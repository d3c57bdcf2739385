"""Locked snapshots: the bucket itself keeps what they need from being deleted.

    make a checkpoint, and pin its version: from here on no collection takes its parts
    read the log's head, and lock what the checkpoint and that head are made of
    lock that version of the head, and see of everything that it is locked
    pin it again, with what came of that
    lock the head that says so, in the same way

Whoever dies in between leaves a snapshot that is not locked. A head that is locked is one to which
everything is there.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from everpool.agent.host import LOG
from everpool.agent.pools import MARKER, SHARED, Marker, read_marker
from everpool.errors import CorruptionError, NotFoundError
from everpool.log.bucket.census import census, head_key
from everpool.records import Reference, decode_entry
from everpool.replica.bulk import key_of_value
from everpool.replica.index import files_in, is_page, page_in
from everpool.segments.checkpoints import key_of_pages, read_manifest, read_runs
from everpool.segments.format import read_page_row
from everpool.store import Store, open_store, without_secrets
from everpool.store.locks import COMPLIANCE, GOVERNANCE, PARALLEL, Lock, Locks, open_locks

ADVISORY = "advisory"
# For how long, where neither the caller nor the bucket says it.
_DEFAULT_S = 30 * 86_400


class Hold(NamedTuple):
    """What keeps a snapshot, and until when: the mode of the bucket's lock, or "advisory: why"."""

    lock: str
    until_ns: int


class Vault:
    """The buckets that a pool lies in: its own, and those of the pools that it branched from."""

    def __init__(self, url: str, marker: Marker) -> None:
        """Raises `InvalidError` when a package for it is not installed."""
        self._members: list[Locks | None] = []
        self._held: dict[str, Lock | None] = {}
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as undoing:
            undoing.callback(self.close)
            self._add(url)
            while marker.parent:
                self._add(marker.parent)
                with contextlib.closing(open_store(marker.parent)) as store:
                    marker = read_marker(store, without_secrets(marker.parent))
            undoing.pop_all()

    def _add(self, url: str) -> None:
        locks = open_locks(url)
        if locks is not None:
            self._closing.callback(locks.close)
        self._members.append(locks)

    def close(self) -> None:
        """Let go of the connections."""
        self._closing.close()

    def hold(self, store: Store, manifest: str, period_s: float | None, begun_ns: int) -> Hold:
        """Lock all that a checkpoint, and the log behind it, need; returns what came of it.

        It is to be held for a period, by default that of the bucket, after everything was begun.
        Called again, it locks what the log needs by then.
        """
        own = self._members[0]
        rule = None if own is None else own.rule()
        if period_s is None:
            period_s = rule.seconds if rule is not None and rule.seconds else _DEFAULT_S
        # A lock that the bucket gave by itself meanwhile will do; its clock has whole seconds.
        until_ns = begun_ns + (int(period_s) - 1) * 10**9
        if own is None:
            return Hold(f"{ADVISORY}: locks of this kind of store are not known of", until_ns)
        if rule is None:
            return Hold(f"{ADVISORY}: the bucket has no object lock", until_ns)
        version, data = own.read(head_key(LOG))
        keys = sorted(_parts_of_log(store, manifest, data) - self._held.keys())
        hold = partial(self._hold, rule.mode, until_ns)
        with ThreadPoolExecutor(PARALLEL, "everpool-lock") as threads:
            self._held.update(zip(keys, threads.map(hold, keys), strict=True))
        head = own.hold(head_key(LOG), rule.mode, until_ns, version)
        markers = self._hold_markers(rule.mode, until_ns)
        return _summary([head, *markers, *self._held.values()], until_ns)

    def _hold_markers(self, mode: str, until_ns: int) -> Iterator[Lock | None]:
        for member in self._members:
            yield None if member is None else member.hold(MARKER, mode, until_ns)

    def _hold(self, mode: str, until_ns: int, key: str) -> Lock | None:
        members = self._members if key.startswith(SHARED) else self._members[:1]
        for member in members:
            if member is None:
                return None
            with contextlib.suppress(NotFoundError):
                return member.hold(key, mode, until_ns)
        raise CorruptionError(
            f"{key} is missing, so there is nothing to lock: `everpool verify` lists all damage, "
            "`everpool recover --undelete` brings back what was deleted",
            key=key,
        )


def _summary(found: Sequence[Lock | None], until_ns: int) -> Hold:
    now_ns = time.time_ns()
    held = [lock for lock in found if lock is not None and lock.until_ns > now_ns]
    if len(held) < len(found):
        loose = len(found) - len(held)
        return Hold(f"{ADVISORY}: {loose} of {len(found)} objects could not be locked", until_ns)
    modes = {lock.mode for lock in held}
    mode = GOVERNANCE if GOVERNANCE in modes else COMPLIANCE
    return Hold(mode, min(lock.until_ns for lock in held))


def _parts_of_log(store: Store, manifest: str, head: bytes) -> set[str]:
    """Return the keys of what a checkpoint is made of, and of all that the log's head needs."""
    keys = _parts_of(store, manifest)
    with census(store, LOG, head) as log:
        keys.update(log.objects)
        if (start := log.start.decode()) not in ("", manifest):
            keys |= _parts_of(store, start)
        for item in log.entries:
            for record in decode_entry(item.entry).records:
                payloads = (getattr(one, "payload", None) for one in record.operations)
                keys.update(key_of_value(one.file) for one in payloads if type(one) is Reference)
    return keys


def _parts_of(store: Store, key: str) -> set[str]:
    """Return the keys of what a checkpoint is made of."""
    manifest = read_manifest(store, key)
    used: dict[bytes, list[str]] = {}
    for place, row in read_runs(store, manifest.runs):  # of rows with one key the last one counts
        used.pop(place, None)
        if row is None:
            continue
        if is_page(place):
            used[place] = [key_of_pages(read_page_row(page_in(place, row)).segment)]
        elif files := files_in(place, row):
            used[place] = [key_of_value(file) for file in files]
    runs = {run.key for run in manifest.runs}
    return {key} | runs | {one for keys in used.values() for one in keys}
