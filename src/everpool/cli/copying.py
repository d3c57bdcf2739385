"""The command that carries objects from one pool to another: copy."""

import contextlib
from dataclasses import asdict
from typing import Annotated

import typer

import everpool
from everpool.cli.boundary import FAILED, Example, add_command
from everpool.cli.costs import Plan
from everpool.cli.opening import AsJson, folder_of, is_url, open_to_read, open_to_write
from everpool.cli.terminal import (
    Meter,
    count,
    human_size,
    meter,
    print_json,
    print_line,
    say_each,
)
from everpool.cli.transfer import (
    BATCH_BYTES,
    BATCH_OBJECTS,
    ONE_COMMIT_BYTES,
    Copied,
    Copier,
    difference,
    names_to_copy,
)
from everpool.errors import CorruptionError, InvalidError, NotFoundError

_WHERE = "A pool's folder or URL: s3://, gs://, az:// or file:///."


def register(app: typer.Typer) -> None:
    """Add the command of this module to `app`."""
    add_command(app, "copy", *_COPY_EXAMPLES)(copy)


_COPY_EXAMPLES = (
    Example("a whole pool into another one", "everpool copy ./pool ./backup"),
    Example("the names that begin so", "everpool copy ./pool ./backup --prefix scans/"),
    Example("what it would carry, and about how many requests", "everpool copy ./pool ./b -n"),
    Example("and compare everything afterwards", "everpool copy ./pool ./backup --verify"),
)


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help=_WHERE)],
    target: Annotated[str, typer.Argument(metavar="DST", help=f"{_WHERE} Created if absent.")],
    prefix: Annotated[str, typer.Option(help="Only names that begin so.")] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "-n", help="Change nothing; read SRC, list names and bytes."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare everything afterwards; exit 1 if it differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a pool, or the names under --prefix, into another pool of any kind.

    Values keep their type exactly. Of memory only what was written is copied, so it stays sparse.
    Each object is copied as one version of SRC has it, but not all as the same version. Names in
    DST that hold something else are replaced; names that only DST has stay.

    What DST holds already is compared and not written again, so an interrupted copy is finished by
    running it again. An object appears under its name whole, except memory of which more than 4
    MiB must be written: while that is being filled, DST has a name under everpool/copying/ too.
    """
    if source == target or (folder_of(source) and folder_of(source) == folder_of(target)):
        raise InvalidError(f"{source} and {target} are one pool: name another destination")
    with open_to_read(source) as opened:
        if dry_run:
            _plan(opened, source, target, prefix).show("copy", as_json)
            return
        result = Copied(source, target)
        with open_to_write(target, create=True) as into, meter() as bar:
            Copier(opened, into, result, bar).run(prefix)
            if verify:
                _compare(opened, into, prefix, result, bar)
    _print_result(result, as_json)
    if result.left_out or result.differs:
        raise typer.Exit(FAILED)


def _compare(
    source: everpool.Pool, target: everpool.Pool, prefix: str, result: Copied, bar: Meter
) -> None:
    result.verified = 0
    for name in names_to_copy(source, prefix):
        if name in result.left_out:
            continue
        bar.begin(f"comparing {name}")
        with contextlib.suppress(NotFoundError):  # deleted meanwhile
            try:
                found = difference(source, target, name)
            except CorruptionError as error:
                found = str(error)
            if found is not None:
                result.differs[name] = found
            result.verified += 1


def _print_result(result: Copied, as_json: bool) -> None:
    say_each("left out", result.left_out)
    say_each("differs", result.differs)
    if as_json:
        print_json(asdict(result))
        return
    line = f"copied {count(result.objects, 'object')}, {human_size(result.bytes)}"
    if result.unchanged:
        line += f"; {result.unchanged} were there already"
    if result.verified is not None:
        line += f"; compared {result.verified}"
    print_line(line)


def _plan(source: everpool.Pool, source_url: str, target: str, prefix: str) -> Plan:
    """Return what a copy would carry, and about what it would cost."""
    plan = Plan()
    requests = plan.requests
    requests.open(source_url)
    requests.open(target)
    there = _names_there(target, prefix)
    batch = batch_bytes = 0
    for item in plan.items(source, names_to_copy(source, prefix)):
        exists = item.name in there
        if is_url(source_url):
            requests.read(item)
        if is_url(target):
            if exists:
                requests.read(item)
            if item.is_memory:
                whole = item.bytes <= ONE_COMMIT_BYTES
                requests.put += 1 if whole else 2 + 2 * -(-item.bytes // ONE_COMMIT_BYTES)
            else:
                requests.upload(item)
                requests.put += batch == 0
                batch, batch_bytes = batch + 1, batch_bytes + item.bytes
                if batch >= BATCH_OBJECTS or batch_bytes >= BATCH_BYTES:
                    batch = batch_bytes = 0
        plan.add(item, "compare" if exists else "new", exists=exists)
    return plan


def _names_there(target: str, prefix: str) -> set[str]:
    try:
        with open_to_read(target) as opened:
            return set(opened.names(prefix))
    except NotFoundError:
        return set()
