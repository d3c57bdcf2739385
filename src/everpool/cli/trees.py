"""The commands that carry whole folders: import and export."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import everpool
from everpool.cli.boundary import FAILED, Example, add_command
from everpool.cli.costs import Plan
from everpool.cli.exporting import export_pool
from everpool.cli.importing import import_tree
from everpool.cli.opening import (
    AsJson,
    PoolPath,
    folder_of,
    is_url,
    open_to_read,
    open_to_write,
)
from everpool.cli.terminal import (
    count,
    human_size,
    meter,
    print_json,
    print_line,
    printable,
    say,
    say_each,
)
from everpool.errors import InvalidError


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "import", *_IMPORT_EXAMPLES)(import_)
    add_command(app, "export", *_EXPORT_EXAMPLES)(export)


_IMPORT_EXAMPLES = (
    Example("every file of a folder, named by its path", "everpool import ./pool ./data"),
    Example("the same below a prefix", "everpool import ./pool ./data --prefix monday/"),
    Example("an exported folder, into another pool", "everpool import ./other ./copy"),
)


def import_(
    pool: PoolPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to carry in.")],
    prefix: Annotated[str, typer.Option(help="Put this before every name.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace what differs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Carry a tree of files into a pool.

    A file becomes an object named by its path below DIR: .npy files become arrays, any other file
    bytes. A folder that export wrote is recognised, and names and types are restored exactly.

    Names that hold the same already are skipped, so an interrupted import is finished by running
    it again. When a name holds something else, nothing is imported unless --force is given.
    """
    with meter() as bar, open_to_write(pool, create=True) as opened:
        result = import_tree(
            opened, folder, pool_path=folder_of(pool), prefix=prefix, force=force, meter=bar
        )
    for name in result.as_bytes:
        say(f"[yellow]kept as bytes:[/yellow] {escape(printable(name))} is no plain .npy array")
    say_each("left out", result.left_out, "yellow")
    if as_json:
        print_json(asdict(result))
        return
    line = f"imported {count(result.objects, 'object')}, {human_size(result.bytes)}"
    if result.unchanged:
        line += f"; {result.unchanged} were there already"
    print_line(line)


_EXPORT_EXAMPLES = (
    Example("the whole pool as files", "everpool export ./pool ./copy"),
    Example("the names that begin so", "everpool export ./pool ./scans --prefix scans/"),
    Example("what it would write, and about how many requests", "everpool export ./pool ./copy -n"),
    Example("while others write without pause", "everpool export ./pool ./rough --live"),
)


def export(
    pool: PoolPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    prefix: Annotated[str, typer.Option(help="Only names that begin so.")] = "",
    force: Annotated[bool, typer.Option("--force", help="DIR may hold files.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Write nothing; list names, bytes, requests.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Take each object as it is when its turn comes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a pool out as a tree of plain files, all of one version.

    Arrays become .npy files, bytes and memory files of their bytes, text and what JSON can say
    .json files, tables .parquet files (.arrow where Parquet would lose a type; both need pyarrow).
    DIR/manifest.json maps every name to its file, kind, size and SHA-256. Names that are no safe
    paths are escaped; nothing is ever written outside DIR.

    An interrupted export is finished by running it again. Of a pool at a URL it first says about
    how many requests it makes, and how many bytes leave the bucket.
    """
    own = folder_of(pool)
    if own is not None and folder.resolve().is_relative_to(own):
        raise InvalidError(f"{folder} is inside the pool: export to a folder of its own")
    with open_to_read(pool) as opened:
        if dry_run or is_url(pool):
            plan = _export_plan(opened, pool, prefix)
            if dry_run:
                plan.show("export", as_json)
                return
            say(plan.requests.in_words())
        with meter() as bar:
            result = export_pool(opened, folder, prefix=prefix, force=force, live=live, meter=bar)
    say_each("damaged", result.damaged)
    if as_json:
        print_json(asdict(result))
    else:
        what = f"{count(result.objects, 'object')}, {human_size(result.bytes)}"
        print_line(f"exported {what}, to {folder}")
    if result.damaged:
        raise typer.Exit(FAILED)


def _export_plan(opened: everpool.Pool, pool: str, prefix: str) -> Plan:
    plan = Plan()
    plan.requests.open(pool)
    for item in plan.items(opened, opened.names(prefix)):
        if is_url(pool):
            plan.requests.read(item)
        plan.add(item, "write")
    return plan
