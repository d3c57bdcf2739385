"""The command `everpool`: the public names of the package, from a shell."""


def main() -> None:
    """Run the command line; ends the process with one of the exit codes of `everpool --help`."""
    from everpool.cli.app import app

    app(prog_name="everpool")
