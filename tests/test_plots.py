"""The figures, by the data that they show: values, labels, and that nothing else is changed."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex, to_rgba

from stiffkit import plots, rate_plots
from stiffkit.distances import pooled
from stiffkit.endpoints import onset
from stiffkit.statistics import t_interval

STAGES, MEASURES, LAYERS = ["before", "after"], ["sign", "cos"], ["layer 1", "layer 2", "whole"]
EPSILONS = np.logspace(-4, 0, 5)
RANDOM = np.random.default_rng(0)


def array(dims, **coords):
    """Random values in (-1, 1) with these dimensions."""
    shape = [len(coords[dim]) for dim in dims]
    return xr.DataArray(RANDOM.uniform(-1, 1, shape), {dim: coords[dim] for dim in dims}, dims)


CHANGE = array(
    ("toy_stage", "toy_y", "toy_x"), toy_stage=STAGES, toy_y=np.linspace(-1, 1, 5), toy_x=np.linspace(-1, 1, 7)
)
PLACES = xr.DataArray(
    np.arange(35).reshape(5, 7) % 3, {"toy_y": CHANGE.toy_y, "toy_x": CHANGE.toy_x}, ("toy_y", "toy_x")
)
CHECKS = xr.Dataset(
    {
        "relative_error": abs(
            array(("stage", "epsilon", "quantile"), stage=STAGES, epsilon=EPSILONS, quantile=[0.25, 0.5, 0.75])
        ).cumsum("quantile"),
        "agreement": abs(array(("stage", "epsilon"), stage=STAGES, epsilon=EPSILONS)),
        "agreement_adam": abs(array(("stage",), stage=STAGES)),
    }
)
MATRICES = array(
    ("stage", "measure", "class_a", "class_b"), stage=STAGES, measure=MEASURES, class_a=[0, 1, 2], class_b=[0, 1, 2]
)
SETTINGS = ["keras, unit sphere", "keras, no sphere", "torch, unit sphere", "torch, no sphere"]
WITHIN, BETWEEN = (
    array(("setting", "layer", "measure"), setting=SETTINGS, layer=LAYERS, measure=MEASURES) for _ in "ab"
)

IMAGES = [0, 1600, 5000, 20_000, 100_000, 300_000]
REGIMES, ARITHMETICS = ["train-train", "train-val", "val-val"], ["exact", "float32", "keras2019"]
AXES = {"seed": [1, 2, 3], "images": IMAGES, "arithmetic": ARITHMETICS, "regime": REGIMES, "measure": MEASURES}
RUNS = xr.Dataset(
    {
        "within": array(tuple(AXES), **AXES),
        "between": array(tuple(AXES), **AXES),
        "wrong_sign": abs(array(tuple(AXES)[:4], **{k: AXES[k] for k in tuple(AXES)[:4]})),
        "past_gap": abs(array(("seed", "images", "part"), seed=[1, 2, 3], images=IMAGES, part=["train", "val"])),
        "loss": abs(array(("seed", "images", "split"), seed=[1, 2, 3], images=IMAGES, split=["train", "validation"])),
        "accuracy": abs(
            array(("seed", "images", "split"), seed=[1, 2, 3], images=IMAGES, split=["train", "validation"])
        ),
    }
)
SPARSE = RUNS.assign(within=RUNS.within.where((RUNS.arithmetic == "exact") | (RUNS.images > 10_000)))

TAKEN = RUNS.assign(
    layer_within=array(("seed", "images", "layer", "regime", "measure"), layer=[1, 2, 3], **AXES),
    pair_within=array(
        ("seed", "images", "rightness", "regime", "measure"),
        rightness=["both right", "one wrong", "both wrong"],
        **AXES,
    ),
)
DOSE = xr.Dataset(
    {
        "within": array(("seed", "images", "arithmetic"), **AXES | {"arithmetic": ["float32", "keras2019"]}),
        "between": array(("seed", "images", "arithmetic"), **AXES | {"arithmetic": ["float32", "keras2019"]}),
        "past": 100 * RUNS.past_gap.sel(part="train", drop=True),
        "predicted": array(("seed", "images"), **AXES),
    }
)
LATE = {
    "fused float32": RUNS[["within", "between"]].isel(images=-1, regime=0, measure=0, drop=True),
    "squared error": xr.Dataset(
        {
            kind: array(("seed", "arithmetic"), seed=[1, 2], arithmetic=["exact", "own"])
            for kind in ("within", "between")
        }
    ),
}

GROUPED = array(
    ("stage", "class_a", "class_b"), stage=STAGES, class_a=list("abcde"), class_b=list("abcde")
).assign_coords(superclass=("class_a", ["one_group"] * 2 + ["two"] * 3))
TESTS = {
    stage: xr.Dataset(
        {
            "observed": 0.1,
            "effect": 2.5,
            "p": 0.01,
            "p_below": 1.0,
            "p_two_sided": 0.02,
            "null": ("permutation", RANDOM.normal(size=50)),
        }
    )
    for stage in STAGES
}
RELATED = RUNS.assign(related=RUNS.within / 2, unrelated=RUNS.between)

RATES = {"at": ["loss 0.3", "loss 0.1"], "learning_rate": [1e-5, 1e-4, 1e-3], "seed": [1, 2, 3]}
AT_RATES = array(tuple(RATES), **RATES).where(lambda a: (a["at"] == "loss 0.3") | (a.learning_rate > 1e-5))
AT_LOSSES = array(("loss", "learning_rate", "seed"), loss=[1.0, 0.5, 0.1], **RATES)
ESTIMATES = xr.Dataset({k: array(("row", "measure"), row=list("abcdef"), measure=["cos", "sign"]) for k in ("mean",)})
ESTIMATES = ESTIMATES.assign(low=ESTIMATES["mean"] - 0.1, high=ESTIMATES["mean"] + 0.2)
GAPS = array((*RATES, "quantile"), quantile=[0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], **RATES)
DISTANCES = np.linspace(0.05, 1.95, 20)
FALLING = xr.DataArray(
    [[1 - DISTANCES, 0.5 - DISTANCES]] * 2,
    {"space": ["input", "layer 1"], "pairs": ["same class", "different classes"], "distance": DISTANCES},
    ("space", "pairs", "distance"),
)
CURVES = pooled(xr.Dataset({"stiffness": FALLING, "count": xr.full_like(FALLING, 100)}), 20)
SECTIONS = xr.Dataset(
    {
        kind: array(("section", "epochs"), section=["embeddings", "head", "whole"], epochs=[0.0, 0.5, 1.0, 2.0])
        for kind in ("within", "between")
    }
)
OF_LAYERS = array(
    ("layer", "measure", "pairs", "distance"),
    layer=[*LAYERS],
    measure=MEASURES,
    pairs=["same class", "different classes", "all"],
    distance=DISTANCES,
).to_dataset(name="stiffness")
LENGTHS = xr.Dataset(
    {
        name: abs(array(("at", "space", "learning_rate"), space=["input", "layer 1", "output"], **RATES))
        for name in ("value", "low", "high", "alone")
    }
)
LENGTHS["censored"] = xr.where(0 * LENGTHS.value + LENGTHS.learning_rate > 1e-4, "above", "")
THROUGH = {
    title: LENGTHS.isel(space=k, drop=True).assign_coords(at=[1.0, 2.0]).rename(at="epochs")
    for k, title in enumerate(("line", "half"))
}

DATA = (
    CHANGE,
    PLACES,
    CHECKS,
    MATRICES,
    WITHIN,
    BETWEEN,
    RUNS,
    AT_RATES,
    AT_LOSSES,
    ESTIMATES,
    GAPS,
    CURVES,
    LENGTHS,
    OF_LAYERS,
    SECTIONS,
)

CALLS = {
    "evolution": lambda **options: plots.evolution(RUNS, **options),
    "arithmetics": lambda **options: plots.arithmetics(RUNS, **options),
    "overview": lambda **options: plots.overview({"MNIST": RUNS, "CIFAR-10": SPARSE}, **options),
    "beside": lambda **options: plots.beside({"random labels": RUNS, "true labels": SPARSE}, **options),
    "curves": lambda **options: plots.curves(
        {"one": {"a": RUNS.past_gap.sel(part="train")}, "two": {"b": RUNS.past_gap.sel(part="val")}}, RUNS, **options
    ),
    "by_section": lambda **options: plots.by_section(SECTIONS, **options),
    "doses": lambda **options: plots.doses({"MNIST": DOSE, "CIFAR-10": DOSE.isel(images=slice(3))}, **options),
    "trained_and_measured": lambda **options: plots.trained_and_measured(LATE, **options),
    "taken_apart": lambda **options: plots.taken_apart({"a": TAKEN, "b": TAKEN.isel(layer=slice(2))}, **options),
    "grouped_matrices": lambda **options: plots.grouped_matrices(GROUPED, **options),
    "superclass_blocks": lambda **options: plots.superclass_blocks(GROUPED.isel(stage=-1), **options),
    "grouping_histograms": lambda **options: plots.grouping_histograms(TESTS, **options),
    "related": lambda **options: plots.related({"CNN": RELATED, "ResNet20": RELATED.isel(seed=[0])}, **options),
    "against_rate": lambda **options: rate_plots.against_rate(
        {"cosine": {"equal loss": AT_RATES, "equal epoch": AT_RATES}}, **options
    ),
    "against_loss": lambda **options: rate_plots.against_loss(
        {"cosine": AT_LOSSES, "sign": AT_LOSSES}, [0.3], **options
    ),
    "forest": lambda **options: rate_plots.forest(ESTIMATES, "change", **options),
    "quantiles_at_loss": lambda **options: rate_plots.quantiles_at_loss(GAPS, **options),
    "by_distance": lambda **options: rate_plots.by_distance(CURVES, "sign", **options),
    "by_gradient_layer": lambda **options: rate_plots.by_gradient_layer(OF_LAYERS, **options),
    "lengths_through_training": lambda **options: rate_plots.lengths_through_training(THROUGH, **options),
    "lengths_against_rate": lambda **options: rate_plots.lengths_against_rate(
        LENGTHS, {"input": [0.3, 0.3, 0.1]}, **options
    ),
    "step_map": lambda **options: plots.step_map(CHANGE, PLACES, (0.3, -0.2), **options),
    "step_checks": lambda **options: plots.step_checks(CHECKS, 1e-3, **options),
    "class_matrices": lambda **options: plots.class_matrices(MATRICES, "stage", "measure", **options),
    "by_layer": lambda **options: plots.by_layer(WITHIN, BETWEEN, **options),
}
PANELS = {
    "evolution": (3, 2),
    "arithmetics": (2, 2),
    "overview": (1, 2),
    "beside": (2, 3),
    "curves": (1, 2),
    "by_section": (1, 2),
    "doses": (2, 2),
    "grouped_matrices": (1, 2),
    "superclass_blocks": (1, 2),
    "grouping_histograms": (1, 2),
    "related": (1, 2),
    "trained_and_measured": (1, 2),
    "taken_apart": (2, 2),
    "against_rate": (1, 2),
    "against_loss": (1, 2),
    "forest": (1, 2),
    "quantiles_at_loss": (1, 2),
    "by_distance": (2, 2),
    "by_gradient_layer": (2, 2),
    "lengths_through_training": (1, 2),
    "lengths_against_rate": (1, 3),
    "step_map": (1, 2),
    "step_checks": (1, 2),
    "class_matrices": (2, 2),
    "by_layer": (2, 2),
}
every_plot = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def _closed():
    plt.close("all")
    yield
    plt.close("all")


def axes_for(name):
    """Axes of one's own: in a line where the function takes a line, else (rows, columns)."""
    rows, columns = PANELS[name]
    return np.squeeze(plt.subplots(rows, columns, squeeze=False)[1], axis=0 if rows == 1 else ())


def lines(ax):
    """{label: (x, y)} of all that is plotted with a label, and the rest under numbers."""
    named = [(line.get_label(), line.get_data()) for line in ax.get_lines()]
    return {k if str(label).startswith("_") else label: data for k, (label, data) in enumerate(named)}


def visible_texts(figure):
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_visible()]


# All of them


def test_every_figure_is_tested():
    modules = (plots, rate_plots)
    public = {name for m in modules for name, v in vars(m).items() if callable(v) and v.__module__ == m.__name__}
    assert {name for name in public if not name.startswith("_")} == set(CALLS)


@every_plot
def test_axes_are_returned_of_one_new_figure_that_can_be_drawn(name):
    axes = CALLS[name]()
    assert isinstance(axes, np.ndarray)
    assert all(isinstance(ax, plt.Axes) for ax in axes.flat)
    (number,) = plt.get_fignums()
    assert {ax.figure for ax in axes.flat} == {plt.figure(number)}
    plt.figure(number).canvas.draw()


@every_plot
def test_axes_that_are_given_are_used_and_returned(name):
    given = axes_for(name)
    returned = CALLS[name](axes=given)
    assert list(returned.flat) == list(given.flat)
    assert len(plt.get_fignums()) == 1
    assert all(ax.has_data() for ax in given.flat)


@every_plot
def test_rc_parameters_and_interactive_mode_stay(name):
    mpl.rcParams["font.size"] = 13.5
    before = dict(mpl.rcParams)
    for interactive in (True, False):
        plt.ion() if interactive else plt.ioff()
        CALLS[name]()
        assert plt.isinteractive() == interactive
    changed = {key for key, value in before.items() if mpl.rcParams[key] != value}
    mpl.rcParams["font.size"] = mpl.rcParamsDefault["font.size"]
    assert changed <= {"interactive"}


def test_rc_parameters_stay_after_an_error_too():
    before = dict(mpl.rcParams)
    with pytest.raises(KeyError):
        plots.class_matrices(MATRICES, "no such dimension")
    assert dict(mpl.rcParams) == before


@every_plot
def test_every_panel_is_named(name):
    axes = CALLS[name]()
    assert all(ax.get_title() or ax.get_xlabel() for ax in np.atleast_2d(axes)[0])
    assert [text for text in visible_texts(axes.flat[0].figure) if len(text) > 4]


@every_plot
def test_the_data_are_left_alone(name):
    before = [data.copy(deep=True) for data in DATA]
    CALLS[name]()
    assert all(a.identical(b) for a, b in zip(before, DATA, strict=True))


# The step map


def test_step_map_shows_lowered_losses_in_blue_relative_to_the_largest_change():
    for ax, stage in zip(CALLS["step_map"](), STAGES, strict=True):
        change = CHANGE.sel(toy_stage=stage)
        (mesh,) = [one for one in ax.collections if isinstance(one, mpl.collections.QuadMesh)]
        np.testing.assert_allclose(mesh.get_array().reshape(5, 7), -change / abs(change).max())
        lowered, raised = (mesh.to_rgba([value])[0] for value in (1, -1))
        assert lowered[2] > lowered[0]
        assert raised[0] > raised[2]
        assert mesh.norm(0.3) + mesh.norm(-0.3) == pytest.approx(1)
        assert (ax.get_title(), ax.get_aspect()) == (stage, 1)


def test_step_map_has_x_to_the_right_y_upwards_and_circles_the_point():
    ax = CALLS["step_map"]()[0]
    (mesh,) = [one for one in ax.collections if isinstance(one, mpl.collections.QuadMesh)]
    corners = mesh.get_coordinates()
    assert (corners[-1, -1] > corners[0, 0]).all()
    assert (np.diff(corners[..., 0], axis=1) > 0).all()
    assert ax.get_xlim()[0] < ax.get_xlim()[1]
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    ((x, y),) = [data for data in lines(ax).values() if len(data[0]) == 1]
    assert (x[0], y[0]) == (0.3, -0.2)


def test_step_map_draws_the_borders_of_the_classes():
    halves = PLACES.where(False, (PLACES.toy_x > 0).astype(int))
    ax = plots.step_map(CHANGE, halves, (0, 0))[0]
    (border,) = [one for one in ax.collections if isinstance(one, mpl.contour.ContourSet)]
    vertices = np.concatenate([path.vertices for path in border.get_paths()])
    assert len(vertices)
    assert ((vertices[:, 0] > 0) & (vertices[:, 0] < CHANGE.toy_x[4].item())).all()


def test_step_map_says_what_the_colours_mean():
    texts = visible_texts(CALLS["step_map"]()[0].figure)
    assert {"raised most", "left alone", "lowered most"} <= set(texts)
    assert any("loss" in text for text in texts)


def test_step_map_of_one_stage():
    axes = plots.step_map(CHANGE[:1], PLACES, (0, 0))
    assert [ax.get_title() for ax in axes] == ["before"]


# The step checks


def test_step_checks_shows_median_and_quartiles_of_the_error():
    left, _ = CALLS["step_checks"]()
    for stage in STAGES:
        low, median, high = CHECKS.relative_error.sel(stage=stage).transpose("quantile", "epsilon").values
        np.testing.assert_allclose(lines(left)[stage], [EPSILONS, median])
        band = left.collections[STAGES.index(stage)].get_paths()[0].vertices
        assert {round(float(y), 12) for y in band[:, 1]} == {round(float(y), 12) for y in [*low, *high]}
    np.testing.assert_allclose(lines(left)["proportional to the step"], [EPSILONS, EPSILONS])
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")


def test_step_checks_shows_agreement_in_percent_and_adam_as_stars():
    _, right = CALLS["step_checks"]()
    by_marker = {
        m: [line for line in right.get_lines() if line.get_marker() == m and len(line.get_xdata())] for m in "os*"
    }
    for marker, place in (("o", 0), ("s", 1)):
        (line,) = by_marker[marker]
        np.testing.assert_allclose(line.get_data(), [EPSILONS, 100 * CHECKS.agreement[place]])
        star = by_marker["*"][place]
        np.testing.assert_allclose(np.ravel(star.get_data()), [1e-3, 100 * CHECKS.agreement_adam[place]])
        assert star.get_color() == line.get_color()
    assert right.get_xscale() == "log"


def test_step_checks_uses_one_colour_and_one_marker_a_stage_in_both_panels():
    left, right = CALLS["step_checks"]()
    looks = [
        {(line.get_color(), line.get_marker()) for line in ax.get_lines() if len(line.get_xdata()) == 5}
        for ax in (left, right)
    ]
    assert looks[1] == looks[0] - {(plots.GREY, "None")}
    assert len(looks[1]) == 2
    assert [text.get_text() for text in left.get_legend().get_texts()] == [*STAGES, "proportional to the step"]
    assert {text.get_text() for text in right.get_legend().get_texts()} == {"Adam", "gradient descent"}
    assert "%" in right.get_ylabel()


# The class matrices


def images(axes):
    return np.array([[ax.get_images()[0] for ax in row] for row in axes], dtype=object)


def test_class_matrices_shows_each_matrix_with_the_step_along_the_rows():
    axes = CALLS["class_matrices"]()
    for (i, j), image in np.ndenumerate(images(axes)):
        expected = MATRICES.isel(measure=i, stage=j).transpose("class_a", "class_b")
        np.testing.assert_array_equal(image.get_array(), expected)
        assert image.origin == "upper"
    transposed = plots.class_matrices(MATRICES.transpose("class_b", "stage", "class_a", "measure"), "stage", "measure")
    np.testing.assert_array_equal(images(transposed)[1, 0].get_array(), MATRICES.isel(measure=1, stage=0))


def test_class_matrices_colours_by_the_root_from_red_to_blue():
    image = images(CALLS["class_matrices"]())[0, 0]
    np.testing.assert_allclose(image.norm([-1, -0.25, 0, 0.04, 1]), [0, 0.25, 0.5, 0.6, 1])
    red, white, blue = image.to_rgba(np.array([-1.0, 0.0, 1.0]))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert min(white) > 0.9


def test_class_matrices_names_panels_axes_and_classes():
    axes = plots.class_matrices(MATRICES, "stage", "measure", ["a", "bb", "c"])
    assert [ax.get_title() for ax in axes[0]] == STAGES
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["sign\nstep on class", "cos\nstep on class"]
    assert {ax.get_xlabel() for ax in axes[-1]} == {"loss of class"}
    assert {tuple(t.get_text() for t in ax.get_yticklabels()) for ax in axes[:, 0]} == {("a", "bb", "c")}
    assert "stiffness" in visible_texts(axes[0, 0].figure)


def test_class_matrices_takes_numbers_where_names_are_long_or_left_out():
    for names in (None, ["cat", "b", "c"]):
        ax = plots.class_matrices(MATRICES, "stage", "measure", names)[0, 0]
        assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]


def test_class_matrices_in_one_line():
    axes = plots.class_matrices(MATRICES.isel(measure=0), "stage")
    assert axes.shape == (1, 2)
    assert [ax.get_title() for ax in axes[0]] == STAGES
    np.testing.assert_array_equal(images(axes)[0, 1].get_array(), MATRICES.isel(measure=0, stage=1))


# By layer


def test_by_layer_shows_both_measures_of_both_summaries():
    for ax, setting in zip(CALLS["by_layer"]().flat, SETTINGS, strict=True):
        shown = lines(ax)
        for values, label in ((WITHIN, "within classes"), (BETWEEN, "between classes")):
            for measure in MEASURES:
                x, y = shown[f"{label}, {measure}"]
                np.testing.assert_array_equal(x, range(3))
                np.testing.assert_array_equal(y, values.sel(setting=setting, measure=measure))
        assert ax.get_title() == setting
        assert ax.get_ylim()[0] < -1
        assert ax.get_ylim()[1] > 1


def test_by_layer_fills_the_cosine_and_has_one_colour_a_summary():
    ax = CALLS["by_layer"]().flat[0]
    looks = {line.get_label(): line for line in ax.get_lines() if "classes" in line.get_label()}
    filled = {label: line.get_markerfacecolor() not in ("none", to_rgba("none")) for label, line in looks.items()}
    assert filled == {label: label.endswith("cos") for label in looks}
    colours = {label: to_hex(line.get_color()).upper() for label, line in looks.items()}
    assert colours == {label: plots.BLUE if "within" in label else plots.ORANGE for label in looks}


def test_by_layer_has_one_legend_and_labels_at_the_edges():
    axes = CALLS["by_layer"]()
    (legend,) = axes[0, 0].figure.legends
    assert len(legend.get_texts()) == 4
    assert {ax.get_xlabel() for ax in axes[-1]} == {"layer"}
    assert [t.get_text() for t in axes[-1, 0].get_xticklabels()] == ["1", "2", "whole"]
    assert {ax.get_ylabel() for ax in axes[:, 0]} == {"stiffness"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_layer_of_fewer_settings(count):
    axes = plots.by_layer(WITHIN[:count], BETWEEN[:count])
    assert [ax.get_title() for ax in axes.flat if ax.get_title()] == SETTINGS[:count]


# The palette


def test_the_palette_is_told_apart_in_shades_of_grey_too():
    """BLUE, ORANGE and GREY stand for different things in one figure."""
    luminance = [np.dot([0.2126, 0.7152, 0.0722], to_rgba(colour)[:3]) for colour in (plots.BLUE, plots.ORANGE)]
    assert to_hex(plots.BLUE) != to_hex(plots.ORANGE)
    assert max(luminance) < 0.6, "dark enough on white"
    assert min(luminance) > 0.2, "light enough on the dark scheme"


# Curves through training


def bands(ax):
    """Lower and upper edges of every band, along images."""
    return [np.array([p.vertices[1 : len(IMAGES) + 1, 1] for p in b.get_paths()]).ravel() for b in ax.collections]


def test_evolution_shows_all_of_means_below_zero_and_losses_of_less_than_a_decade_on_a_plain_axis():
    opposed = RUNS.assign(within=RUNS.within - 0.6, loss=1 + RUNS.loss / RUNS.loss.max())
    assert plots.evolution(opposed.assign(loss=opposed.loss**9))[0, 0].get_yscale() == "log"
    axes = plots.evolution(opposed)
    assert axes[0, 0].get_yscale() == "linear"
    lowest = float(opposed.within.sel(arithmetic="exact").mean("seed").min())
    assert axes[1, 0].get_ylim()[0] < lowest < -0.05


def test_evolution_shows_means_over_seeds_of_the_arithmetic_that_is_asked_for():
    axes = plots.evolution(RUNS, "keras2019")
    for row, name in ((1, "within"), (2, "between")):
        for column, measure in enumerate(MEASURES):
            for regime in REGIMES:
                x, y = lines(axes[row, column])[regime]
                np.testing.assert_array_equal(x, IMAGES)
                expected = RUNS[name].sel(arithmetic="keras2019", measure=measure, regime=regime).mean("seed")
                np.testing.assert_allclose(y, expected)
    np.testing.assert_allclose(lines(axes[0, 0])["train"][1], RUNS.loss.sel(split="train").mean("seed"))
    np.testing.assert_allclose(
        lines(axes[0, 1])["validation"][1], 100 * RUNS.accuracy.sel(split="validation").mean("seed")
    )


def test_bands_are_t_intervals_over_seeds_within_what_can_be():
    (edge, *_) = bands(plots.evolution(RUNS)[1, 0])
    interval = t_interval(RUNS.within.sel(arithmetic="exact", measure="sign", regime="train-train"))
    for value in edge:
        candidates = np.concatenate([interval.low.clip(-1, 1), interval.high.clip(-1, 1)])
        assert np.isclose(candidates, value).any()


def test_one_seed_has_no_band_and_is_drawn():
    ax = plots.evolution(RUNS.isel(seed=[0]))[1, 0]
    np.testing.assert_allclose(
        lines(ax)["train-train"][1],
        RUNS.within.isel(seed=0).sel(arithmetic="exact", measure="sign", regime="train-train"),
    )
    ax.figure.canvas.draw()


def test_both_onsets_are_marked():
    marks = [line.get_xdata()[0] for line in plots.evolution(RUNS)[0, 0].get_lines() if len(set(line.get_xdata())) == 1]
    assert marks == [float(onset(RUNS, kind).median()) for kind in ("loss", "accuracy")]


def test_checkpoints_that_were_not_measured_are_bridged():
    ax = plots.overview({"MNIST": RUNS, "CIFAR-10": SPARSE})[1]
    x, _ = lines(ax)["within classes, clipped"]
    assert list(x) == [k for k in IMAGES if k > 10_000]


@pytest.mark.parametrize("sets", [1, 2, 3, 4])
def test_overview_has_a_panel_for_each_set_and_hides_the_rest(sets):
    axes = plots.overview({f"set {k}": RUNS for k in range(sets)})
    assert [ax.get_title() for ax in axes if ax.get_visible()] == [f"set {k}" for k in range(sets)]


def test_arithmetics_shows_shares_in_percent():
    axes = plots.arithmetics(RUNS, "val-val")
    np.testing.assert_allclose(lines(axes[1, 0])["training"][1], 100 * RUNS.past_gap.sel(part="train").mean("seed"))
    expected = 100 * RUNS.wrong_sign.sel(arithmetic="float32", regime="val-val").mean("seed")
    np.testing.assert_allclose(lines(axes[1, 1])["fused float32"][1], expected)


def test_beside_shows_each_set_in_each_regime():
    axes = CALLS["beside"]()
    for row, kind in zip(axes, ("within", "between"), strict=True):
        for ax, regime in zip(row, REGIMES, strict=True):
            shown = lines(ax)
            for name, runs in (("random labels", RUNS), ("true labels", SPARSE)):
                expected = runs[kind].sel(arithmetic="exact", measure="sign", regime=regime).mean("seed")
                np.testing.assert_allclose(shown[name][1], expected)
            assert set(shown["uniform answers"][1]) == {1 if kind == "within" else -1}
    assert [ax.get_title() for ax in axes[0]] == REGIMES


def test_curves_keep_to_their_bounds():
    large = {"one": {"a": 10 * RUNS.past_gap.sel(part="train")}}
    for bounds, top in (((-1, 1), 1), ((0, np.inf), None)):
        (ax,) = plots.curves(large, RUNS, bounds=bounds)
        expected = (10 * RUNS.past_gap.sel(part="train").mean("seed")).clip(*bounds)
        np.testing.assert_allclose(lines(ax)["a"][1], expected)
        assert bands(ax)[0].min() >= bounds[0]
        assert top is None or bands(ax)[0].max() <= top


# Chapter 4


def test_grouped_matrices_name_groups_and_part_them():
    axes = CALLS["grouped_matrices"]()
    for ax, stage in zip(axes.flat, STAGES, strict=True):
        np.testing.assert_allclose(ax.get_images()[0].get_array(), GROUPED.sel(stage=stage))
        assert [label.get_text() for label in ax.get_xticklabels()] == ["one group", "two"]
        assert ax.get_yticks().tolist() == [0.5, 3]
        assert {tuple(line.get_ydata()) for line in ax.get_lines()} == {(1.5, 1.5), (0, 1)}


def test_superclass_blocks_are_the_cells_within_each():
    axes = plots.superclass_blocks(GROUPED.isel(stage=-1))
    for ax, (title, names) in zip(axes, (("one group", "ab"), ("two", "cde")), strict=False):
        assert ax.get_title() == title
        assert [label.get_text() for label in ax.get_yticklabels()] == list(names)
        expected = GROUPED.isel(stage=-1).sel(class_a=list(names), class_b=list(names))
        np.testing.assert_allclose(ax.get_images()[0].get_array(), expected)


def test_grouping_histograms_show_all_random_groups_and_the_true_ones():
    for ax, test in zip(CALLS["grouping_histograms"](), TESTS.values(), strict=True):
        assert sum(bar.get_height() for bar in ax.patches) == 50
        assert ax.get_lines()[0].get_xdata()[0] == float(test.observed)
        assert "2.5 sd above, p = 0.02" in ax.get_title()


def test_related_shows_three_means_of_each_set():
    shown = lines(CALLS["related"]()[0])
    for name, kind in (("one class", "within"), ("one superclass", "related"), ("different superclasses", "unrelated")):
        expected = RELATED[kind].sel(arithmetic="exact", measure="sign", regime="val-val").mean("seed")
        np.testing.assert_allclose(shown[name][1], expected)


# Chapter 8


def test_doses_are_all_dots_and_the_prediction():
    axes = CALLS["doses"]()
    for column, found in enumerate((DOSE, DOSE.isel(images=slice(3)))):
        for row, kind in enumerate(("within", "between")):
            shown = lines(axes[row, column])
            for arithmetic, name in (("float32", "fused float32"), ("keras2019", "clipped")):
                x, y = shown[f"{name} less exact"]
                np.testing.assert_allclose(x, np.ravel(found.past))
                np.testing.assert_allclose(y, np.ravel(found[kind].sel(arithmetic=arithmetic)))
        x, y = lines(axes[0, column])["(share not clipped)², no free parameter"]
        np.testing.assert_allclose(x, np.sort(found.past.median("seed")))
        assert set(y) == set(found.predicted.median("seed").values)


def test_trained_and_measured_shows_means_and_intervals():
    axes = CALLS["trained_and_measured"]()
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [
        "trained with\nfused float32",
        "trained with\nsquared error",
    ]
    for ax, kind in zip(axes, ("within", "between"), strict=True):
        shown = {bars.get_label(): bars for bars in ax.containers}
        assert set(shown) == {f"measured {n}" for n in ("exact", "fused float32", "clipped", "own loss")}
        x, y = shown["measured exact"].lines[0].get_data()
        np.testing.assert_allclose(x, [float(v[kind].sel(arithmetic="exact").mean()) for v in LATE.values()])
        assert np.round(y).tolist() == [0, 1]
        (x,), (y,) = shown["measured own loss"].lines[0].get_data()
        assert round(y) == 1
        spread = t_interval(LATE["squared error"][kind].sel(arithmetic="own"))
        ((low, _), (high, _)) = shown["measured own loss"].lines[2][0].get_segments()[0]
        assert (low, high) == (pytest.approx(float(spread.low)), pytest.approx(float(spread.high)))


def test_taken_apart_shows_layers_and_pairs_around_the_whole():
    axes = CALLS["taken_apart"]()
    for column, layers in enumerate((3, 2)):
        top, bottom = (lines(ax) for ax in axes[:, column])
        here = TAKEN.sel(regime="train-train", measure="sign").mean("seed")
        for n in range(1, 4):
            assert (f"layer {n}" in top) is (n <= layers)
        np.testing.assert_allclose(top["layer 2"][1], here.layer_within.sel(layer=2))
        np.testing.assert_allclose(bottom["one wrong"][1], here.pair_within.sel(rightness="one wrong"))
        for shown in (top, bottom):
            np.testing.assert_allclose(shown["whole gradient, all pairs"][1], here.within.sel(arithmetic="exact"))
    (legend,) = axes[0, 0].figure.legends
    assert {"layer 3", "both wrong", "whole gradient, all pairs"} <= {text.get_text() for text in legend.get_texts()}


# Learning rates and distance


def test_against_rate_leaves_out_rates_that_a_seed_does_not_reach():
    for ax, protocol in zip(CALLS["against_rate"]().flat, ("equal loss", "equal epoch"), strict=True):
        shown = lines(ax)
        assert (ax.get_title(), ax.get_xscale()) == (protocol, "log")
        for place, rates in (("loss 0.3", RATES["learning_rate"]), ("loss 0.1", RATES["learning_rate"][1:])):
            own = AT_RATES.sel(at=place, learning_rate=rates).mean("seed")
            np.testing.assert_allclose(shown[place][0], rates, rtol=0.04)  # side by side
            np.testing.assert_allclose(shown[place][1], own)


def test_against_loss_falls_to_the_right_and_marks_stopping_losses():
    ax = CALLS["against_loss"]()[0]
    assert ax.get_xlim()[0] > 1 > 0.1 > ax.get_xlim()[1]
    shown = lines(ax)
    np.testing.assert_allclose(shown["0.0001"], [AT_LOSSES.loss, AT_LOSSES.sel(learning_rate=1e-4).mean("seed")])
    assert [0.3, 0.3] in [list(x) for x, _ in shown.values()]


def test_forest_shows_cosines_beside_signs_in_the_order_of_rows():
    axes = CALLS["forest"]()
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list("abcdef")
    for ax, name, measure in zip(axes, ("cosine", "sign"), ("cos", "sign"), strict=True):
        assert ax.get_title() == name
        bars, dots = ax.collections
        x, y = dots.get_offsets().T
        np.testing.assert_allclose(x, ESTIMATES["mean"].sel(measure=measure))
        assert (np.diff(y) < 0).all()
        ends = ESTIMATES[["low", "high"]].isel(row=0).sel(measure=measure).to_array()
        np.testing.assert_allclose(bars.get_segments()[0][:, 0], ends)


def test_figures_of_no_recorded_run_say_so():
    nothing = ESTIMATES.isel(row=slice(0))
    for axes in (rate_plots.against_rate({}), rate_plots.forest(nothing, "change")):
        assert axes.flat[0].get_title() == "no recorded run"


def test_quantiles_at_loss_shows_medians_and_says_what_is_not_reached():
    axes = rate_plots.quantiles_at_loss(GAPS.where(GAPS["at"] == "loss 0.3"))
    np.testing.assert_allclose(lines(axes[0])["median"][1], GAPS.sel(at="loss 0.3", quantile=0.5).mean("seed"))
    assert [text.get_text() for text in axes[1].texts] == ["not reached"]


def test_by_distance_marks_where_curves_fall_to_zero():
    axes = CALLS["by_distance"]()
    for row, space in zip(axes, CURVES.space.values, strict=True):
        here, shown = CURVES.sel(space=space), lines(row[0])
        np.testing.assert_allclose(shown["all"][1], here.stiffness.sel(pairs="all"))
        np.testing.assert_allclose(shown["all, by classes alone"][1], here.null)
        marks = {line.get_marker(): line.get_xdata() for line in row[0].get_lines() if len(line.get_xdata()) == 1}
        assert marks["o"][0] == pytest.approx(0.75)
        np.testing.assert_allclose(lines(row[1])[0][1], here.stiffness.sel(pairs="all") - here.null)


def test_rows_with_other_windows_or_rates_have_their_own_legends_and_ticks():
    other = AT_RATES.isel(learning_rate=slice(2)).assign_coords(at=["loss 0.5", "loss 0.4"])
    axes = rate_plots.against_rate({"one": {"equal loss": AT_RATES}, "another": {"equal loss": other}})
    for (ax,), values in zip(axes, (AT_RATES, other), strict=True):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == values["at"].values.tolist()
        assert ax.get_xticks().tolist() == values.learning_rate.values.tolist()
    alike = rate_plots.against_rate({"one": {"equal loss": AT_RATES}, "another": {"equal loss": AT_RATES}})
    assert [ax.get_legend() is None for (ax,) in alike] == [True, False]


def test_by_section_has_a_cell_a_section_and_checkpoint():
    for ax, kind in zip(CALLS["by_section"](), ("within", "between"), strict=True):
        (image,) = ax.get_images()
        np.testing.assert_array_equal(image.get_array(), SECTIONS[kind])
        assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5", "1", "2"]
        assert ax.get_title() == f"{kind} classes"


def test_runs_on_sentences_say_what_was_seen():
    assert plots.evolution(RUNS.assign_attrs(seen="pairs"))[-1, 0].get_xlabel() == "pairs seen"
    assert plots.evolution(RUNS)[-1, 0].get_xlabel() == "images seen"


def test_by_gradient_layer_has_a_curve_a_layer_and_says_where_there_is_none():
    (cosine, _), (_, sign) = CALLS["by_gradient_layer"]()
    for ax, measure, pairs in ((cosine, "cos", "same class"), (sign, "sign", "different classes")):
        here, shown = OF_LAYERS.stiffness.sel(measure=measure, pairs=pairs), lines(ax)
        for layer, label in zip(LAYERS, (*LAYERS[:2], "whole gradient"), strict=True):
            np.testing.assert_array_equal(shown[label][1], here.sel(layer=layer))
    assert {ax.get_title() for ax in rate_plots.by_gradient_layer(None)[0]} == {"no recorded run"}
    assert rate_plots.lengths_against_rate(None)[0].get_title() == "no recorded run"


@pytest.mark.parametrize("name", ["lengths_through_training", "lengths_against_rate"])
def test_bounds_are_hollow_triangles(name):
    ax = CALLS[name]()[0]
    hollow = [
        c for c in ax.collections if isinstance(c, mpl.collections.PathCollection) and not c.get_facecolor()[:, 3].any()
    ]
    bounds = np.concatenate([c.get_offsets() for c in hollow])
    own = LENGTHS.value.sel(space="input", learning_rate=1e-3)
    np.testing.assert_allclose(np.sort(bounds[:, 1]), np.sort(own))


def test_lengths_against_rate_shows_what_a_paper_reports_where_it_does():
    axes = CALLS["lengths_against_rate"]()
    np.testing.assert_allclose(lines(axes[0])["first version"], [RATES["learning_rate"], [0.3, 0.3, 0.1]])
    assert "first version" not in lines(axes[1])


def test_lengths_against_rate_shows_what_classes_alone_would_give():
    for ax, space in zip(CALLS["lengths_against_rate"](), LENGTHS.space.values, strict=True):
        dotted = [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == ":" and len(line.get_ydata())]
        np.testing.assert_allclose(dotted, LENGTHS.alone.sel(space=space))
