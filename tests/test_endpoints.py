"""Quantities that claims are about: made-up runs whose numbers are known."""

import math

import numpy as np
import pytest
import xarray as xr

from stiffkit import endpoints
from stiffkit.endpoints import (
    QUANTITIES,
    arithmetics_apart,
    arithmetics_distance,
    change,
    clipped_misfit,
    clipped_prediction,
    coherence_rise,
    greatest,
    larger_change,
    layer_change,
    least_of_last_layer,
    level,
    onset,
    pair_change,
    ratio,
    regimes_apart,
    slope_change,
    smoothed,
    stopping_excess,
    window,
)
from stiffkit.experiment import Training

ARITHMETICS, REGIMES, MEASURES = ["exact", "keras2019"], ["train-train", "train-val", "val-val"], ["sign", "cos"]


def schedule(n=60_000, epochs=30.0, batch=32):
    """The images seen at the standard checkpoints: each is reached with the first batch that brings it."""
    due = Training(dataset="mnist", model="fc", epochs=epochs, seed=1).images(n)
    return [k // n * n + min(math.ceil(k % n / batch) * batch, n) for k in due]


def made_up(within, between=lambda *_: 0.0, images=None, n=60_000, seeds=(1, 2), **curves):
    """Runs side by side: `within` and `between` are functions of (seed, epochs, arithmetic, regime, measure); a curve
    is one of (seed, epochs).
    """
    images = schedule() if images is None else images
    epochs = [k / n for k in images]
    axes = [list(seeds), epochs, ARITHMETICS, REGIMES, MEASURES]
    labels = dict(zip(("seed", "images", "arithmetic", "regime", "measure"), axes, strict=True)) | {"images": images}

    def table(function, *axes):
        if not axes:
            return function()
        return [table(lambda *rest, value=value: function(value, *rest), *axes[1:]) for value in axes[0]]

    runs = xr.Dataset(
        {
            "within": (tuple(labels), table(within, *axes)),
            "between": (tuple(labels), table(between, *axes)),
            "epochs": (("seed", "images"), [epochs] * len(seeds)),
        },
        labels,
    )
    for name, function in curves.items():
        runs[name] = ("seed", "images"), np.array(table(function, *axes[:2]), dtype=float)
    for name in {"loss", "accuracy"} & set(curves):
        runs[name] = runs[name].expand_dims(split=["train", "validation"]) * xr.DataArray([-1, 1], dims="split")
    return runs


def epoch(seed, epochs, *_):
    return epochs


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("start", [0]),
        ("early", [1_600]),
        ("learning", [60_000 * k / 4 for k in range(4, 14)]),
        ("late", [60_000 * k for k in range(21, 31)]),
    ],
)
@pytest.mark.parametrize("seeds", ["several", "one run without the dimension"])
def test_windows_of_the_standard_schedule(seeds, name, expected):
    runs = made_up(epoch) if seeds == "several" else made_up(epoch).isel(seed=0)
    found = window(runs, name).images.values.tolist()
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, atol=31)


def test_every_window_has_a_name():
    assert set(endpoints.WINDOWS) == {"start", "early", "learning", "late", "last"}
    with pytest.raises(KeyError):
        window(made_up(epoch), "later")


QUARTERS = [1 + k / 4 for k in range(10)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("start", [0]), ("early", [1_600]), ("learning", QUARTERS), ("late", range(7, 13))],
)
@pytest.mark.parametrize("n", [50_000, 1_201])
def test_windows_where_batches_do_not_divide_the_epoch(name, expected, n):
    found = window(made_up(epoch, images=schedule(n, 12), n=n), name)
    found = found.images if name == "early" else found.epochs.isel(seed=0)
    if (n, name) == (1_201, "learning"):
        expected = sorted([*expected, 1_617 / n])  # on digits 1,600 images are more than an epoch
    np.testing.assert_allclose(found, expected, atol=32 if name == "early" else 32 / n)


def test_a_run_of_less_than_an_epoch_is_late_at_its_end():
    found = window(made_up(epoch, images=[0, 1_600, 15_000, 30_000]), "late")
    assert found.images.values.tolist() == [30_000]


def test_before_training_is_never_late():
    assert 0 not in window(made_up(epoch, images=schedule(epochs=8)), "late").images


def test_late_is_ten_epochs_of_a_run_that_ends_within_one():
    assert window(made_up(epoch, images=schedule(epochs=30.5)), "late").epochs[0].values.tolist() == list(range(21, 31))


# --------------------------------------------------------------------------------------------------------------- levels


def tabled(seed, epochs, arithmetic, regime, measure):
    """A value of its own for every seed, arithmetic, regime and measure; linear in time."""
    places = REGIMES.index(regime), ARITHMETICS.index(arithmetic), MEASURES.index(measure)
    return epochs + 100 * seed + 1_000 * places[0] + 10_000 * places[1] + 100_000 * places[2]


def test_level():
    found = level(made_up(tabled), "within", "cos", "val-val", "late")
    assert found.sel(seed=1, arithmetic="exact") == pytest.approx(25.5 + 100 + 2_000 + 100_000)
    assert found.sel(seed=2, arithmetic="keras2019") == pytest.approx(25.5 + 200 + 2_000 + 10_000 + 100_000)
    assert set(found.dims) == {"seed", "arithmetic"}


def test_level_of_the_diagonal():
    found = level(made_up(tabled, epoch), "diagonal", "sign", "train-val", "learning")
    assert found.sel(seed=2, arithmetic="exact") == pytest.approx(200 + 1_000)
    assert level(made_up(tabled, epoch), "between", "sign", "train-val", "learning").values == pytest.approx(
        2.125, rel=1e-3
    )


def test_level_by_true_class():
    runs = made_up(epoch)
    runs = runs.assign(true_within=runs.within + 1, true_between=runs.between - 2)
    for variable, expected in (("true_within", 26.5), ("true_between", -2), ("true_diagonal", 28.5)):
        assert level(runs, variable, "cos", "val-val", "late").values == pytest.approx(expected)


def test_the_greatest_running_mean_at_any_time_and_of_what_was_measured():
    runs = made_up(missing(lambda seed, epochs: epochs % 1 > 0, lambda seed, epochs, *_: -abs(epochs - 12)))
    found = greatest(runs, "within", "sign", "val-val")
    assert found.sel(arithmetic="exact").values == pytest.approx([-0.92] * 2)  # epochs 10, 11, 12, 12.6, 13
    assert found.sel(arithmetic="keras2019").values == pytest.approx([-1.2] * 2)  # 10 to 14


def test_the_rise_of_coherence():
    runs = made_up(epoch, coherence=lambda seed, epochs: 1 + epochs)
    runs["coherence"] = runs.coherence.expand_dims(part=["train", "val"])
    assert coherence_rise(runs, "val").values == pytest.approx([29.0] * 2)


def test_change_and_ratio():
    runs = made_up(lambda seed, epochs, *_: seed * (1 + epochs))
    assert change(runs, "within", "sign", "val-val", "late", "start").sel(arithmetic="exact").values == pytest.approx(
        [25.5, 51]
    )
    assert ratio(runs, "within", "sign", "val-val", "late", "learning").values == pytest.approx(26.5 / 3.125, rel=1e-3)


def missing(where, value=epoch):
    """`value`, but NaN in the clipped arithmetic where asked for."""
    return lambda seed, epochs, arithmetic, *rest: (
        math.nan if arithmetic == "keras2019" and where(seed, epochs) else value(seed, epochs, arithmetic, *rest)
    )


def test_checkpoints_where_an_arithmetic_was_not_measured_are_left_out():
    runs = made_up(missing(lambda seed, epochs: epochs % 2 == 1))
    found = level(runs, "within", "sign", "val-val", "late")
    assert found.sel(arithmetic="exact").values == pytest.approx([25.5] * 2)
    assert found.sel(arithmetic="keras2019").values == pytest.approx([26] * 2)


def test_a_run_that_ended_before_a_window_has_no_level():
    runs = made_up(lambda seed, epochs, *_: math.nan if seed == 2 and epochs > 9 else epochs)
    runs["epochs"] = runs.epochs.where(runs.within.sel(arithmetic="exact", regime="val-val", measure="sign").notnull())
    found = level(runs, "within", "sign", "val-val", "late").sel(arithmetic="exact")
    assert float(found.sel(seed=1)) == pytest.approx(25.5)
    assert math.isnan(found.sel(seed=2))
    assert math.isnan(ratio(runs, "within", "sign", "val-val", "late", "learning").sel(arithmetic="exact", seed=2))


def test_a_run_that_ended_before_a_window_has_its_regimes_not_compared():
    runs = made_up(lambda seed, epochs, *_: math.nan if seed == 2 and epochs > 21 else epochs)
    runs["epochs"] = runs.epochs.where(runs.within.sel(arithmetic="exact", regime="val-val", measure="sign").notnull())
    assert np.isfinite(regimes_apart(runs, "sign", "late").sel(arithmetic="exact")).values.tolist() == [True, False]


def test_arithmetics_apart():
    runs = made_up(lambda seed, epochs, arithmetic, *_: seed * (epochs if arithmetic == "exact" else 1.0))
    found = arithmetics_apart(runs, "within", "sign", "val-val", "late", "keras2019")
    assert found.dims == ("seed",)
    assert found.values == pytest.approx([24.5, 49])


def test_arithmetics_are_compared_at_the_same_checkpoints():
    runs = made_up(missing(lambda seed, epochs: 22 < epochs < 30, lambda seed, epochs, *_: epochs**2))
    assert arithmetics_apart(runs, "within", "sign", "val-val", "late", "keras2019").values == pytest.approx([0, 0])


def test_a_run_that_ended_does_not_move_the_window_of_the_others():
    runs = made_up(
        lambda seed, epochs, arithmetic, *_: (
            math.nan if seed == 2 and epochs > 12 else epochs if arithmetic == "exact" else 0.0
        )
    )
    found = arithmetics_apart(runs, "within", "sign", "val-val", "late", "keras2019").values
    assert math.isnan(found[1])
    assert found[0] == pytest.approx(25.5) or math.isnan(found[0])


def test_regimes_apart():
    heights = {"train-train": 0.5, "train-val": 0.4, "val-val": 0.45}
    depths = {"train-train": -0.1, "train-val": -0.35, "val-val": 0.05}
    runs = made_up(
        lambda seed, epochs, arithmetic, regime, measure: seed * heights[regime],
        lambda seed, epochs, arithmetic, regime, measure: depths[regime] if measure == "sign" else 0.0,
    )
    found = regimes_apart(runs, "sign", "learning")
    assert set(found.dims) == {"seed", "arithmetic"}
    assert found.values == pytest.approx(0.4)
    assert regimes_apart(runs, "cos", "late").sel(arithmetic="exact").values == pytest.approx([0.1, 0.2])


def test_regimes_are_compared_by_their_means():
    """Two regimes that cross within the window, with the same mean, are not apart."""
    runs = made_up(lambda seed, epochs, arithmetic, regime, measure: epochs if regime == "val-val" else 51 - epochs)
    assert regimes_apart(runs, "sign", "late").values == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("slopes", "expected"), [((3, 2), 1), ((-3, 2), 1), ((2, -3), -1), ((0, 0), 0)])
def test_larger_change_is_in_absolute_value(slopes, expected):
    runs = made_up(lambda seed, epochs, arithmetic, regime, measure: slopes[MEASURES.index(measure)] * epochs)
    found = larger_change(runs, "within", "sign", "cos", "val-val", "late", "start")
    assert found.values == pytest.approx(25.5 * expected)


# ------------------------------------------------------------------------------------------------------- turning points


def test_smoothed_by_hand():
    values = xr.DataArray([1.0, 5, 3, 7, 9, 2, *[4.0] * 7], dims="images")
    expected = [math.nan] * 2 + [5, 5.2, 5, 5.2, 4.6, 3.6, 4, 4, 4] + [math.nan] * 2
    assert smoothed(values).values.tolist() == pytest.approx(expected, nan_ok=True)


def test_few_checkpoints_are_far_apart_and_stay_as_they_are():
    values = xr.DataArray(np.random.default_rng(0).normal(size=12), dims="images")
    assert smoothed(values).identical(values)


EVERY = [60_000 * k for k in range(31)]


@pytest.mark.parametrize(("turns", "expected"), [((12, 12), (12, 12)), ((7, 20), (7, 20)), ((3, 27), (3, 27))])
def test_onset_by_loss_and_by_accuracy(turns, expected):
    def distance(seed, epochs):
        return abs(epochs - turns[seed - 1])

    runs = made_up(epoch, images=EVERY, loss=distance, accuracy=lambda *point: -distance(*point))
    for by in ("loss", "accuracy"):
        assert onset(runs, by).values.tolist() == [60_000 * k for k in expected]
    assert onset(runs).equals(onset(runs, "loss"))


@pytest.mark.parametrize("turn", [2, 27])
def test_onset_next_to_an_end(turn):
    runs = made_up(epoch, images=EVERY, loss=lambda seed, epochs: abs(epochs - turn))
    assert onset(runs).values.tolist() == [60_000 * turn] * 2


def test_onset_is_not_a_single_low_value():
    runs = made_up(epoch, images=EVERY, loss=lambda seed, epochs: abs(epochs - 20) - 12 * (epochs == 5))
    assert onset(runs).values.tolist() == [60_000 * 20] * 2


def test_onset_of_losses_that_only_fall_or_rise():
    runs = made_up(epoch, images=EVERY, loss=lambda seed, epochs: epochs * (-1) ** seed)
    assert onset(runs).values.tolist() == pytest.approx(
        [math.nan, 60_000 * 2], nan_ok=True
    )  # never overfits; always does


def bent(before, after, turns):
    """A line that changes its slope at the turn of each seed, and a loss that is least there."""
    return {
        "within": lambda seed, epochs, *_: (
            5.0 + (before if epochs < turns[seed - 1] else after) * (epochs - turns[seed - 1])
        ),
        "loss": lambda seed, epochs: abs(epochs - turns[seed - 1]),
    }


@pytest.mark.parametrize(("before", "after"), [(0.5, -2), (-1, -1), (0, 3)])
def test_slope_change_at_the_onset_of_each_seed(before, after):
    found = slope_change(made_up(images=EVERY, **bent(before, after, (8, 17))), "within", "cos", "train-train")
    assert set(found.dims) == {"seed", "arithmetic"}
    assert found.seed.values.tolist() == [1, 2]
    assert found.values == pytest.approx(after - before)


def test_slopes_are_least_squares_over_three_epochs_on_each_side():
    noise = np.random.default_rng(0).normal(size=31)
    runs = made_up(lambda seed, epochs, *_: noise[int(epochs)], images=EVERY, loss=bent(0, 0, (10, 15))["loss"])
    found = slope_change(runs, "within", "sign", "val-val").sel(arithmetic="exact").values
    for value, turn in zip(found, (10, 15), strict=True):
        after, before = (np.polyfit(range(a, a + 4), noise[a : a + 4], 1)[0] for a in (turn, turn - 3))
        assert value == pytest.approx(after - before)


def test_too_few_checkpoints_on_one_side_have_no_slope():
    found = slope_change(made_up(images=EVERY[::2], **bent(1, 2, (8, 16))), "within", "sign", "val-val")
    assert np.isnan(found).all()


def test_a_run_that_never_overfits_has_no_change_of_slope():
    runs = made_up(epoch, images=EVERY, loss=lambda seed, epochs: 100 - epochs)
    assert np.isnan(slope_change(runs, "within", "sign", "val-val")).all()


def cut_short(runs, seed, images):
    """The runs, one of which diverged: nothing was measured after so many images."""
    return runs.where(~((runs.seed == seed) & (runs.images > images)))


@pytest.mark.parametrize("images", [0, 60_000 * 3])
@pytest.mark.parametrize("quantity", ["slope_change", "stopping_excess"])
def test_turning_points_beside_a_run_that_diverged_early(quantity, images):
    runs = cut_short(made_up(images=EVERY, **bent(0.5, -2, (8, 17))), 2, images)
    arguments = {"slope_change": ("within",), "stopping_excess": ("within", "max")}[quantity]
    found = QUANTITIES[quantity](runs, *arguments, measure="sign", regime="val-val").sel(arithmetic="exact")
    assert found.isnull().values.tolist() == [False, True]


def test_turning_points_beside_a_run_that_diverged_late():
    runs = cut_short(made_up(images=EVERY, **bent(0.5, -2, (8, 17))), 2, 60_000 * 25)
    assert slope_change(runs, "within", "sign", "val-val").values == pytest.approx(-2.5)


def test_stopping_beside_an_arithmetic_that_was_rarely_measured():
    runs = made_up(missing(lambda seed, epochs: epochs % 4, peak((10, 10))), images=EVERY, loss=parabola(10))
    assert stopping_excess(runs, "within", "max", "sign", "val-val").sel(arithmetic="exact").values == pytest.approx(0)


def test_slopes_where_an_arithmetic_was_not_measured_everywhere():
    quarters = [15_000 * k for k in range(121)]
    curves = bent(0.5, -2, (8, 17))
    curves["within"] = missing(lambda seed, epochs: epochs % 0.5, curves["within"])
    found = slope_change(made_up(images=quarters, **curves), "within", "sign", "val-val")
    assert found.sel(arithmetic="exact").values == pytest.approx([-2.5] * 2)
    assert found.sel(arithmetic="keras2019").values == pytest.approx([-2.5] * 2)


# ------------------------------------------------------------------------------------------------------------- stopping


def peak(at, sign=1):
    """A signal that turns at an epoch of each seed."""
    return lambda seed, epochs, *_: -sign * abs(epochs - at[seed - 1])


def parabola(at):
    """A loss whose running mean is 10 at the least, and 10 + d^2 at a distance of d epochs."""
    return lambda seed, epochs: 8 + (epochs - at) ** 2


@pytest.mark.parametrize(("turn", "sign"), [("max", 1), ("min", -1)])
def test_stopping_excess(turn, sign):
    runs = made_up(epoch, peak((10, 16), sign), images=EVERY, loss=parabola(10))
    found = stopping_excess(runs, "between", turn, "sign", "train-train")
    assert found.sel(arithmetic="exact").values == pytest.approx([0, 3.6])
    assert found.sel(arithmetic="keras2019").values == pytest.approx([0, 3.6])


def test_stopping_where_each_arithmetic_turns():
    at = {"exact": 10, "keras2019": 14}
    runs = made_up(
        epoch,
        lambda seed, epochs, arithmetic, *_: -abs(epochs - at[arithmetic]),
        images=EVERY,
        loss=parabola(10),
    )
    found = stopping_excess(runs, "between", "max", "sign", "val-val")
    assert found.sel(arithmetic="exact").values == pytest.approx([0, 0])
    assert found.sel(arithmetic="keras2019").values == pytest.approx([1.6, 1.6])


def test_stopping_by_a_signal_without_regimes():
    runs = made_up(epoch, images=EVERY, loss=parabola(6), disparity=peak((6, 9), -1))
    found = stopping_excess(runs, "disparity", "min")
    assert found.dims == ("seed",)
    assert found.values == pytest.approx([0, 0.9])


def test_a_single_spike_does_not_stop():
    runs = made_up(
        epoch, lambda seed, epochs, *_: -abs(epochs - 20) + 12 * (epochs == 5), images=EVERY, loss=parabola(20)
    )
    assert stopping_excess(runs, "between", "max", "sign", "val-val").values == pytest.approx(0)


def test_an_unknown_turn_is_refused():
    runs = made_up(epoch, peak((10, 16)), images=EVERY, loss=lambda seed, epochs: 1 + epochs)
    with pytest.raises((ValueError, KeyError)):
        stopping_excess(runs, "between", "maximum", "sign", "train-train")


# ------------------------------------------------------------------------------------------------------- taken apart


def taken_apart(layers=3):
    """Thirty whole epochs; a layer's value is its number and the epoch, a pair's the number wrong and the epoch."""
    runs = made_up(lambda seed, epochs, arithmetic, *_: 0.8 if arithmetic == "exact" else 0.5, images=EVERY)
    axes = {"regime": REGIMES, "measure": MEASURES}
    epochs = runs.epochs.isel(seed=0, drop=True)
    layer = xr.DataArray([1.0, 2.0, 3.0, 4.0], {"layer": [1, 2, 3, 4]}, "layer")
    wrong = xr.DataArray([0.0, 1.0, 2.0], {"rightness": ["both right", "one wrong", "both wrong"]}, "rightness")
    same = xr.DataArray(np.ones((3, 2)), axes)
    return runs.assign(
        layer_within=((layer + epochs / 100) * same).where(layer.layer <= layers).expand_dims(seed=runs.seed),
        pair_within=((wrong + epochs / 100) * same).expand_dims(seed=runs.seed),
    )


def test_first_and_last_layer():
    runs = taken_apart()
    slower = runs.assign(layer_within=runs.layer_within.where(runs.layer != 3, 3 + runs.epochs / 200))
    for layer, rise in (("first", 0.235), ("last", 0.1175)):  # from epochs 1 to 3 to epochs 21 to 30
        found = layer_change(slower, layer, "sign", "val-val", "late", "learning")
        assert found.values == pytest.approx([rise] * 2)
    assert least_of_last_layer(runs, "sign", "val-val").values == pytest.approx([3.0] * 2)


def test_right_and_wrong_pairs():
    runs = taken_apart()
    falling = runs.assign(pair_within=runs.pair_within.where(runs.rightness != "both wrong", -runs.epochs / 50))
    for rightness, rise in (("both right", 0.235), ("both wrong", -0.47)):
        found = pair_change(falling, rightness, "sign", "val-val", "late", "learning")
        assert found.values == pytest.approx([rise] * 2)


def test_a_distance_has_no_sign():
    runs = taken_apart()
    apart = arithmetics_apart(runs, "within", "sign", "val-val", "late", "keras2019")
    assert apart.values == pytest.approx([0.3] * 2)
    lower = runs.assign(within=-runs.within)
    assert arithmetics_apart(lower, "within", "sign", "val-val", "late", "keras2019").values == pytest.approx(
        [-0.3] * 2
    )
    for found in (runs, lower):
        distance = arithmetics_distance(found, "within", "sign", "val-val", "late", "keras2019")
        assert distance.values == pytest.approx([0.3] * 2)


@pytest.mark.parametrize(("by", "share"), [("class", (0.9 * 0.6 + 0.1 * 0.2) / 2), ("all", 0.5 * 0.4)])
def test_what_clipping_must_give_and_the_largest_distance_from_it(by, share):
    runs = taken_apart()
    parts = {"part": ["train", "val"]}
    left = xr.DataArray([[0.9, 0.1], [0.6, 0.2]], parts | {"class_a": [0, 1]})
    clipped = xr.DataArray([0.0, 1.0], {"arithmetic": ["exact", "keras2019"]}, "arithmetic")
    runs = runs.assign(unclipped=1 - clipped * (1 - left), past_gap=1 - left.mean("class_a"))
    found = clipped_prediction(runs, "train-val", by)
    assert found.values == pytest.approx(np.full(found.shape, 0.8 * share))
    late = xr.where((runs.images == EVERY[20]) & (runs.arithmetic == "keras2019"), 0.7, runs.within)
    assert clipped_misfit(runs.assign(within=late), "train-val", by).values == pytest.approx([0.7 - 0.8 * share] * 2)


def test_every_quantity_that_a_claim_can_name():
    assert set(QUANTITIES) == {
        "level",
        "change",
        "ratio",
        "arithmetics_apart",
        "arithmetics_distance",
        "greatest",
        "coherence_rise",
        "superclass_excess",
        "realm_excess",
        "beyond_inputs",
        "least_of_last_layer",
        "layer_change",
        "pair_change",
        "clipped_misfit",
        "regimes_apart",
        "larger_change",
        "slope_change",
        "stopping_excess",
        "rate_slope",
        "line_at_far",
        "line_slope",
        "decay_change",
        "decay_rate_slope",
        "length_rate_slope",
    }
