"""A guard on the numbers: a run on digits, trained anew, stays in the band of 20 recorded runs with other seeds.

nbval compares recorded results alone; this notices a new torch, or a change here, that trains or measures differently.
The band is `book/results/digits_band.nc`; `book/sweeps/00_digits_band.yml` says how to record it anew.
"""

from pathlib import Path

import pytest
import xarray as xr

from stiffkit.experiment import Experiment, compute
from stiffkit.sweeps import Sweep

RECORDED = Sweep.read(Path(__file__).parent.parent / "book/sweeps/00_digits_band.yml")
FIELDS = RECORDED.experiments[0].fields | {"seed": 21}  # a seed that is not among them
WIDTH = 4.5  # standard deviations; of 20 runs none can be further than 4.25 from their mean


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
    assert not RECORDED.missing, "the band's runs are not recorded for this version of the code"
    together = curves(RECORDED.runs)
    return together.mean("seed"), together.std("seed", ddof=1)


def outside(run, band):
    """Where a run leaves the band: {curve: how many standard deviations}."""
    mean, spread = band
    away = abs(curves(run) - mean) / (spread + 1e-3)
    far = {name: float(values.max()) for name, values in away.data_vars.items()}
    return {name: value for name, value in far.items() if value > WIDTH}


def test_a_run_trained_now_stays_in_the_band(band):
    assert not outside(compute([Experiment.of(**FIELDS)], progress=False)[0], band)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"initialisation": "torch"}, {"batch_size": 64}])
def test_a_run_trained_otherwise_leaves_it(band, change):
    assert outside(compute([Experiment.of(**(FIELDS | change))], progress=False)[0], band)
