"""How commands open their pool, and the arguments that many of them share."""

from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer

import everpool

PoolPath = Annotated[
    str,
    typer.Argument(
        metavar="POOL", help="The pool's folder, or its URL: s3://, gs://, az:// or file:///."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The object's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def open_to_read(pool: str) -> everpool.Pool:
    """Open a pool that exists, changing nothing in it; it has all that was committed before."""
    return _up_to_date(everpool.open(pool, create=False, read_only=True))


def open_to_write(pool: str, *, create: bool = False) -> everpool.Pool:
    """Open a pool for changes; `create` makes it when there is none."""
    return _up_to_date(everpool.open(pool, create=create))


def _up_to_date(opened: everpool.Pool) -> everpool.Pool:
    # What another host committed a moment ago comes by itself, but later than a script expects.
    if isinstance(opened.path, str):
        try:
            opened.sync()
        except BaseException:
            opened.close()
            raise
    return opened


def is_url(pool: str) -> bool:
    """Return whether a pool is named by a URL, and not by a folder."""
    return "://" in pool


def folder_of(pool: str) -> Path | None:
    """Return the folder of this machine that a pool lies in; None when that is a bucket."""
    if not is_url(pool):
        return Path(pool).resolve()
    parts = urlsplit(pool)
    return Path(unquote(parts.path)).resolve() if parts.scheme.lower() == "file" else None
