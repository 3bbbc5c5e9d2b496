"""Sweeps: experiments along axes, each training once, on any engine; what is there is not computed again."""

import os
import platform
import re
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import pandas as pd
import torch
import xarray as xr

from stiffkit import checked_file, results, stopped
from stiffkit.engines import Processes
from stiffkit.experiment import Experiment, Training, chosen_device, run_together

LOOK = 2.0  # seconds between two looks at how far the trainings are
_ONE_RUN = threading.Lock()  # in a process: threads share torch's generator and its number of threads


@dataclass(frozen=True)
class Sweep:
    """Experiments along axes, and what became of them.

    Attributes:
        axes: the values along each axis, by the name of an experiment's field.
        experiments: their product, the last axis changing fastest.
        failed: why a run could not be computed, by its key.

    """

    axes: dict[str, list]
    experiments: tuple[Experiment, ...]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any], axes: Mapping[str, Sequence]) -> Self:
        """The product of axes, with the other fields in common.

        Raises:
            ValueError: an axis without values, or an experiment that is not allowed, naming the field.

        """
        if wrong := [name for name, values in axes.items() if not _is_list(values)]:
            raise ValueError(f"axis {wrong[0]!r} = {axes[wrong[0]]!r}: a list of values is wanted")
        chosen = {name: list(values) for name, values in axes.items()}
        points = [dict(zip(chosen, values, strict=True)) for values in product(*chosen.values())]
        experiments = dict.fromkeys(Experiment.of(**{**fields, **point}) for point in points)
        return cls(chosen, tuple(experiments))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a sweep from a YAML file with the entries `experiment` (fields in common) and `axes` (lists of values).

        Whole numbers may be given as "1-8" or "1,3,5".

        Raises:
            ValueError: naming the file and what is wrong in it.

        """
        import yaml

        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or set(content) != {"experiment", "axes"}:
                raise ValueError("the entries 'experiment' and 'axes' are wanted, and no others")
            if wrong := [name for name in content if not isinstance(content[name], dict)]:
                raise ValueError(f"{wrong[0]!r} must be a mapping of fields")
            axes = {n: numbers(v) if isinstance(v, str) else v for n, v in content["axes"].items()}
            return cls.of(content["experiment"], axes)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def missing(self) -> list[Experiment]:
        """The experiments that have no results."""
        return [e for e in self.experiments if not results.source(e)]

    @property
    def runs(self) -> xr.Dataset:
        """The results that are there, along the axes; NaN where a run is missing or has no such checkpoint."""
        found = [run for e in self.experiments if (run := results.find(e)) is not None]
        return results.side_by_side(found, *self.axes)

    @property
    def table(self) -> pd.DataFrame:
        """Each experiment by its key, with its place along the axes, and its state: done, failed with why, missing."""
        rows = {}
        for experiment in self.experiments:
            place = {name: str(experiment.fields[name]) for name in self.axes}
            rows[experiment.key] = place | {"state": self._state(experiment)}
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def report(self) -> str:
        """The table as text, and how many are done, failed and missing."""
        table = self.table
        states = table.state.str.extract("^(done|failed|missing)")[0].value_counts()
        return f"{table.to_string()}\n" + ", ".join(f"{states.get(s, 0)} {s}" for s in ("done", "failed", "missing"))

    def _state(self, experiment: Experiment) -> str:
        if source := results.source(experiment):
            return f"done ({source})"
        reason = self.failed.get(experiment.key)
        return f"failed: {reason}" if reason else "missing"

    def run(
        self,
        executor: Executor | None = None,
        *,
        processes: int | None = None,
        device: str | None = None,
        progress: bool = True,
    ) -> Self:
        """Compute what is missing; runs that were stopped go on from their last checkpoint.

        Args:
            executor: any of `concurrent.futures`, or Dask's `client.get_executor()`. It stays open. Left out:
                processes of this machine with one thread each.
            processes: how many, where `executor` is left out: one a core; on a GPU one.
            device: "cpu" or "cuda", by default `$STIFFKIT_DEVICE`, or "cpu"; one run at a time on a GPU.
            progress: show a bar on a terminal.

        Returns:
            The sweep, with the runs that failed. An interrupt leaves what is finished, and stops the others at their
            last checkpoints.

        Raises:
            OSError: if the cache folder cannot be written to.

        """
        device = chosen_device(device)
        together: dict = {}
        for experiment in self.missing:
            together.setdefault(experiment.training, []).append(experiment)
        if not together:
            return replace(self, failed={})
        mine = nullcontext(executor) if executor else _own(processes or (None if device == "cpu" else 1))
        failed, folder = {}, _folder()
        with mine as engine, _Progress(together, progress) as bar:
            tasks = {
                engine.submit(_compute, [e.model_dump_json() for e in group], folder, device): training
                for training, group in together.items()
            }
            try:
                waiting = set(tasks)
                while waiting:
                    ended, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
                    for task in ended:
                        if (error := task.exception()) is not None:
                            failed |= {e.key: _reason(error) for e in together[tasks[task]]}
                    bar.show({tasks[task] for task in waiting}, len(failed))
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise
        return replace(self, failed=failed)

    def record(self, name: str, *, leave_out: Collection[str] = ()) -> Path:
        """Compute what is not recorded by the present versions of the code, and put it into `book/results/NAME.nc`.

        Variables to `leave_out` are those that the book does not show.

        Raises:
            RuntimeError: with the table, where a run failed; nothing is put there.

        """
        experiments = tuple(e for e in self.experiments if not results.source(e).startswith("recorded"))
        done = replace(self, experiments=experiments).run()
        if done.failed:
            raise RuntimeError(done.report)
        path = results.book() / "results" / f"{name}.nc"
        return results.pack(name, [e.key for e in experiments], leave_out) if experiments else path


def sweep(
    experiment: Experiment,
    *,
    executor: Executor | None = None,
    processes: int | None = None,
    device: str | None = None,
    progress: bool = True,
    **axes: Sequence,
) -> Sweep:
    """Run an experiment along axes, each a field with its values, as `Sweep.run` says.

    In a script, call it below `if __name__ == "__main__":`, since the processes import the script.

    >>> found = sweep(Experiment.of(dataset="digits", model="fc", epochs=1, seed=1, points=20), seed=[])
    Traceback (most recent call last):
    ValueError: axis 'seed' = []: a list of values is wanted

    """
    chosen = Sweep.of(experiment.fields, axes)
    return chosen.run(executor, processes=processes, device=device, progress=progress)


def numbers(text: str) -> list[int]:
    """Whole numbers from "3", "1-8" or "1,3,5".

    >>> numbers("1-3,7")
    [1, 2, 3, 7]

    """
    found: list[int] = []
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text.replace(" ", "")):
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        found = [n for first, *rest in ranges for n in range(first, (rest or [first])[0] + 1)]
    if not found:
        raise ValueError(f"{text!r}: a number, a range or a list is wanted, such as 3, 1-8 or 1,3,5")
    return found


def _is_list(values: Any) -> bool:
    unordered = (str, Mapping, Set)
    return isinstance(values, Collection) and not isinstance(values, unordered) and len(values) > 0


def _compute(experiments: list[str], folder: dict[str, str], device: str) -> None:
    """Compute, on whatever machine, experiments that have their training in common, into the folder of the sweep."""
    if not (id_ := Path(folder["cache"], "results", "id")).exists() or id_.read_text() != folder["id"]:
        raise FileNotFoundError(
            f"{platform.node()} does not see the sweep's cache folder {folder['cache']}: give STIFFKIT_CACHE a folder "
            "that all machines see under one name"
        )
    os.environ["STIFFKIT_CACHE"] = folder["cache"]
    if folder["data"]:
        os.environ.setdefault("STIFFKIT_DATA", folder["data"])
    from filelock import FileLock

    alone = FileLock(Path(tempfile.gettempdir()) / "stiffkit-gpu.lock") if device != "cpu" else nullcontext()
    with _ONE_RUN, alone:
        torch.set_num_threads(1)
        run_together([Experiment.model_validate_json(e) for e in experiments], device=device, progress=False)


@contextmanager
def _own(processes: int | None) -> Iterator[Executor]:
    engine = Processes(processes)
    try:
        yield engine
    except BaseException:
        engine.shutdown(cancel_futures=True)
        raise
    engine.shutdown()


def _folder() -> dict[str, str]:
    """The folders that a worker needs, and the name by which it knows that it sees the same cache folder."""
    cache = results.cache().absolute()
    if not (cache / "id").exists():
        with results.reserved("id"):  # of two sweeps that begin at once, one gives the name
            if not (cache / "id").exists():
                checked_file.write(cache / "id", uuid4().hex.encode())
    own = (cache / "id").read_text()
    return {"cache": str(cache.parent), "id": own, "data": os.environ.get("STIFFKIT_DATA", "")}


class _Progress:
    """A bar of the images that a sweep's trainings have seen, from what they keep at their checkpoints."""

    def __init__(self, trainings: Iterable[Training], progress: bool) -> None:
        from tqdm import tqdm

        self._images = {t: t.images(t.images_an_epoch)[-1] for t in trainings}
        before = sum(stopped.images_seen(t.key) for t in self._images)
        self._bar = tqdm(
            total=sum(self._images.values()),
            initial=before,
            unit=" images",
            unit_scale=True,
            disable=None if progress else True,  # None: silent where there is no terminal
        )

    def __enter__(self) -> Self:
        self.show(set(self._images), 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, waiting: Set[Training], failed: int) -> None:
        """Show how far the sweep is, with the trainings that are not finished yet."""
        if self._bar.disable:
            return
        ended = self._images.keys() - waiting
        seen = sum(self._images[t] for t in ended) + sum(stopped.images_seen(t.key) for t in waiting)
        self._bar.set_description(f"{len(ended)} of {len(self._images)} trainings, {failed} failed", refresh=False)
        self._bar.update(seen - self._bar.n)


def _reason(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return first[0] if first and isinstance(error, (OSError, ValueError, RuntimeError)) else repr(error)
