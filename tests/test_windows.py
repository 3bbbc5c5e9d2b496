"""Averages over checkpoints: held to loops over made-up runs whose loss is known."""

import numpy as np
import pytest
import xarray as xr

from stiffkit.windows import WINDOW, at, images_at, places, together

IMAGES = [0, *sorted({round(1_500 * (26 / 25) ** k) for k in range(130)})]
RATES = (1e-4, 1e-3)


def made_up(values=None, images=IMAGES):
    """Runs of two rates and two seeds, their loss a falling power, so that it is a line in logarithms."""
    seen = xr.DataArray(np.array(images, float), {"images": images}, "images")
    scale = xr.DataArray([[1.0, 10.0], [1.2, 12.0]], {"seed": [1, 2], "learning_rate": list(RATES)})
    loss = 2.3 / (1 + scale * seen / 3_000) ** 0.7
    runs = xr.Dataset({"loss": loss.expand_dims(split=["train"]), "epochs": seen / 60_000})
    return runs.assign(values=loss**2 if values is None else values(seen))


def one(runs, seed=1, rate=1e-3):
    """What a loop needs of one run."""
    own = runs.sel(seed=seed, learning_rate=rate)
    return own.loss.sel(split="train").values, own["values"].values


def means(values, k):
    half = WINDOW // 2
    return values[k - half : k + half + 1].mean()


def test_names_of_windows():
    assert places((0.3, 0.1), 5) == ["start", "loss 0.3", "loss 0.1", "epoch 1", "epoch 2", "epoch 4", "end"]
    assert places((), 0.5) == ["start", "end"]
    assert places((), 20)[-2] == "epoch 16"


@pytest.mark.parametrize("level", [0.5, 0.2, 0.11])
@pytest.mark.parametrize("seed", [1, 2])
def test_at_a_loss_both_are_averaged_over_the_same_checkpoints(level, seed):
    runs = made_up()
    loss, values = one(runs, seed)
    middles = range(WINDOW // 2 + 1, len(loss) - WINDOW // 2)
    after = next(k for k in middles if means(loss, k) <= level)
    high, low = (np.log(means(loss, k)) for k in (after - 1, after))
    share = (high - np.log(level)) / (high - low)
    expected = (1 - share) * means(values, after - 1) + share * means(values, after)
    found = at(runs["values"], runs, f"loss {level}")
    assert found.dims == ("seed", "learning_rate")
    assert float(found.sel(seed=seed, learning_rate=1e-3)) == pytest.approx(expected)


def test_the_loss_of_a_window_is_the_one_it_stands_for():
    runs = made_up()
    loss = runs.loss.sel(split="train")
    assert float(at(loss, runs, "loss 0.3").sel(seed=1, learning_rate=1e-3)) == pytest.approx(0.3, rel=1e-4)
    seen = images_at(runs, "loss 0.3").sel(seed=1)
    assert float(seen[0] / seen[1]) == pytest.approx(10, rel=0.01), "ten times the rate is there in a tenth of the time"


def test_a_loss_that_is_not_reached_or_was_passed_before_the_first_window_is_missing():
    runs = made_up()
    assert at(runs["values"], runs, "loss 0.05").isnull().sel(seed=1).values.tolist() == [True, False]
    assert at(runs["values"], runs, "loss 1.2").isnull().sel(seed=1).values.tolist() == [False, True]
    assert at(runs["values"], runs, "loss 1e-9").isnull().all()
    assert images_at(runs, "loss 1e-9").isnull().all()


def test_at_an_epoch_and_at_the_end():
    runs = made_up()
    _, values = one(runs)
    epochs = runs.epochs.values
    middle = min(range(6, len(epochs) - 5), key=lambda k: abs(np.log(epochs[k] / 2)))
    for place, k in (("epoch 2", middle), ("end", len(epochs) - 6)):
        found = float(at(runs["values"], runs, place).sel(seed=1, learning_rate=1e-3))
        assert found == pytest.approx(means(values, k)), place
    assert at(runs["values"], runs, "epoch 4").isnull().all(), "its window would reach over the end"
    assert float(at(runs["values"], runs, "start").sel(seed=1, learning_rate=1e-3)) == values[0]
    assert at(runs["values"].isel(images=slice(1, None)), runs.isel(images=slice(1, None)), "start").isnull().all()


def test_before_training_is_in_no_window():
    runs = made_up(lambda seen: (seen == 0) * 1e6)
    for place in ("loss 1", "epoch 1", "end"):
        assert float(at(runs["values"], runs, place).max()) == 0


def test_a_run_that_ended_early_has_its_own_end():
    runs = made_up()
    short = runs.sel(seed=[2]).isel(images=slice(0, 80))
    both = xr.concat([runs.sel(seed=[1]), short], "seed", join="outer", data_vars="all", coords="minimal")
    both["epochs"] = runs.epochs
    whole, early = (at(both["values"], both, "end").sel(seed=s, learning_rate=1e-3) for s in (1, 2))
    assert float(early) == pytest.approx(means(one(short, 2)[1], 74))
    assert float(whole) == pytest.approx(means(one(runs)[1], len(IMAGES) - 6))


def test_what_was_measured_at_some_checkpoints_alone_is_averaged_over_those():
    runs = made_up()
    some = runs["values"].where(xr.DataArray(np.arange(len(IMAGES)) % 4 == 0, dims="images"))
    kept = [k for k in range(len(IMAGES) - 11, len(IMAGES)) if k % 4 == 0]
    found = float(at(some, runs, "end").sel(seed=1, learning_rate=1e-3))
    assert found == pytest.approx(one(runs)[1][kept].mean())


def test_a_run_shorter_than_a_window_has_a_start_alone():
    runs = made_up(images=IMAGES[:8])
    found = together(runs["values"], runs, ["start", "loss 1", "epoch 1", "end"])
    assert found.sel(at="start").notnull().all()
    assert found.drop_sel(at="start").isnull().all()


def test_windows_side_by_side():
    runs = made_up()
    names = places((0.5, 0.2), 2)
    found = together(runs[["values"]], runs, names)
    assert found["at"].values.tolist() == names
    for name in names:
        xr.testing.assert_equal(found["values"].sel(at=name, drop=True), at(runs["values"], runs, name))
