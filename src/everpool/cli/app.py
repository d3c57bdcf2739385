"""The command line as a whole: its help, its commands, and those that come from elsewhere."""

from typing import Annotated, Any

import typer

import everpool
from everpool.cli import copying, keeping, objects, past, trees, watching
from everpool.cli.boundary import (
    Example,
    add_command,
    examples_text,
    exit_codes_text,
    help_text,
)
from everpool.cli.terminal import print_line

_FIRST_STEPS = (
    Example("store something; the pool is created", "everpool put ./pool greeting hello"),
    Example("read it back, from any process", "everpool get ./pool greeting"),
    Example("see what there is", "everpool ls -l ./pool"),
)

app = typer.Typer(
    name="everpool",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"{examples_text(_FIRST_STEPS)}\n\n{exit_codes_text()}",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"everpool {everpool.__version__}")
        raise typer.Exit


def everpool_(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Persistent memory for Python: one pool of named objects that processes share.

    Every command takes the pool first: its folder, or its URL in a bucket. Results go to standard
    output, messages and progress to standard error. `everpool COMMAND --help` shows examples.
    """


app.callback(help=help_text(everpool_))(everpool_)
objects.register(app)
trees.register(app)
copying.register(app)
past.register(app)
keeping.register(app)
watching.register(app)

_FORWARD: dict[str, Any] = {
    "context_settings": {
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
    "add_help_option": False,
}


def bench(context: typer.Context) -> None:
    """Measure speed beside the machine's limits and other stores; prints a table, saves a plot."""
    from everpool.bench.command import bench as command

    _forward(command, context)


def demo(context: typer.Context) -> None:
    """Prove on real data that nothing acknowledged is lost while writers are killed."""
    from everpool.demo.command import demo as command

    _forward(command, context)


def _forward(command: Any, context: typer.Context) -> None:
    """Hand the rest of the command line to a command that is imported only when it is used."""
    if not isinstance(command, typer.Typer):
        inner = typer.Typer(
            add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
        )
        settings = {"help_option_names": ["-h", "--help"]}
        inner.command(help=help_text(command), context_settings=settings)(command)
        command = inner
    name = f"everpool {context.info_name}"
    # Not standalone: it returns its exit code, and its errors pass through our boundary.
    code = command(args=context.args, prog_name=name, standalone_mode=False)
    if isinstance(code, int) and code:
        raise typer.Exit(code)


add_command(app, "bench", **_FORWARD)(bench)
add_command(app, "demo", **_FORWARD)(demo)
