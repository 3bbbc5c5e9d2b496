"""The command line: `stiffkit`, or `python -m stiffkit`."""

import json
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import xarray as xr

import stiffkit
from stiffkit import archives, claims, data, results, stopped
from stiffkit.checked_file import SET_ASIDE
from stiffkit.experiment import Experiment, Measurement, Training
from stiffkit.models import MODELS
from stiffkit.sweeps import Sweep, numbers

app = typer.Typer(
    help="Stiffness: how a gradient step on one example changes the loss of another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: fetch them ahead of time, list and verify them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
results_app = typer.Typer(
    help="Results: recorded ones behind the book, cached ones of your runs.", no_args_is_help=True
)
app.add_typer(results_app, name="results")

GIVEN = ("dataset", "model", "epochs", "seed")
OTHERS = [name for name in (*Training.model_fields, *Measurement.model_fields) if name not in GIVEN]


Device = Annotated[str, typer.Option(envvar="STIFFKIT_DEVICE", metavar="cpu|cuda", help="Where runs are computed.")]

_MENDABLE = (ValueError, OSError, ImportError)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn the errors that a user can mend into one message on standard error and exit code 1."""
    try:
        yield
    except _MENDABLE as error:
        typer.echo("\n".join([f"Error: {error}", *_notes(error)]), err=True)
        raise typer.Exit(1) from None


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


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


@app.command("run")
def run_experiments(
    dataset: Annotated[str, typer.Argument(help=f"Any of: {', '.join(data.NAMES)}.")],
    model: Annotated[str, typer.Argument(help=f"Any of: {', '.join(MODELS)}.")],
    epochs: Annotated[float, typer.Option(help="Passes over the training set.")],
    seeds: Annotated[str, typer.Option(help="One, or several: 1-8, or 1,3,5.")] = "1",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="FIELD=VALUE", help=f"Other fields: {', '.join(OTHERS)}. May be repeated."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Train, measure at checkpoints, and keep the results in the cache; what is there already is not computed again.

    Ctrl-C keeps the runs that are finished.
    """
    with errors_as_messages():
        fields = dict(_assignment(text) for text in set_ or [])
        try:
            chosen = numbers(seeds)
        except ValueError as error:
            raise ValueError(f"--seeds {error}") from None
        same = {"dataset": dataset, "model": model, "epochs": epochs}
        experiments = [Experiment.of(**same, **fields, seed=seed) for seed in chosen]
        missing = [e for e in experiments if not results.source(e)]
        if missing:
            minutes = sum(e.minutes for e in missing)
            typer.echo(f"{len(missing)} to compute, about {minutes:.1f} minutes in one thread", err=True)
        for k, experiment in enumerate(experiments):
            try:
                found = experiment.run(device=device)
            except KeyboardInterrupt:
                typer.echo(
                    f"Stopped. {k} of {len(experiments)} are kept; the same command goes on from there.", err=True
                )
                raise typer.Exit(130) from None
            typer.echo(f"{experiment.key}: {found.source}")


@app.command("sweep")
def run_sweep(
    file: Annotated[Path, typer.Argument(help="YAML: `experiment` (fields in common) and `axes` (lists of values).")],
    processes: Annotated[
        int | None, typer.Option(min=1, help="On this machine; left out, one a core, and one on a GPU.")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Of a Dask cluster that computes, such as tcp://host:8786.")
    ] = "",
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is there and what is missing, and stop.")
    ] = False,
) -> None:
    """Compute what is missing of a sweep; the same command goes on after whatever stopped it.

    Exit code 1 where a run failed, 130 after Ctrl-C.
    """
    with errors_as_messages():
        chosen = Sweep.read(file)
        missing = chosen.missing
        if missing and not dry_run:
            minutes = sum(e.minutes for e in missing)
            typer.echo(f"{len(missing)} to compute, about {minutes:.0f} minutes in one thread", err=True)
            try:
                with _cluster(scheduler) as executor:
                    chosen = chosen.run(executor, processes=processes, device=device)
            except KeyboardInterrupt:
                typer.echo(f"{chosen.report}\nStopped; the same command goes on from there.")
                raise typer.Exit(130) from None
        typer.echo(chosen.report)
        if chosen.failed:
            raise typer.Exit(1)


@contextmanager
def _cluster(address: str) -> Iterator[Executor | None]:
    """An executor of the Dask cluster at an address; none for none."""
    if not address:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--scheduler needs Dask: pip install 'stiffkit[dask]'") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise OSError(f"no Dask scheduler answers at {address}: {error}") from None
    with client:
        yield client.get_executor()


class _WithPairs(typer.core.TyperCommand):
    """A command with an option `-p NAME VALUE`, which Typer knows with one value alone."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Join the two words after each `-p`."""
        joined, words = [], iter(args)
        for word in words:
            joined.append(word)
            if word == "-p":
                name, value = next(words, ""), next(words, None)
                if not name.isidentifier() or value in (None, "-p", "-f", "-o"):
                    raise typer.BadParameter("a name and a value are wanted, such as -p epochs 3", ctx, param_hint="-p")
                joined.append(f"{name}={value}")
        return super().parse_args(ctx, joined)


@app.command("chapter", cls=_WithPairs)
def rerun_chapter(
    name: Annotated[
        str, typer.Argument(help="Its number or name, such as 2 or class_matrices; none: all are listed.")
    ] = "",
    p: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; goes before those of -f.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", metavar="FILE.yml", help="Parameters; go before those of a profile.")
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="quick|NAME", help="Parameters that come with the book: a quick look, or a data set.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("-o", metavar="FILE", help="A notebook, out.ipynb, or a page, out.html.")
    ] = None,
) -> None:
    """Run a chapter with other parameters; without -o, list its parameters and what they would cost.

    Wrong parameters are refused before anything is computed. Exit code 1 where a cell failed: the notebook is kept as
    far as it came.
    """
    from stiffkit import rerun

    with errors_as_messages():
        if not name and (p or file or profile or out):
            raise ValueError("a chapter is wanted, by number or name; without any option they are listed")
        if not name:
            typer.echo("\n".join(f"{c.number}  {c.name}" for c in rerun.chapters()))
            return
        chapter = rerun.find(name)
        values = rerun.given(chapter, profile, file, [tuple(pair.split("=", 1)) for pair in p or []])
        minutes = chapter.check(values).minutes
        cost = f"about {max(minutes, 0.1):.1f} minutes to compute" if minutes else "nothing to compute"
        if out is None:
            typer.echo(rerun.described(chapter, values))
            typer.echo(f"profiles: {', '.join(rerun.profiles(chapter))}")
            typer.echo(f"{cost}; to run it, add -o out.html or -o out.ipynb")
            return
        if minutes:
            typer.echo(cost, err=True)
        try:
            typer.echo(f"{rerun.rerun(chapter, values, out)} written")
        except KeyboardInterrupt as error:
            typer.echo("\n".join(["Stopped; runs that were begun go on from there.", *_notes(error)]), err=True)
            raise typer.Exit(130) from None


@results_app.command("list")
def list_results() -> None:
    """List all runs, recorded and cached, and files that were set aside."""
    typer.echo(f"recorded in {results.book() / 'results'}, cached in {results.cache()}")
    for path in _result_files():
        with _naming_the_damaged():
            for identity, run in results.described(path).items():
                state = "" if results.is_current(run) else ", of another version of the code: not used"
                key = Experiment.model_validate_json(identity).key if identity else path.stem
                typer.echo(f"{key}  {_place(path)}, {run['seconds']:.0f} s{state}")
    for path in sorted(results.cache().glob("*.stopped")):
        with _naming_the_damaged():
            run = stopped.load(path)
            typer.echo(f"{path.stem}  stopped after {run.training['images']:,} images, {run.seconds:.0f} s")
    for path in sorted(results.cache().glob(f"*{SET_ASIDE}*")):
        typer.echo(f"{path.name}  set aside: damaged, or not what its name says")


@results_app.command("show")
def show_results(key: Annotated[str, typer.Argument(help="A run's key, as `results list` prints it.")]) -> None:
    """Show one run: what was trained and measured, with what, and what came out at its end."""
    with errors_as_messages():
        for path in _result_files():
            with _naming_the_damaged():
                for run in results.runs(path):
                    if Experiment.model_validate_json(run.attrs["experiment"]).key == key:
                        typer.echo(_shown(run, path))
                        return
        raise ValueError(f"there is no run {key!r}: stiffkit results list shows the keys")


@results_app.command("verify")
def verify_results() -> None:
    """Check every file of results against its checksum; exit code 1 where one is damaged. Nothing is changed."""
    failed = False
    for path in _result_files():
        try:
            typer.echo(f"{_place(path)}: whole, {len(results.described(path))} run(s)")
        except results.ResultsError as error:
            typer.echo(f"Error: {error}", err=True)
            failed = True
    if failed:
        raise typer.Exit(1)


@results_app.command("clean")
def clean_results(
    everything: Annotated[bool, typer.Option("--all", help="Remove the good ones too.")] = False,
) -> None:
    """Remove from the cache what cannot be used: files set aside, left over, or made by other versions of the code."""
    removed = 0
    for path in sorted(results.cache().glob("*")):
        if everything or not _is_useful(path):
            with errors_as_messages():
                path.unlink()
            typer.echo(f"removed {path.name}")
            removed += 1
    typer.echo(f"{removed} file(s) removed from {results.cache()}; recorded results are not touched")


@results_app.command("pack")
def pack_results(
    name: Annotated[str, typer.Argument(help="Of the recorded file, such as 02_class_matrices.")],
    patterns: Annotated[list[str], typer.Argument(metavar="KEY", help='Keys or patterns, such as "mnist-fc-30ep-*".')],
) -> None:
    """Turn cached runs into one recorded file, book/results/NAME.nc; runs that it has already stay in it."""
    with errors_as_messages():
        path = results.pack(name, patterns)
        typer.echo(f"{path}: {len(results.described(path))} run(s), {path.stat().st_size / 2**20:.2f} MiB")


@app.command("claims")
def show_claims(
    chapter: Annotated[int, typer.Option(help="Only those of one chapter.")] = 0,
) -> None:
    """Judge every claim from the recorded runs: estimate, 95 % interval over seeds, verdict."""
    with errors_as_messages():
        ledger = claims.read()
        judgements = claims.judge_all(ledger)
        for j in judgements:
            if chapter in (0, j.claim.chapter):
                exploratory = ", exploratory" if j.claim.exploratory else ""
                typer.echo(
                    f"{j.claim.id}: {j.verdict}{exploratory}\n  {j.claim.title} (criterion: {j.claim.criterion})"
                )
                typer.echo(f"  {claims.found(j, ledger)}")
        typer.echo("\n" + claims.answer(ledger, judgements))


@contextmanager
def _naming_the_damaged() -> Iterator[None]:
    """Say which file is damaged, and go on to the next."""
    try:
        yield
    except results.ResultsError as error:
        typer.echo(f"Error: {error}", err=True)


def _result_files() -> list[Path]:
    return [*results.recorded(), *sorted(results.cache().glob("*.nc"))]


def _place(path: Path) -> str:
    return f"cached, {path.name}" if path.is_relative_to(results.cache()) else f"recorded, {path.name}"


def _is_useful(path: Path) -> bool:
    """Whether a file in the cache is a run that can be used or go on, or the lock of one that is being computed."""
    if path.name == "id" or path.suffix == ".lock":
        return path.name == "id" or results.is_reserved(path.stem)
    try:
        if path.suffix == ".stopped":
            return results.is_current(stopped.load(path).made_with)
        return path.suffix == ".nc" and not results.stale(path)
    except results.ResultsError:
        return False


def _shown(run: xr.Dataset, path: Path) -> str:
    from stiffkit.chapters import rounded

    last = run.isel(images=-1)
    facts = {k: v for k, v in run.attrs.items() if k not in ("experiment", "classes")}
    summary = {
        f"{name}, {regime}, {measure}": rounded(last[name].sel(regime=regime, measure=measure, arithmetic="exact"), 3)
        for name in ("within", "between")
        for regime in run.regime.values
        for measure in run.measure.values
    }
    accuracy = {f"{s} accuracy": rounded(100 * last.accuracy.sel(split=s), 1) + " %" for s in run.split.values}
    lines = [f"{_place(path)}", run.attrs["experiment"], *(f"{k}: {v}" for k, v in facts.items())]
    lines.append(f"at the end, {int(last.images):,} images seen, exact:")
    return "\n".join([*lines, *(f"  {k}: {v}" for k, v in (summary | accuracy).items())])


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r}: FIELD=VALUE is wanted, such as learning_rate=1e-4")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


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
