"""The commands that look at a pool as a whole: watch, stats, verify."""

import json
import signal
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

import everpool
from everpool.cli.boundary import FAILED, INTERRUPTED, Example, add_command, exit_code
from everpool.cli.opening import AsJson, PoolPath, open_to_read
from everpool.cli.terminal import Meter, meter, print_json, print_line, printable, say

_LISTEN_S = 0.5


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "watch", *_WATCH_EXAMPLES)(watch)
    add_command(app, "stats", *_STATS_EXAMPLES)(stats)
    add_command(app, "verify", *_VERIFY_EXAMPLES)(verify)


_WATCH_EXAMPLES = (
    Example("the next three changes below audit/", "everpool watch ./pool audit/ --count 3"),
    Example("the first change ever, as JSON", "everpool watch ./pool --since 0 --count 1 --json"),
)


def watch(
    pool: PoolPath,
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only names that begin so.")
    ] = "",
    since: Annotated[
        int | None, typer.Option(min=0, help="Begin with what changed after this version.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many changes; else with Ctrl-C.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print changes as they are committed, by whatever process, one a line.

    The columns are version, what happened (put, delete, allocate, write), name, and for memory the
    bytes that were written. With --json each line is an object.
    """
    left = count
    with open_to_read(pool) as opened, opened.watch(prefix, since) as changes:
        while left is None or left > 0:
            change = changes.get(_LISTEN_S)
            if change is None:
                continue
            _print_change(change, as_json)
            sys.stdout.flush()
            left = None if left is None else left - 1


def _print_change(change: everpool.Change, as_json: bool) -> None:
    if as_json:
        fields = ("version", "kind", "name", "offset", "size")
        print_json({field: getattr(change, field) for field in fields})
        return
    line = f"{change.version:>8}  {change.kind:<8}  {printable(change.name)}"
    if change.kind == "write":
        line += f"  [{change.offset}:{change.offset + change.size}]"
    print_line(line)


_STATS_EXAMPLES = (
    Example("what there is to know about a pool", "everpool stats ./pool"),
    Example("one figure, in a script", "everpool stats ./pool --json | jq .version"),
)


def stats(pool: PoolPath, as_json: AsJson = False) -> None:
    """Print figures about a pool: its version, its size, how far this reader is behind."""
    with open_to_read(pool) as opened:
        figures = opened.stats()
    if as_json:
        print_json(figures)
        return
    width = max(map(len, figures), default=0)
    for key, value in figures.items():
        print_line(f"{key:<{width}}  {value}")


_VERIFY_EXAMPLES = (
    Example("check every byte", "everpool verify ./pool"),
    Example("in a script: exits 1 on damage", "everpool verify ./pool --json || echo damaged"),
)


def verify(pool: PoolPath, as_json: AsJson = False) -> None:
    """Check every checksum of a pool, and list all that is damaged.

    The check runs in a process of its own, because a damaged index can crash the library that
    reads it; that too is reported as damage.
    """
    with meter() as bar:
        bar.begin("checking every byte")
        found = _verify_in_child(pool, bar)
    if "error" in found:
        say(f"[red]{escape(found['kind'])}:[/red] {escape(found['error'])}")
        raise typer.Exit(found["exit"])
    damage: list[dict[str, str]] = found["damage"]
    if as_json:
        print_json({"ok": not damage, "damage": damage})
    for entry in [] if as_json else damage:
        print_line(f"damaged  {printable(entry['name'])}  {entry['detail']}".rstrip())
    if damage:
        raise typer.Exit(FAILED)
    if not as_json:
        print_line("ok: every checksum holds")


def _verify_in_child(pool: str, bar: Meter) -> dict[str, Any]:
    """Run `_check` in a process that may crash; it prints how far it is, then what it found."""
    command = [sys.executable, "-m", "everpool.cli.watching", pool]
    found: dict[str, Any] = {}
    done_bytes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            found = json.loads(line)
            if "total_bytes" in found:
                if not done_bytes:
                    bar.begin("checking every byte", found["total_bytes"])
                bar.advance(found["done_bytes"] - done_bytes)
                done_bytes = found["done_bytes"]
    if child.returncode == 0:
        return found
    if child.returncode in (-signal.SIGINT, INTERRUPTED):
        raise KeyboardInterrupt
    how = "failed"
    if child.returncode < 0:
        how = f"crashed ({signal.strsignal(-child.returncode)})"
    detail = f"reading the index {how}: its pages are damaged; restore the pool from a copy"
    return {"damage": [{"name": "", "detail": detail}]}


def _check(pool: str) -> dict[str, Any]:
    try:
        with open_to_read(pool) as opened:
            report = opened.verify(_print_progress)
    except everpool.CorruptionError as error:
        return {"damage": [{"name": "", "detail": str(error)}]}
    except everpool.EverpoolError as error:
        return {"error": str(error), "kind": error.kind, "exit": exit_code(error)}
    return {"damage": [_as_entry(damage) for damage in report.damage]}


def _print_progress(done_bytes: int, total_bytes: int) -> None:
    print(json.dumps({"done_bytes": done_bytes, "total_bytes": total_bytes}), flush=True)


def _as_entry(damage: Any) -> dict[str, str]:
    if isinstance(damage, str):
        return {"name": "", "detail": damage}
    return {"name": str(damage.name), "detail": str(damage.detail)}


if __name__ == "__main__":
    try:
        print(json.dumps(_check(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
