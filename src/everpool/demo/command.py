"""The command `everpool demo`: tells the story, and stops at the first thing that is not so."""

import shutil
import signal
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import everpool
from everpool.demo import sources, speeds
from everpool.demo.audit import audit
from everpool.demo.storm import DemoFailedError, Storm
from everpool.demo.teller import ACCOUNTS

_ACCOUNTS = 1000
_OPENING_BALANCE = 1000
_TELLERS = 4
_KILL_EVERY_S = 0.4

_out = Console(highlight=False)


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Make the pool in DIR and leave it there."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=3600, help="How long writers are killed.")
    ] = 15.0,
    seed: Annotated[int, typer.Option(help="Chooses who is killed, and when.")] = 0,
) -> None:
    """Prove on real data that nothing acknowledged is lost while writers are killed.

    MRI volumes and a table are stored in a pool. Four processes move money between accounts of a
    shared array in the same pool, while one after another is killed without warning and replaced.
    Then everything is checked, and speeds are measured beside the machine's own limits.
    """
    try:
        with _folder(keep) as folder:
            _tell(folder, seconds, seed)
    except sources.MissingPackageError as missing:
        _out.print(f"{missing} Install what the demo needs with:\n\n    {escape(sources.INSTALL)}")
        _out.print("\nor, in the source tree, run it with:\n\n    make demo")
        raise typer.Exit(1) from None
    except DemoFailedError as failure:
        _out.print(f"[bold red]FAILED[/bold red]  {escape(str(failure))}")
        raise typer.Exit(1) from None


@contextmanager
def _folder(keep: Path | None) -> Generator[Path, None, None]:
    """Yield the folder to work in; removed at the end, however that comes, unless it is kept."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if (keep / "pool").exists():
            raise everpool.ExistsError(f"{keep / 'pool'} exists: name another folder with --keep")
        yield keep
        _out.print(f"\nThe pool stays in {keep / 'pool'}; look at it with everpool ls -l")
        return
    folder = Path(tempfile.mkdtemp(prefix="everpool-demo-"))
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _tell(folder: Path, seconds: float, seed: int) -> None:
    path = folder / "pool"
    volumes, table = sources.read_volumes(), sources.read_table()
    _heading("1. Real data go into one pool")
    with everpool.open(path) as pool:
        _store_data(pool, volumes, table)
        pool.allocate_array(ACCOUNTS, (_ACCOUNTS,), "int64")[:] = _OPENING_BALANCE
    _say(f"accounts    {_ACCOUNTS:,} of them with {_OPENING_BALANCE:,} each, in a shared array")
    with Storm(path, _TELLERS, seed) as storm:
        _rage(storm, seconds)
        _heading("3. The pool is opened again, and everything is checked")
        begin = time.perf_counter()
        with everpool.open(path, create=False) as pool:
            _say(f"opened in {(time.perf_counter() - begin) * 1000:.0f} ms, repairs included")
            _check(pool, storm)
            _heading("4. Speed, beside what this machine can do at most")
            _show_speeds(pool, folder)
    _out.print(
        f"\n[bold green]Proved:[/bold green] {storm.kills} processes were killed while they wrote, "
        f"and of {storm.acknowledged:,} acknowledged transfers none was lost or doubled."
    )


def _store_data(pool: everpool.Pool, volumes: list[sources.Volume], table: Any) -> None:
    for volume in volumes:
        with pool.transaction() as tx:
            tx[volume.name] = volume.voxels
            tx[volume.name + "/affine"] = volume.affine
        shape = " x ".join(map(str, volume.voxels.shape))
        _say(f"{volume.name:<11} {volume.what}, {shape} voxels of {volume.voxels.dtype}")
    pool["airports"] = table
    _say(f"{'airports':<11} table, {table.num_rows:,} rows x {table.num_columns} columns")


def _rage(storm: Storm, seconds: float) -> None:
    _heading(f"2. {_TELLERS} processes move money, and one after another is killed")
    _say("A transfer changes two accounts and writes an audit entry, in one transaction.")
    _say("When it is on the disk the process reports it. SIGKILL comes without warning.")
    with _out.status("starting") as status:

        def report() -> None:
            status.update(f"{storm.acknowledged:,} transfers, {storm.kills} processes killed")

        storm.rage(seconds, _KILL_EVERY_S, report)
    _say(f"{storm.acknowledged:,} transfers reported, {storm.kills} processes killed")


def _check(pool: everpool.Pool, storm: Storm) -> None:
    failed = 0
    for check in audit(pool, storm, _OPENING_BALANCE):
        mark = "[green]yes[/green]" if check.held else "[bold red]NO[/bold red] "
        _out.print(f"   {mark}  {check.statement}", soft_wrap=True)
        _out.print(Padding(f"[dim]{check.figures}[/dim]", (0, 0, 0, 8), expand=False))
        failed += not check.held
    if failed:
        raise DemoFailedError(f"{failed} of the statements above did not hold")


def _show_speeds(pool: everpool.Pool, folder: Path) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("Everpool", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("what limits", no_wrap=True)
    with _out.status("measuring"):
        for speed in speeds.measure(pool, folder):
            ratio = f"{_three_digits(speed.pool_s / speed.limit_s)} x"
            times = (_time(speed.pool_s), _time(speed.limit_s))
            table.add_row(speed.what, *times, ratio, speed.limit)
    _out.print(table)


def _time(seconds: float) -> str:
    for factor, unit in ((1e9, "ns"), (1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _heading(text: str) -> None:
    _out.print(f"\n[bold]{text}[/bold]")


def _say(text: str) -> None:
    _out.print(Padding(escape(text), (0, 0, 0, 3), expand=False))
