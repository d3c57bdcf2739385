"""How commands open their pool, and the arguments that many of them share."""

from pathlib import Path
from typing import Annotated

import typer

import everpool

PoolPath = Annotated[Path, typer.Argument(metavar="POOL", help="The pool's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The object's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def open_to_read(path: Path) -> everpool.Pool:
    """Open a pool that exists, changing nothing in it."""
    return everpool.open(path, create=False, read_only=True)


def open_to_write(path: Path, *, create: bool = False) -> everpool.Pool:
    """Open a pool for changes; `create` makes it when there is none."""
    return everpool.open(path, create=create)
