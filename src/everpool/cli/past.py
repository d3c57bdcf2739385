"""The commands about a pool's past: snapshot, snapshots, recover, branch, checkpoint."""

import datetime
import re
import shlex
from typing import Annotated

import typer

import everpool
from everpool.cli.boundary import Example, add_command
from everpool.cli.opening import AsJson, PoolPath, is_url, open_to_read, open_to_write
from everpool.cli.terminal import (
    count,
    human_size,
    meter,
    print_json,
    print_line,
    printable,
    spinner,
)
from everpool.errors import InvalidError

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(second|minute|hour|day|week)s?\s+ago")
_CLOUD = '"file://$PWD/cloud"'
_BACKUP = '"file://$PWD/backup"'
_WHEN = "A version, a snapshot's name, a time (2026-01-31T12:00), or like '2 hours ago'."


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "snapshot", *_SNAPSHOT_EXAMPLES)(snapshot)
    add_command(app, "snapshots", *_SNAPSHOTS_EXAMPLES)(snapshots)
    add_command(app, "recover", *_RECOVER_EXAMPLES)(recover)
    add_command(app, "branch", *_BRANCH_EXAMPLES)(branch)
    add_command(app, "checkpoint", *_CHECKPOINT_EXAMPLES)(checkpoint)


_SNAPSHOT_EXAMPLES = (
    Example("name what is there now", "everpool snapshot ./pool before-cleanup"),
    Example("a pool in a bucket", f"everpool copy ./pool {_CLOUD}"),
    Example(
        "keep it from being deleted, by the bucket itself where that can lock",
        f"everpool snapshot {_CLOUD} month-end --locked --for-days 30",
    ),
)


def snapshot(
    pool: PoolPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")],
    at: Annotated[str | None, typer.Option(help=f"{_WHEN} Now if left out.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Take the name away again.")] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Nobody shall delete what it needs for a while.")
    ] = False,
    days: Annotated[
        float | None,
        typer.Option(
            "--for-days",
            help="How long a locked one is kept; else as long as the bucket locks what is put, "
            "or 30 days.",
        ),
    ] = None,
) -> None:
    """Give the pool's newest version a name, so that it can be found again.

    It costs one small commit, whatever the pool holds. At a path, the first one begins the pool's
    past, in POOL/past, for which all memory is copied once; what was before cannot be looked at.

    With --locked, which makes a checkpoint, the bucket's own object lock keeps all that the version
    needs from being deleted, by anybody; this needs the package botocore (pip install
    'everpool[lock]') and a bucket on S3 or what is compatible. Anything else is called advisory,
    with the reason.
    """
    if days is not None and not locked:
        raise InvalidError("--for-days says how long --locked is for: add --locked")
    with open_to_write(pool) as opened:
        if locked:
            if forget or at is not None:
                raise InvalidError("--locked is for a new snapshot of the newest version")
            _check_word(name)
            with spinner("locking what the snapshot needs"):
                made = opened.snapshot(name, locked=True if days is None else _days(days))
            print_line(f"{printable(made.name)} is version {made.version}, {_lock_of(made)}")
        elif forget:
            opened.forget_snapshot(name)
            print_line(f"forgot {printable(name)}")
        else:
            version = None if at is None else _version(opened, at)
            _check_word(name)
            made = opened.snapshot(name, version)
            print_line(f"{printable(made.name)} is version {made.version}")


def _check_word(name: str) -> None:
    if name.isdecimal():
        raise InvalidError(f"{name!r} would be taken for a version: add a letter")


def _days(days: float) -> datetime.timedelta:
    try:
        return datetime.timedelta(days=days)
    except (OverflowError, ValueError):
        raise InvalidError(f"{days} is no number of days to lock for") from None


def _lock_of(one: everpool.Snapshot) -> str:
    """Return what keeps a snapshot and until when, in words; empty for one that is not locked."""
    if one.locked_until is None:
        return ""
    until = one.locked_until.astimezone().isoformat(" ", "seconds")
    return f"locked until {until} ({one.lock})"


_SNAPSHOTS_EXAMPLES = (
    Example("name a version", "everpool snapshot ./pool before-cleanup"),
    Example("see all of them", "everpool snapshots ./pool"),
)


def snapshots(pool: PoolPath, as_json: AsJson = False) -> None:
    """List the pool's snapshots, oldest version first.

    A locked one says until when and how: `compliance` and `governance` are modes of the bucket's
    own object lock, as it told them when the snapshot was made; `advisory` is Everpool's word only.
    """
    with open_to_read(pool) as opened:
        found = opened.snapshots()
    for one in found:
        if as_json:
            until = None if one.locked_until is None else one.locked_until.isoformat()
            told = {"name": one.name, "version": one.version, "time": one.time.isoformat()}
            print_json(told | {"lock": one.lock, "locked_until": until})
        else:
            time = one.time.astimezone().isoformat(" ", "seconds")
            lock = f"  {_lock_of(one)}" if one.lock else ""
            print_line(f"{one.version:>10}  {time}  {printable(one.name)}{printable(lock)}")


_RECOVER_EXAMPLES = (
    Example("name a version", "everpool snapshot ./pool good"),
    Example("lose something", "everpool rm ./pool greeting"),
    Example("bring everything back", "everpool recover ./pool --to good"),
)


def recover(
    pool: PoolPath,
    to: Annotated[str | None, typer.Option(help=_WHEN)] = None,
    undelete: Annotated[
        bool,
        typer.Option(
            "--undelete",
            help="Bring back what was deleted from the bucket itself; with --to TIME, also what "
            "was overwritten.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Change nothing; say what would be done.")
    ] = False,
) -> None:
    """Make everything in the pool what it was, in one commit.

    Nothing is lost by it: the versions in between stay, and the command prints how to undo it.

    With --undelete it is the bucket that is brought back, when objects were deleted or overwritten
    behind Everpool's back. The bucket must keep versions (S3 and what is compatible, with the
    package botocore: pip install 'everpool[lock]'). With --to, a time, all of the pool's folder
    becomes what it was then: later commits are hidden. End what uses the pool first.
    """
    if undelete:
        _undelete(pool, to, dry_run)
        return
    if to is None:
        raise InvalidError("say what to go back to with --to, or bring objects back by --undelete")
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


def _undelete(pool: str, to: str | None, dry_run: bool) -> None:
    if not is_url(pool):
        raise InvalidError(f"{pool} is a folder, of which nothing keeps versions: give a URL")
    when = None if to is None else _time(to)
    with spinner("bringing back what the bucket has kept"):
        done = everpool.undelete(pool, when, dry_run=dry_run)
    brought, put, hid = ("would bring", "put", "hide") if dry_run else ("brought", "put", "hid")
    print_line(
        f"{brought} back {count(done.shown, 'deleted object')}, "
        f"{put} back {done.replaced:,} overwritten, {hid} {done.hidden:,} later"
    )


_BRANCH_EXAMPLES = (
    Example(
        "try something without touching the pool",
        'everpool branch ./pool "file://$PWD/experiment"',
    ),
)


def branch(
    pool: PoolPath,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the branch is to be.")],
    at: Annotated[str | None, typer.Option(help=f"{_WHEN} Now if left out.")] = None,
) -> None:
    """Make a pool that begins as this one is, or was, and goes its own way.

    At a URL, large values and pages are shared, not copied, so POOL must stay where it is; a
    snapshot in POOL says that there is a branch. A branch of a pool at a path shares nothing with
    it; what lies on the same disk is linked instead of copied.
    """
    with open_to_write(pool) as opened:
        version = opened.version if at is None else _version(opened, at)
        opened.branch(url, version)
    print_line(f"{url} begins as version {version}")


_CHECKPOINT_EXAMPLES = (
    Example("begin the pool's past, or go on with it", "everpool checkpoint ./pool"),
    Example("make a backup, or bring it up to date", f"everpool checkpoint ./pool {_BACKUP}"),
    Example("see what is in the backup", f"everpool ls {_BACKUP}"),
)


def checkpoint(
    pool: PoolPath,
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="Send it there: s3://, gs://, az:// or file:///."),
    ] = None,
) -> None:
    """Write down everything as it is now, so that it can be found again.

    At a path, that begins the pool's past, or goes on with it: any version since can be looked at
    and brought back. In a bucket, new hosts begin with it. Later ones are made by themselves when
    enough was committed.

    With a URL, a pool at a path sends the checkpoint there as a backup, which is a pool itself: to
    go on from it, open it, or `everpool copy` it to a path. The first time sends everything, later
    times what is new; what was interrupted is finished by a second run. Once the backup was opened
    for writing it has a life of its own, and the next one needs another URL.
    """
    with open_to_write(pool) as opened:
        if url is None:
            with spinner("checkpoint"):
                version = opened.checkpoint()
            print_line(f"checkpoint of version {version}")
            return
        sent = 0
        with meter() as shown:

            def progress(done: int, total: int) -> None:
                nonlocal sent
                if not sent:
                    shown.begin("sending", total)
                shown.advance(done - sent)
                sent = done

            version = opened.checkpoint(url, progress)
    print_line(f"{url} is version {version}; {human_size(sent)} sent")


def _version(pool: everpool.Pool, when: str) -> int:
    """Return the version that a word of the command line stands for."""
    if when.isdecimal() and len(when) < 20:
        return int(when)
    for one in pool.snapshots():
        if one.name == when:
            return one.version
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
