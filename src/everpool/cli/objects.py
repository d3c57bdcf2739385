"""The commands for single objects: put, get, cat, ls, rm."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import everpool
from everpool.cli import arrow_files, npy
from everpool.cli.boundary import USAGE, Example, add_command
from everpool.cli.describe import (
    ARRAY,
    BATCH,
    BYTES,
    JSON,
    MEMORY,
    MEMORY_ARRAY,
    TABLE,
    TEXT,
    describe,
    kind_of,
    summary,
)
from everpool.cli.exporting import write_memory, write_value
from everpool.cli.files import CHUNK_BYTES, FileWriter
from everpool.cli.opening import AsJson, Name, PoolPath, open_to_read, open_to_write
from everpool.cli.tagged import from_json, to_json
from everpool.cli.terminal import (
    count,
    human_size,
    meter,
    print_line,
    printable,
    say,
    spinner,
)
from everpool.errors import InvalidError, NotFoundError

_SHOW_PROGRESS_BYTES = 16 << 20
_REMOVE_AT_ONCE = 1000


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    add_command(app, "put", *_PUT_EXAMPLES)(put)
    add_command(app, "get", *_GET_EXAMPLES)(get)
    add_command(app, "cat", *_CAT_EXAMPLES)(cat)
    add_command(app, "ls", *_LS_EXAMPLES)(ls)
    add_command(app, "rm", *_RM_EXAMPLES)(rm)


_PUT_EXAMPLES = (
    Example("store a text", "everpool put ./pool greeting 'hello, world'"),
    Example("store a number, a list or an object", "everpool put ./pool limits '[1, 2.5]' --json"),
    Example("store an array from a file of NumPy's", "everpool put ./pool scan @scan.npy"),
    Example("store any other file as bytes", "everpool put ./pool logo @logo.png"),
    Example("store what another program prints", "date | everpool put ./pool today - --str"),
)


def put(
    pool: PoolPath,
    name: Name,
    value: Annotated[
        str,
        typer.Argument(
            metavar="VALUE", help="A text, @FILE for what a file holds, or - for standard input."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="VALUE is JSON.")] = False,
    as_str: Annotated[bool, typer.Option("--str", help="VALUE is text.")] = False,
    as_bytes: Annotated[bool, typer.Option("--bytes", help="VALUE is bytes.")] = False,
) -> None:
    """Store a value under a name; it is on the disk when the command returns.

    A VALUE given on the command line is text. A file or standard input is bytes, except that an
    .npy file is an array, and a .parquet or .arrow file a table. --json, --str and --bytes say
    otherwise. A text that begins with @ is written @@.

    The pool is created when there is none.
    """
    if as_json + as_str + as_bytes > 1:
        raise InvalidError("give only one of --json, --str and --bytes")
    wanted = JSON if as_json else TEXT if as_str else BYTES if as_bytes else None
    with spinner(f"storing {printable(name)}"):
        stored = _read_value(value, wanted)
        with open_to_write(pool, create=True) as opened:
            opened[name] = stored


def _read_value(argument: str, wanted: str | None) -> object:
    if argument == "-":
        return _decoded(sys.stdin.buffer.read(), wanted or BYTES)
    if not argument.startswith("@") or argument.startswith("@@"):
        text = argument.removeprefix("@") if argument.startswith("@@") else argument
        return _decoded(text.encode("utf-8", "surrogateescape"), wanted or TEXT)
    path = Path(argument[1:])
    if wanted is None and path.suffix == ".npy":
        return npy.read_array(path)
    if wanted is None and path.suffix in (".parquet", ".arrow"):
        return arrow_files.read_table(path, TABLE)
    return _decoded(path.read_bytes(), wanted or BYTES)


def _decoded(data: bytes, wanted: str) -> object:
    if wanted == BYTES:
        return data
    if wanted == JSON:
        return from_json(data)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidError(f"the text is not UTF-8 ({error}): store it with --bytes") from None


_GET_EXAMPLES = (
    Example("print a text, or anything that JSON can say", "everpool get ./pool greeting"),
    Example("the same, always as JSON", "everpool get ./pool limits --json"),
    Example("copy an array into a file", "everpool get ./pool scan --out copy.npy"),
    Example("what an array or memory is", "everpool get ./pool scan"),
)


def get(
    pool: PoolPath,
    name: Name,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write to FILE instead.")
    ] = None,
) -> None:
    """Print a value, or write it to a file.

    Text is printed as it is, and what JSON can say as JSON. Bytes are printed as they are, but not
    to a terminal. Of arrays, tables and memory a summary is printed; --out writes all of it: arrays
    as .npy, tables as .parquet or .arrow (by FILE's ending), memory as its bytes.

    --json adds types that JSON lacks as {"$everpool": TYPE, "value": ...}, which put --json reads.
    """
    with open_to_read(pool) as opened:
        value: Any = opened[name]
        kind = kind_of(value)
        if out is not None:
            _write_out(opened, name, value, kind, out)
        elif as_json:
            _require_json(name, kind)
            print_line(to_json(value))
        elif kind == TEXT:
            print_line(value)
        elif kind == JSON:
            print_line(to_json(value))
        elif kind == BYTES and not sys.stdout.isatty():
            _write_raw(value)
        else:
            _print_summary(name, value)


def _require_json(name: str, kind: str) -> None:
    if kind not in (TEXT, JSON, BYTES):
        raise InvalidError(
            f"{name!r} is of kind {kind}, which is not printed as JSON: write it to a file with "
            "--out, or describe it with everpool ls -l --json"
        )


def _write_out(opened: everpool.Pool, name: str, value: Any, kind: str, out: Path) -> None:
    if kind in (ARRAY, MEMORY_ARRAY) and out.suffix != ".npy":
        raise InvalidError(f"{name!r} is an array: name a file that ends in .npy")
    with meter() as bar, FileWriter(out, bar, data_hash=True) as file:
        bar.begin(str(out), describe(name, value)["size"])
        if kind == MEMORY_ARRAY:
            npy.write_header(value.dtype, value.shape, file)
        if kind in (MEMORY, MEMORY_ARRAY):
            memory = opened.memory(name)
            write_memory(memory, memory.extents(), file)
        elif kind == TEXT:
            file.write(value.encode())
        else:
            write_value(kind, value, file, out.suffix)


def _print_summary(name: str, value: Any) -> None:
    facts = describe(name, value)
    print_line(f"{printable(name)}: {facts['kind']} {summary(facts)}".rstrip())
    print_line(f"size: {human_size(facts['size'])}")
    if "version" in facts:
        print_line(f"changed last in version {facts['version']}")
    if facts["kind"] == ARRAY and value.size:
        print_line(str(value))
    if facts["kind"] in (TABLE, BATCH):
        print_line(value.schema.to_string(show_schema_metadata=False))
    if facts["kind"] == BYTES:
        say(f"[dim]its bytes: everpool cat POOL {printable(name)}[/dim]")


_CAT_EXAMPLES = (
    Example("the bytes of an object", "everpool cat ./pool logo > copy.png"),
    Example(
        "16 bytes of memory, from byte 64 on",
        "everpool cat ./pool ledger --offset 64 --size 16 | xxd",
    ),
)


def cat(
    pool: PoolPath,
    name: Name,
    offset: Annotated[int, typer.Option(min=0, help="The first byte to print.")] = 0,
    size: Annotated[int | None, typer.Option(min=0, help="How many bytes; else all.")] = None,
) -> None:
    """Print the raw bytes of an object: bytes, text (UTF-8), an array's elements, or memory.

    Memory is read in pieces of 4 MiB, each as one commit left it.
    """
    with open_to_read(pool) as opened:
        value: Any = opened[name]
        kind = kind_of(value)
        length = describe(name, value)["size"]
        if offset > length or (size is not None and offset + size > length):
            raise InvalidError(f"{name!r} has {length} bytes: the range asked for is outside")
        stop = length if size is None else offset + size
        if kind in (MEMORY, MEMORY_ARRAY):
            memory = opened.memory(name)
            for start in range(offset, stop, CHUNK_BYTES):
                _write_raw(memory.read(start, min(CHUNK_BYTES, stop - start)))
        elif kind in (TEXT, BYTES):
            _write_raw((value.encode() if kind == TEXT else value)[offset:stop])
        elif kind == ARRAY:
            for chunk in _array_chunks(value, offset, stop):
                _write_raw(chunk)
        else:
            raise InvalidError(
                f"{name!r} is of kind {kind} and has no bytes of its own: use everpool get"
            )


def _array_chunks(array: Any, offset: int, stop: int) -> Iterator[bytes]:
    if array.flags.c_contiguous and array.nbytes:
        data = memoryview(array.reshape(-1).view("u1"))
    else:
        data = memoryview(array.tobytes())
    for start in range(offset, stop, CHUNK_BYTES):
        yield bytes(data[start : min(start + CHUNK_BYTES, stop)])


def _write_raw(data: bytes) -> None:
    sys.stdout.buffer.write(data)


_LS_EXAMPLES = (
    Example("every name, in order", "everpool ls ./pool"),
    Example("the names that begin so, with what they are", "everpool ls -l ./pool scans/"),
    Example("how many bytes arrays take", "everpool ls -l --json ./pool | jq 'map(.size) | add'"),
)


def ls(
    pool: PoolPath,
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only names that begin so.")
    ] = "",
    long: Annotated[
        bool, typer.Option("--long", "-l", help="Show kind, size, version, type and shape.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List names in order, one a line.

    With -l the columns are kind, size, the version that changed it last (of arrays and memory),
    name, and the type and shape of arrays and tables. With --json one JSON array is printed: of
    names, or with -l of objects.
    """
    with open_to_read(pool) as opened:
        entries = _entries(opened, prefix) if long else opened.names(prefix)
        if as_json:
            _print_json_array(entries)
            return
        for entry in entries:
            print_line(printable(entry) if isinstance(entry, str) else _long_line(entry))


def _entries(opened: everpool.Pool, prefix: str) -> Iterator[dict[str, Any]]:
    for name in opened.names(prefix):
        try:
            facts = describe(name, opened[name])
            if facts["kind"] == ARRAY:
                facts["version"] = opened.array(name).version
        except (NotFoundError, InvalidError):
            continue  # deleted or replaced since it was looked at
        yield facts


def _long_line(facts: dict[str, Any]) -> str:
    columns = f"{facts['kind']:<12} {human_size(facts['size']):>10} {facts.get('version', '-'):>8}"
    return f"{columns}  {printable(facts['name'])}  {summary(facts)}".rstrip()


def _print_json_array(entries: Iterator[Any]) -> None:
    separator = "[\n"
    for entry in entries:
        sys.stdout.write(separator + json.dumps(entry, ensure_ascii=False))
        separator = ",\n"
    print_line("\n]" if separator.startswith(",") else "[]")


_RM_EXAMPLES = (
    Example("remove two objects, in one commit", "everpool rm ./pool greeting limits"),
    Example("remove every name that begins so", "everpool rm ./pool --prefix scans/ --yes"),
)


def rm(
    pool: PoolPath,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Names.")] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Every name that begins so.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove objects. Names given one by one go in one commit, or none of them does.

    --prefix asks first, and removes a thousand names a commit.
    """
    if bool(names) == (prefix is not None):
        raise InvalidError("name the objects to remove, or give --prefix")
    with open_to_write(pool) as opened:
        if names:
            opened.run(lambda tx: _remove(tx, names))
            return
        found = list(opened.names(prefix or ""))
        if not found:
            raise NotFoundError(f"no name begins with {prefix!r}", prefix=prefix)
        if not yes:
            _confirm(count(len(found), "object"), prefix or "")
        for start in range(0, len(found), _REMOVE_AT_ONCE):
            batch = found[start : start + _REMOVE_AT_ONCE]
            opened.run(lambda tx, batch=batch: _remove(tx, [n for n in batch if n in tx]))
        say(f"removed {count(len(found), 'object')}")


def _remove(tx: everpool.Transaction, names: list[str]) -> None:
    for name in dict.fromkeys(names):
        del tx[name]


def _confirm(what: str, prefix: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidError(f"{what} would be removed: say --yes to do it without asking")
    if not typer.confirm(f"Remove {what} whose names begin with {prefix!r}?", err=True):
        raise typer.Exit(USAGE)
