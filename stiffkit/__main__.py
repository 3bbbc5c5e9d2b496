"""The command line: `stiffkit`, or `python -m stiffkit`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

import stiffkit
from stiffkit import archives, data

app = typer.Typer(
    help="Stiffness: how a gradient step on one example changes the loss of another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: fetch them ahead of time, list and verify them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


_MENDABLE = (ValueError, OSError, ImportError)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn the errors that a user can mend into one message on standard error and exit code 1."""
    try:
        yield
    except _MENDABLE as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stiffkit {stiffkit.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Stiffness: how a gradient step on one example changes the loss of another."""


@data_app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help=f"Any of: {', '.join(data.NAMES)}.")],
) -> None:
    """Download data sets into the data folder, as one NAME.npz each, which can be copied to other machines."""
    with errors_as_messages():
        for name in names:
            path = archives.location(name)
            typer.echo(f"{name}: embedded, nothing to fetch" if path is None else f"{name}: {archives.fetch(name)}")


@data_app.command("list")
def list_data() -> None:
    """List the data sets, and which of them are here."""
    typer.echo(f"data folder: {archives.data_folder()}")
    width = max(map(len, data.NAMES))
    for name in data.NAMES:
        typer.echo(f"{name:{width}}  {_state(name)}")


@data_app.command("verify")
def verify_data(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]", help="Default: all that are here.")] = None,
) -> None:
    """Check that data sets are the official ones; exit code 1 where one is not."""
    failed = False
    for name in names or filter(_is_here, data.NAMES):
        try:
            typer.echo(f"{name}: official data, SHA-256 {archives.verify(name)}")
        except _MENDABLE as error:
            typer.echo(f"Error: {error}", err=True)
            failed = True
    if failed:
        raise typer.Exit(1)


def _is_here(name: str) -> bool:
    path = archives.location(name)
    return path is None or path.exists()


def _state(name: str) -> str:
    path = archives.location(name)
    if path is None:
        return "embedded"
    return f"{path.stat().st_size / 2**20:.1f} MiB" if path.exists() else f"not here: stiffkit data fetch {name}"


if __name__ == "__main__":
    app(prog_name="stiffkit")
