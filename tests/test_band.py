"""A guard on the numbers: a run on digits, trained anew, stays in the band of 20 recorded runs with other seeds.

nbval compares recorded results alone; this notices a new torch, or a change here, that trains or measures differently.
The band is `book/results/digits_band.nc`; where training is meant to change, `stiffkit run digits` and
`stiffkit results pack digits_band` make a new one, with the fields that `stiffkit results list` shows.
"""

import pytest
import xarray as xr

from stiffkit import results
from stiffkit.experiment import Experiment, compute

SEEDS = range(1, 21)
WIDTH = 4.5  # standard deviations; of 20 runs none can be further than 4.25 from their mean
FIELDS = {
    "dataset": "digits",
    "model": "fc",
    "epochs": 6,
    "points": 100,
    "arithmetics": ("exact",),
    "checkpoints": (0, 1201, 2402, 3603, 4804, 6005, 7206),
}


def curves(run):
    """The curves of a run, one a name, by number of checkpoint."""
    kept = run.isel(arithmetic=0)[["loss", "accuracy", "within", "between", "gradient_norm", "disparity", "gap"]]
    flat = {}
    for name, values in kept.data_vars.items():
        others = [d for d in values.dims if d not in ("images", "seed")]
        stacked = values.stack(curve=others) if others else values.expand_dims("curve", -1)
        for k in range(stacked.sizes["curve"]):
            flat[f"{name} {k}"] = stacked.isel(curve=k).drop_vars(["curve", *others], errors="ignore")
    return xr.Dataset(flat).drop_vars("images")


@pytest.fixture(scope="module")
def band():
    runs = [results.find(Experiment.of(**FIELDS, seed=seed)) for seed in SEEDS]
    assert all(run is not None for run in runs), "the band's runs are not recorded for this version of the code"
    together = curves(results.side_by_side(runs))
    return together.mean("seed"), together.std("seed", ddof=1)


def outside(run, band):
    """Where a run leaves the band: {curve: how many standard deviations}."""
    mean, spread = band
    away = abs(curves(run) - mean) / (spread + 1e-3)
    far = {name: float(values.max()) for name, values in away.data_vars.items()}
    return {name: value for name, value in far.items() if value > WIDTH}


def test_a_run_trained_now_stays_in_the_band(band):
    assert not outside(compute([Experiment.of(**FIELDS, seed=21)], progress=False)[0], band)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"initialisation": "torch"}, {"batch_size": 64}])
def test_a_run_trained_otherwise_leaves_it(band, change):
    assert outside(compute([Experiment.of(**FIELDS, **change, seed=21)], progress=False)[0], band)
