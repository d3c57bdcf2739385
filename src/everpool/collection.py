"""The rules by which objects of a pool in a store are collected. Pure functions of the log.

A *place* is a checkpoint from which a replica can begin. A version can be looked at as long as it
is *kept*: not older than `kept`, or the version of a snapshot. For that its place is needed, the
newest one that is not behind it, and the log from there on. So what is needed are spans of
versions: everything from `start` on, the place of `kept`, and an *island* for each older snapshot.

Every object's name tells the version at which its upload began. An object is collected in steps,
each of which a `Collect` record decides, so that all hosts agree:

    an upload that began before `start`, and that no record has named, is void from here on: a
    record that names it later aborts, wherever it is judged
    an object that began before the `start` of an earlier record, and that nothing in the newest
    state names, is *dead* from this version on: looking at an older version may still take it
    a dead object whose life meets none of the spans is deleted, once the record is applied

The first two take a record each: what is not void yet may be named between the look at the newest
state and the record that calls it dead. For the same reason a record that brings old values back
may name only what is older than the version it goes back to, or what is not void.

Nothing here depends on a clock but how much is kept, and that is counted in the log's own times.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from everpool.records import Collect

DAY_NS = 86_400_000_000_000
KEPT_AGE_NS = 7 * DAY_NS
KEPT_VERSIONS = 1 << 14
# More places than this are not kept: every checkpoint names all of them.
MOST_PLACES = 4096
# How many objects one `Collect` lets go of at most.
MOST_COLLECTED = 4096
_VERSION_DIGITS = 16
_COLLECTED = re.compile(
    r"(?:checkpoints/[0-9a-f]{16}-|index/|pages/|values/(?:0-)?)[0-9a-f]{32}", re.ASCII
)
_END = 1 << 62


class Horizon(msgspec.Struct, array_like=True, frozen=True):
    """What the log says of the past: what is kept, and for how long it is to be.

    Versions from `kept` on can be looked at, replicas may begin at `start`, and uploads from before
    it are void; `voided` is the version at which that came into force. `restored` is the newest
    version that named old objects again, or asked for more to be kept: what was worked out before
    is not true any more. `collected_ns` is the time of the last `Collect`. What is younger than
    `age_ns`, and the newest `versions`, are to be kept.
    """

    kept: int = 0
    start: int = 0
    restored: int = 0
    collected_ns: int = 0
    age_ns: int = KEPT_AGE_NS
    versions: int = KEPT_VERSIONS
    voided: int = 0

    def keeps(self, version: int, pins: Iterable[int]) -> bool:
        """Whether that version can be looked at; `pins` are the versions of the snapshots."""
        return version >= self.kept or version in pins


class Place(Protocol):
    """A checkpoint."""

    @property
    def version(self) -> int:
        """The version of which it is."""
        ...

    @property
    def time_ns(self) -> int:
        """The time of that version in the log."""
        ...

    @property
    def position(self) -> int:
        """The position in the log of the last entry up to that version."""
        ...


P = TypeVar("P", bound=Place)


class Plan(NamedTuple):
    """What is to be kept: see `Collect`."""

    kept: int
    start: int
    islands: list[tuple[int, int]]


def is_collected(key: str) -> bool:
    """Whether an object's key is one of those that are collected; all others are left alone."""
    return _COLLECTED.fullmatch(key) is not None


def upload_version(key: str) -> int:
    """Return the version at which the upload of an object began, by its key.

    That of a checkpoint is the checkpoint's; of what has no such name, 0.
    """
    name = key.rpartition("/")[2]
    version, dash, _ = name.partition("-")
    try:
        return int(version if dash else name[:_VERSION_DIGITS], 16)
    except ValueError:
        return 0


def is_needed(began: int, dead: int, start: int, islands: Iterable[tuple[int, int]]) -> bool:
    """Whether an object that lived from version `began` up to before `dead` meets a span."""
    return dead > start or any(began <= last and dead > first for first, last in islands)


def refusal(
    record: Collect, checkpoint: int, horizon: Horizon, pins: Iterable[int], now: int
) -> str | None:
    """Return why a `Collect` cannot be at version `now`, in words, or None.

    `checkpoint` is the version of the newest checkpoint.
    """
    if horizon.restored > record.version:
        return f"more is needed since version {horizon.restored}"
    if not horizon.kept <= record.kept < now or not horizon.start <= record.start <= record.kept:
        return f"version {horizon.kept} is kept from {horizon.start} on by now"
    # Whoever looked before could not know what was named last of what began before `start`.
    if record.dead and horizon.voided > record.version:
        return f"older uploads were voided at version {horizon.voided}"
    if any(upload_version(key) >= horizon.start for key in record.dead):
        return f"uploads from version {horizon.start} on may be named yet"
    if record.start > checkpoint:
        return f"nothing can begin at version {record.start}"
    for version in pins:
        within = any(first <= version <= last for first, last in record.islands)
        if version < record.kept and not within:
            return f"there is a snapshot of version {version} by now"
    return None


def plan(
    places: Sequence[Place], pins: Iterable[int], horizon: Horizon, version: int, time_ns: int
) -> Plan:
    """Return what is to be kept at a version of that time; `places` are in order.

    The first place is that of `horizon.kept`, or that of a snapshot. What is kept only grows
    smaller.
    """
    newest = max(0, version - horizon.versions)
    old = [place.version for place in places if place.time_ns <= time_ns - horizon.age_ns]
    kept = min(newest, old[-1] if old else 0)
    if len(places) > MOST_PLACES:
        kept = max(kept, places[-MOST_PLACES].version)
    kept = max(kept, horizon.kept)
    start = max(place_of(places, kept).version, horizon.start)
    # What is older than the first place cannot be looked at, and takes nothing.
    first = places[0].version
    islands = {
        (place_of(places, pin).version if pin >= first else pin, pin) for pin in pins if pin < kept
    }
    return Plan(kept, start, sorted(islands))


def place_of(places: Sequence[P], version: int) -> P:
    """Return the newest place that is not behind a version; there must be one."""
    return next(place for place in reversed(places) if place.version <= version)


def end_of(places: Iterable[Place], version: int) -> int | None:
    """Return the position up to which the log is kept where a version is; None: to its end."""
    return next((place.position for place in places if place.version >= version), None)


def needed_places(places: Sequence[P], pins: Iterable[int], kept: int) -> list[P]:
    """Return those of the places at which something begins that is kept.

    What is kept may be less by now, never more.
    """
    first = places[0].version if places else kept + 1
    wanted = {place_of(places, one).version for one in (*pins, kept) if first <= one <= kept}
    return [place for place in places if place.version > kept or place.version in wanted]


class Unneeded(NamedTuple):
    """Objects with their sizes: those that are newly dead, and those to be deleted.

    A size of 0 may also say that an object is not there any more.
    """

    dead: dict[str, int]
    gone: dict[str, int]


def unneeded(
    listed: Iterable[tuple[str, int]],
    live: Container[str],
    dead_before: Mapping[str, tuple[int, int]],
    start: int,
    planned: Plan,
) -> Unneeded:
    """Compare what is in the store with a state of the log.

    `listed` are keys and sizes, as a list that was begun after the state was read; it may be stale.
    `live` are the keys that the state names, `dead_before` those that it calls dead, with their
    lives, and `start` is that of the state's own horizon: what began later may still be named.
    """
    found = Unneeded({}, {})
    for key, size in listed:
        if key in dead_before:
            if not is_needed(*dead_before[key], planned.start, planned.islands):
                found.gone[key] = size
        elif key not in live and is_collected(key) and upload_version(key) < start:
            found.dead[key] = size
    for key, life in dead_before.items():  # those that were deleted already
        if key not in found.gone and not is_needed(*life, planned.start, planned.islands):
            found.gone[key] = 0
    return found


def needed_spans(places: Sequence[Place], planned: Plan) -> list[tuple[int, int]]:
    """Return which positions of the log are needed: behind the first, up to the second."""
    spans = [(place_of(places, planned.start).position, _END)]
    for first, pin in planned.islands:
        at = next((at for at, place in enumerate(places) if place.version == first), None)
        if at is not None:
            end = end_of(places, pin)
            spans.append((places[at].position, _END if end is None else end))
    return spans
