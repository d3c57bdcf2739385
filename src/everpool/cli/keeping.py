"""The commands that say how much of the past is kept: retain and collect."""

import datetime
import re
from typing import Annotated

import typer

from everpool.cli.boundary import Example, add_command
from everpool.cli.opening import AsJson, PoolPath, open_to_read, open_to_write
from everpool.cli.terminal import count, human_size, meter, print_json, print_line
from everpool.errors import InvalidError

_CLOUD = '"file://$PWD/cloud"'
_BEGIN = Example("a pool in a bucket", f"everpool copy ./pool {_CLOUD}")
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)", re.IGNORECASE)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "retain", *_RETAIN_EXAMPLES)(retain)
    add_command(app, "collect", *_COLLECT_EXAMPLES)(collect)


_RETAIN_EXAMPLES = (
    _BEGIN,
    Example("see how long versions are kept", f"everpool retain {_CLOUD}"),
    Example("keep a month", f"everpool retain {_CLOUD} --age 30d"),
    Example("see how long a pool at a path keeps its past", "everpool retain ./pool"),
    Example(
        "keep nothing but the newest version and snapshots",
        f"everpool retain {_CLOUD} --age 0s --versions 0",
    ),
)


def retain(
    pool: PoolPath,
    age: Annotated[
        str | None, typer.Option(help="Keep what is younger: 90s, 30m, 12h, 7d or 4w.")
    ] = None,
    versions: Annotated[
        int | None, typer.Option(min=0, help="Keep the newest so many versions, however old.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say, or change, how long versions are kept for looking back and recovering.

    A version is kept while either rule keeps it. Snapshots are kept until they are forgotten.
    What was collected does not come back.
    """
    if age is None and versions is None:
        with open_to_read(pool) as opened:
            kept = opened.retention
    else:
        length = None if age is None else _length(age)
        with open_to_write(pool) as opened:
            kept = opened.retain(length, versions)
    if as_json:
        print_json({"age_s": kept.age.total_seconds(), "versions": kept.versions})
    elif kept.versions:
        newest = "the newest" if kept.versions == 1 else f"the newest {kept.versions:,}"
        print_line(f"versions are kept for {_words(kept.age)}, and {newest} for longer")
    else:
        print_line(f"versions are kept for {_words(kept.age)}, and the newest one")


_COLLECT_EXAMPLES = (
    _BEGIN,
    Example("see what could go", f"everpool collect {_CLOUD} --dry-run"),
    Example("let go of it", f"everpool collect {_CLOUD}"),
    Example("let go of the past of a pool at a path", "everpool collect ./pool"),
)


def collect(
    pool: PoolPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Change nothing; say what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no version needs that is kept, from the bucket or, at a path, from its past.

    This happens by itself, too, about once an hour while the pool is written to. How much is kept
    is the business of `everpool retain`. Safe to interrupt and to repeat.
    """
    with open_to_write(pool) as opened, meter() as bar:
        seen = 0

        def progress(told: dict[str, int]) -> None:
            nonlocal seen
            bar.begin(f"{told['listed']:,} objects listed, {told['deleted']:,} deleted")
            bar.advance(told["deleted_bytes"] - seen)
            seen = told["deleted_bytes"]

        found = opened.collect(dry_run, progress)
    if as_json:
        print_json(found._asdict())
        return
    verb = "would be deleted" if dry_run else "deleted"
    print_line(f"{count(found.deleted, 'object')} {verb}, {human_size(found.deleted_bytes)}")
    if found.dead:
        print_line(
            f"{count(found.dead, 'object')}, {human_size(found.dead_bytes)}: not in the newest "
            "version, deleted when no older one is kept"
        )
    if found.kept:
        print_line(f"versions from {found.kept} on are kept, and those of snapshots")
    else:
        print_line("no version is too old to be kept")


def _words(age: datetime.timedelta) -> str:
    """Return a length of time in its largest whole unit."""
    seconds = age.total_seconds()
    for unit, noun in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit and seconds % unit == 0:
            return count(int(seconds // unit), noun)
    return count(int(seconds), "second") if seconds == int(seconds) else f"{seconds:g} seconds"


def _length(text: str) -> datetime.timedelta:
    found = _AGE.fullmatch(text.strip())
    try:
        if found is not None:
            seconds = float(found[1]) * _UNIT_S[found[2].lower()]
            return datetime.timedelta(seconds=seconds)
    except OverflowError:
        pass
    raise InvalidError(f"{text!r} is no length of time: write 90s, 30m, 12h, 7d or 4w")
