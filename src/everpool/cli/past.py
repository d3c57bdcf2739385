"""The commands about a pool's past: snapshot, snapshots, recover, branch."""

import datetime
import re
import shlex
from typing import Annotated

import typer

import everpool
from everpool.cli.boundary import Example, add_command
from everpool.cli.opening import AsJson, PoolPath, is_url, open_to_read, open_to_write
from everpool.cli.terminal import count, print_json, print_line, printable
from everpool.errors import InvalidError

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(second|minute|hour|day|week)s?\s+ago")
_CLOUD = '"file://$PWD/cloud"'
_BEGIN = Example("a pool that keeps its past is one at a URL", f"everpool copy ./pool {_CLOUD}")
_WHEN = "A version, a snapshot's name, a time (2026-01-31T12:00), or like '2 hours ago'."


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "snapshot", *_SNAPSHOT_EXAMPLES)(snapshot)
    add_command(app, "snapshots", *_SNAPSHOTS_EXAMPLES)(snapshots)
    add_command(app, "recover", *_RECOVER_EXAMPLES)(recover)
    add_command(app, "branch", *_BRANCH_EXAMPLES)(branch)


_SNAPSHOT_EXAMPLES = (
    _BEGIN,
    Example("name what is there now", f"everpool snapshot {_CLOUD} before-cleanup"),
)


def snapshot(
    pool: PoolPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")],
    at: Annotated[str | None, typer.Option(help=f"{_WHEN} Now if left out.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Take the name away again.")] = False,
) -> None:
    """Give the pool's newest version a name, so that it can be found again.

    It costs one small commit, whatever the pool holds.
    """
    with open_to_write(pool) as opened:
        if forget:
            opened.forget_snapshot(name)
            print_line(f"forgot {printable(name)}")
        else:
            version = None if at is None else _version(opened, at)
            if name.isdecimal():
                raise InvalidError(f"{name!r} would be taken for a version: add a letter")
            made = opened.snapshot(name, version)
            print_line(f"{printable(made.name)} is version {made.version}")


_SNAPSHOTS_EXAMPLES = (
    _BEGIN,
    Example("name a version", f"everpool snapshot {_CLOUD} before-cleanup"),
    Example("see all of them", f"everpool snapshots {_CLOUD}"),
)


def snapshots(pool: PoolPath, as_json: AsJson = False) -> None:
    """List the pool's snapshots, oldest version first."""
    with open_to_read(pool) as opened:
        found = opened.snapshots()
    for one in found:
        if as_json:
            print_json({"name": one.name, "version": one.version, "time": one.time.isoformat()})
        else:
            time = one.time.astimezone().isoformat(" ", "seconds")
            print_line(f"{one.version:>10}  {time}  {printable(one.name)}")


_RECOVER_EXAMPLES = (
    _BEGIN,
    Example("name a version", f"everpool snapshot {_CLOUD} good"),
    Example("lose something", f"everpool rm {_CLOUD} greeting"),
    Example("bring everything back", f"everpool recover {_CLOUD} --to good"),
)


def recover(
    pool: PoolPath,
    to: Annotated[str, typer.Option(help=_WHEN)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Change nothing; say which version it would be.")
    ] = False,
) -> None:
    """Make everything in the pool what it was, in one commit.

    Nothing is lost by it: the versions in between stay, and the command prints how to undo it.
    """
    with open_to_write(pool) as opened:
        version, before = _version(opened, to), opened.version
        if dry_run:
            with opened.at(version) as past:
                print_line(f"version {version} has {count(len(past), 'name')}; nothing was changed")
            return
        after = opened.restore(version)
        if after == before:
            print_line(f"everything is as in version {version} already")
            return
        print_line(f"everything is as in version {version}; this is version {after}")
        print_line(f"to undo it: everpool recover {shlex.quote(pool)} --to {after - 1}")


_BRANCH_EXAMPLES = (
    _BEGIN,
    Example(
        "try something without touching the pool",
        f'everpool branch {_CLOUD} "file://$PWD/experiment"',
    ),
)


def branch(
    pool: PoolPath,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the branch is to be.")],
    at: Annotated[str | None, typer.Option(help=f"{_WHEN} Now if left out.")] = None,
) -> None:
    """Make a pool that begins as this one is, or was, and goes its own way.

    Large values and pages are shared, not copied, so POOL must stay where it is; a snapshot in
    POOL says that there is a branch.
    """
    with open_to_write(pool) as opened:
        version = opened.version if at is None else _version(opened, at)
        opened.branch(url, version)
    print_line(f"{url} begins as version {version}")


def _version(pool: everpool.Pool, when: str) -> int:
    """Return the version that a word of the command line stands for."""
    if when.isdecimal() and len(when) < 20:
        return int(when)
    for one in pool.snapshots():
        if one.name == when:
            return one.version
    if not is_url(str(pool.path)):
        pool.at(pool.version)  # refused, with what to do: a pool at a path keeps no past
    with pool.at(_time(when)) as past:
        return past.version


def _time(when: str) -> datetime.datetime:
    ago = _AGO.fullmatch(when.strip())
    try:
        if ago is not None:
            length = datetime.timedelta(**{f"{ago[2]}s": float(ago[1])})
            return datetime.datetime.now(datetime.UTC) - length
        return datetime.datetime.fromisoformat(when)
    except (ValueError, OverflowError):
        raise InvalidError(
            f"{when!r} is no version, no snapshot of this pool (see `everpool snapshots`), and no "
            "time like 2026-01-31T12:00 or '2 hours ago'"
        ) from None
