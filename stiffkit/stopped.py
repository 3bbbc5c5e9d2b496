"""Runs that were stopped: what they need to go on from their last checkpoint."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xarray as xr

from stiffkit import checked_file, results


@dataclass
class Stopped:
    """A run at its last checkpoint.

    Attributes:
        made_with: what has to be the same for the run to go on: versions, data, device.
        measured: for each experiment, by its `identity`, what was measured at each checkpoint so far, as JSON: long
            lists of numbers would have to be pickled one by one, again at each checkpoint.
        training: the `state` of the checkpoint: images seen, weights, optimiser. The place in the order of the images
            follows from the seed and the images seen.
        seconds: that the run took so far.
        seconds_measuring: of them, for measuring.

    """

    made_with: dict[str, Any]
    measured: dict[str, list[str]]
    training: dict[str, Any] | None = None
    seconds: float = 0.0
    seconds_measuring: float = 0.0

    def add(self, identity: str, found: xr.Dataset) -> None:
        """Add what an experiment measured at a checkpoint; its numbers stay float64."""
        self.measured[identity].append(json.dumps(found.to_dict(data="list")))

    def rows(self, identity: str) -> list[xr.Dataset]:
        """What an experiment measured at each checkpoint."""
        return [xr.Dataset.from_dict(json.loads(row)) for row in self.measured[identity]]


def path(key: str) -> Path:
    """Where the run of a training is kept until it is finished, by the training's key."""
    return results.cache() / f"{key}.stopped"


def save(key: str, run: Stopped) -> None:
    """Replace what was kept of a run; the first line of the file is the number of images seen."""
    content = io.BytesIO()
    torch.save(vars(run), content)
    images = run.training["images"] if run.training else 0
    checked_file.write(path(key), b"%d\n" % images + content.getvalue())


def images_seen(key: str) -> int:
    """How many images a run had seen at its last checkpoint, for a look that costs nothing; 0 where none is kept."""
    try:
        with path(key).open("rb") as file:
            return int(file.readline(20))
    except (OSError, ValueError):
        return 0


def load(place: Path) -> Stopped:
    """Read what was kept of a run; nothing in it is executed.

    Raises:
        ResultsError: the file is damaged, or holds something else.

    """
    content = io.BytesIO(checked_file.read(place).partition(b"\n")[2])
    try:
        run = Stopped(**torch.load(content, weights_only=True, map_location="cpu"))
        if not all(isinstance(row, str) for rows in run.measured.values() for row in rows):
            raise TypeError("rows were kept in another form once")
        return run
    except (UnpicklingError, TypeError, RuntimeError):  # torch's own message advises to trust the file
        raise checked_file.ResultsError(f"{place} does not hold a run that was stopped") from None


def find(key: str, identities: Iterable[str], made_with: dict[str, Any]) -> Stopped:
    """The run of these experiments where it stopped, or a new one; a damaged file is named and set aside."""
    new = Stopped(made_with, {identity: [] for identity in identities})
    if path(key).exists():
        with checked_file.setting_aside(path(key)):
            run = load(path(key))
            if run.made_with == made_with and new.measured.keys() <= run.measured.keys():
                run.measured = {identity: run.measured[identity] for identity in new.measured}
                return run
    return new


def forget(key: str) -> None:
    """Remove what was kept of a run that is finished."""
    path(key).unlink(missing_ok=True)
