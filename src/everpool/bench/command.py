"""`everpool bench`: measure everything, show a table, save a plot."""

import importlib.util
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from everpool.bench import (
    machine,
    report,
    rows_bucket,
    rows_bucket_costs,
    rows_reading,
    rows_sharing,
    rows_writing,
    servers,
)
from everpool.bench.lab import FULL, QUICK, ROWS, Lab, Row, Sizes
from everpool.bench.measure import Result

# Importing these modules enters their rows into ROWS, in this order.
ROW_MODULES = (rows_reading, rows_writing, rows_sharing, rows_bucket, rows_bucket_costs)
ROOM_FOR_FILES = 12
WIDTH_WITHOUT_TERMINAL = 132


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few rounds: see that it works.")
    ] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", help="Only these rows, by commas or repeated; see --list."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often everybody takes a turn (default 25).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Save every round's figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save a picture here (PNG, SVG or PDF; wants matplotlib).")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Save the table here as Markdown.")] = None,
    folder: Annotated[
        Path,
        typer.Option("--dir", help="Measure on the file system of this folder.", file_okay=False),
    ] = Path(),
    install_peers: Annotated[
        bool, typer.Option("--install-peers", help="First install redis-server (apt-get, root).")
    ] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="List the rows and stop.")] = False,
) -> None:
    """Measure Everpool beside this machine's limits and its peers.

    Every row compares within one run: contenders take turns, round by round, and the median
    counts. All files lie in one temporary folder below --dir, which is removed in the end.

    Examples:

        everpool bench --quick

        everpool bench --plot speed.png --json speed.json

        everpool bench --rows commit-one,commit-threads --dir /mnt/fast
    """
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_WITHOUT_TERMINAL)
    sizes = QUICK if quick else FULL
    if rounds is not None:
        sizes = replace(sizes, rounds=rounds)
    if list_rows:
        for row in ROWS.values():
            console.print(f"[bold]{row.name:<17}[/] {row.title(sizes)}", highlight=False)
        return
    chosen = choose(rows)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("a plot wants matplotlib: pip install matplotlib")
    if install_peers:
        console.print(servers.install_redis(), highlight=False)
    facts, results = run(chosen, sizes, folder, console)
    report.print_table(console, results)
    if json_file is not None:
        report.write_json(json_file, facts, results)
    if markdown is not None:
        markdown.write_text(report.markdown(results))
    if plot is not None:
        importlib.import_module("everpool.bench.plot").write_plot(plot, results, facts)
    for saved in filter(None, (json_file, markdown, plot)):
        console.print(f"saved {saved}", highlight=False)


def choose(names: Sequence[str] | None) -> list[Row]:
    """The rows of those names (all of them for none), in the order of the list."""
    wanted = {name for given in names or () for name in given.replace(",", " ").split()}
    unknown = sorted(wanted - set(ROWS))
    if unknown:
        raise typer.BadParameter(
            f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}"
        )
    return [row for row in ROWS.values() if not wanted or row.name in wanted]


def run(
    rows: Sequence[Row], sizes: Sizes, folder: Path, console: Console
) -> tuple[dict[str, str], list[Result]]:
    """Measure the rows in a temporary folder below `folder`; returns the machine and results."""
    folder = folder.resolve()  # redis-server works in a folder of its own
    folder.mkdir(parents=True, exist_ok=True)
    sizes = fitting(sizes, folder, console)
    results: list[Result] = []
    with (
        ended_in_order(),
        tempfile.TemporaryDirectory(
            prefix="everpool-bench-", dir=folder, ignore_cleanup_errors=True
        ) as place,
    ):
        facts = machine.facts(Path(place))
        for what, words in facts.items():
            console.print(f"[dim]{what:<25}[/]{words}", highlight=False)
        with _progress(console) as progress, ExitStack() as ending:
            lab = Lab(Path(place), sizes, lambda text: progress.console.print(f"… {text}"))
            ending.callback(lab.close)
            overall = progress.add_task("all rows", total=len(rows))
            for row in rows:
                rounds = min(sizes.rounds, row.rounds_at_most)
                task = progress.add_task(row.name, total=rounds + 1)
                results.append(lab.measure(row, rounds, lambda t=task: progress.advance(t)))
                progress.remove_task(task)
                progress.advance(overall)
    return facts, results


def fitting(sizes: Sizes, folder: Path, console: Console) -> Sizes:
    """The sizes cut down to the disk and memory that there are; says so."""
    if machine.forgets(folder):
        console.print(
            f"[yellow]{folder} lies in memory: flushes cost nothing there, so the "
            "durable rows say nothing. Choose a folder on a disk by --dir.[/]"
        )
    room = min(shutil.disk_usage(folder).free // ROOM_FOR_FILES, machine.memory_bytes() // 6)
    if sizes.bulk_bytes <= room:
        return sizes
    smaller = max(room // 2**20, 16) * 2**20
    console.print(
        f"[yellow]Bulk writes are cut down to {smaller // 2**20} MiB: there is no room.[/]"
    )
    return replace(sizes, bulk_bytes=smaller)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that nothing is left behind."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    try:
        before = [signal.signal(number, end) for number in numbers]
    except ValueError:  # not the main thread, which alone may ask
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
