"""What is measured at a checkpoint: held to loops over explicit gradients, one point at a time, in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import xarray as xr
from oracles import class_means, fitted_gram, gradients, logit_reader, logits_with_gap, plain_cross_entropy
from torch import nn

from stiffkit.data import load
from stiffkit.measurement import ARITHMETICS, evaluate, measure, measured_points

pytestmark = pytest.mark.usefixtures("one_thread")

REGIMES = {"train-train": ("train", "train"), "train-val": ("train", "val"), "val-val": ("val", "val")}
QUANTILES = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]


# ----------------------------------------------------------------------------------------------------------- the oracle


def problem(n=24, m=18, dtype=torch.float64):
    """A tiny network, n training and m validation points of three unequal classes."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    x = torch.randn(n + m, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.tensor([0, 1, 2, 1, 0, 1])[torch.arange(n + m) % 6]
    return model, (x[:n], y[:n]), (x[n:], y[n:])


def pairs(rows, columns, same):
    """Every ordered pair of points, but for the pairs of a point with itself."""
    return [(i, j) for i in range(len(rows)) for j in range(len(columns)) if not (same and i == j)]


def sign_and_cosine(a, b):
    """Sign and cosine of two gradients, 0 where one of them is zero."""
    dot, size = float(a @ b), float(a.norm() * b.norm())
    return {"sign": float(np.sign(dot)), "cos": dot / size if size else 0.0}


def class_matrix(G, y, regime, measure):
    """The class means of one regime, from the gradients of both parts."""
    a, b = REGIMES[regime]
    S = [[math.nan] * len(G[b]) for _ in G[a]]
    for i, j in pairs(G[a], G[b], a == b):
        S[i][j] = sign_and_cosine(G[a][i], G[b][j])[measure]
    return {cell: mean for cell, (mean, _) in class_means(S, y[a].tolist(), y[b].tolist()).items()}


def summaries(C):
    """Mean cell on the diagonal, and off it; empty cells are left out."""
    within, between = ([v for (a, b), v in C.items() if (a == b) is same and v == v] for same in (True, False))
    return sum(within) / len(within), sum(between) / len(between)


@pytest.fixture(scope="module")
def case(one_thread):
    """The network, the points and their gradients by part, and what `measure` finds."""
    model, training, validation = problem()
    parts = {"train": training, "val": validation}
    G = {part: gradients(model, plain_cross_entropy, points) for part, points in parts.items()}
    y = {part: points[1] for part, points in parts.items()}
    return model, parts, G, y, measure(model, training, validation, tuple(ARITHMETICS), errors=True)


# -------------------------------------------------------------------------------------------------------- the variables


def test_variables_dimensions_and_types(case):
    *_, found = case
    assert {name: array.dims for name, array in found.data_vars.items()} == {
        "stiffness": ("arithmetic", "regime", "measure", "class_a", "class_b"),
        "within": ("arithmetic", "regime", "measure"),
        "between": ("arithmetic", "regime", "measure"),
        "wrong_sign": ("arithmetic", "regime"),
        "zero": ("arithmetic", "part"),
        "within_error": ("part", "measure"),
        "between_error": ("part", "measure"),
        "centred_within": ("centring", "regime"),
        "centred_between": ("centring", "regime"),
        "weighted_within": ("regime", "weighting"),
        "weighted_between": ("regime", "weighting"),
        "within_share": ("regime",),
        "points_for_90": ("part",),
        "gradient_norm": (),
        "mean_norm": (),
        "disparity": (),
        "coherence": ("part",),
        "gap": ("part", "quantile"),
        "past_gap": ("part",),
    }
    assert {str(array.dtype) for array in found.data_vars.values()} == {"float64"}
    assert not [name for name, array in found.data_vars.items() if array.isnull().any()]
    labels = {
        "arithmetic": ["exact", "float32", "keras2019"],
        "regime": ["train-train", "train-val", "val-val"],
        "measure": ["sign", "cos"],
        "part": ["train", "val"],
        "centring": ["gradient", "direction"],
        "weighting": ["norm", "change"],
        "quantile": QUANTILES,
        "class_a": [0, 1, 2],
        "class_b": [0, 1, 2],
    }
    assert {name: values.values.tolist() for name, values in found.coords.items()} == labels


@pytest.mark.parametrize("name", ["sign", "cos"])
@pytest.mark.parametrize("regime", REGIMES)
def test_class_matrices_within_and_between(case, regime, name):
    *_, G, y, found = case
    expected = class_matrix(G, y, regime, name)
    here = found.sel(arithmetic="exact", regime=regime, measure=name)
    for (a, b), mean in expected.items():
        assert float(here.stiffness.sel(class_a=a, class_b=b)) == pytest.approx(mean, abs=1e-9)
    assert [float(here.within), float(here.between)] == pytest.approx(summaries(expected), abs=1e-9)


def test_train_val_steps_are_taken_on_training_points(case):
    *_, found = case
    C = found.stiffness.sel(arithmetic="exact", regime="train-val", measure="cos")
    assert not np.allclose(C, C.values.T, atol=1e-3)


@pytest.mark.parametrize("centring", ["gradient", "direction"])
@pytest.mark.parametrize("regime", REGIMES)
def test_centred_gradients(case, regime, centring):
    *_, G, y, found = case
    centred = {}
    for part, rows in G.items():
        rows = rows if centring == "gradient" else torch.stack([g / g.norm() for g in rows])
        mean = sum(rows) / len(rows)
        centred[part] = torch.stack([g - mean for g in rows])
    within, between = summaries(class_matrix(centred, y, regime, "sign"))
    here = found.sel(centring=centring, regime=regime)
    assert float(here.centred_within) == pytest.approx(within, abs=1e-9)
    assert float(here.centred_between) == pytest.approx(between, abs=1e-9)


@pytest.mark.parametrize("regime", REGIMES)
def test_weighted_stiffness_and_the_share_of_change_within_classes(case, regime):
    *_, G, y, found = case
    a, b = REGIMES[regime]
    sums = {True: np.zeros(3), False: np.zeros(3)}  # inner products, products of norms, absolute inner products
    for i, j in pairs(G[a], G[b], a == b):
        dot = float(G[a][i] @ G[b][j])
        sums[bool(y[a][i] == y[b][j])] += [dot, float(G[a][i].norm() * G[b][j].norm()), abs(dot)]
    here = found.sel(regime=regime)
    for name, (dot, norms, change) in (("weighted_within", sums[True]), ("weighted_between", sums[False])):
        assert float(here[name].sel(weighting="norm")) == pytest.approx(dot / norms)
        assert float(here[name].sel(weighting="change")) == pytest.approx(dot / change)
    assert float(here.within_share) == pytest.approx(sums[True][2] / (sums[True][2] + sums[False][2]))


def test_norms_and_disparity_of_training_batches(case):
    model, parts, G, _, found = case
    x, y = parts["train"]

    def batch_gradient(index):
        loss = plain_cross_entropy(model(x[index]), y[index]).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    batches = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tensor_split(10)
    assert sorted(torch.cat(batches).tolist()) == list(range(24))
    means = [batch_gradient(batch) for batch in batches]
    distances = [float((means[i] - means[j]).norm()) for i in range(10) for j in range(i)]
    assert float(found.disparity) == pytest.approx(sum(distances) / 45)
    assert float(found.gradient_norm) == pytest.approx(float(batch_gradient(torch.arange(24)).norm()))
    assert float(found.mean_norm) == pytest.approx(sum(float(g.norm()) for g in G["train"]) / 24)


def test_coherence(case):
    *_, G, _, found = case
    for part, rows in G.items():
        expected = float(rows.sum(0).square().sum() / rows.square().sum())
        assert float(found.coherence.sel(part=part)) == pytest.approx(expected)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["sign", "cos"])
def test_class_matrices_by_true_label(case, regime, name):
    model, parts, G, y, plain = case
    truth = {"train": torch.arange(24) % 4, "val": torch.arange(18) % 3}  # no validation point of class 3
    found = measure(model, *parts.values(), tuple(ARITHMETICS), errors=True, truth=torch.cat([*truth.values()]))
    same = found[list(plain.data_vars)].sel(class_a=plain.class_a, class_b=plain.class_b)
    xr.testing.assert_identical(same.drop_vars(["given", "true"], errors="ignore"), plain)
    here = found.sel(arithmetic="exact", regime=regime, measure=name)
    expected = class_matrix(G, truth, regime, name)
    for (a, b), mean in expected.items():
        assert float(here.true_stiffness.sel(class_a=a, class_b=b)) == pytest.approx(mean, abs=1e-9, nan_ok=True)
    assert int(here.true_stiffness.isnull().sum()) == {"train-train": 0, "train-val": 4, "val-val": 7}[regime]
    assert [float(here.true_within), float(here.true_between)] == pytest.approx(summaries(expected), abs=1e-9)
    a, b = REGIMES[regime]
    values = {}
    for i, j in pairs(G[a], G[b], a == b):
        kind = tuple("same" if labels[a][i] == labels[b][j] else "other" for labels in (y, truth))
        values.setdefault(kind, []).append(sign_and_cosine(G[a][i], G[b][j])[name])
    for (given, true), found_here in values.items():
        mean = sum(found_here) / len(found_here)
        assert float(here.crossed.sel(given=given, true=true)) == pytest.approx(mean, abs=1e-9)


def test_a_class_with_one_point_has_no_cell_with_itself_and_poisons_no_mean():
    model, training, validation = problem()
    truth = torch.zeros(42, dtype=torch.int64)
    truth[0] = 1
    found = measure(model, training, validation, errors=False, truth=truth).sel(arithmetic="exact", measure="cos")
    C = found.true_stiffness.sel(regime="train-train")
    assert np.isnan(float(C.sel(class_a=1, class_b=1)))
    assert float(found.true_within.sel(regime="train-train")) == float(C.sel(class_a=0, class_b=0))
    assert not found.true_within.isnull().any()


def test_the_fewest_points_that_hold_nine_tenths_of_the_norm(case):
    *_, G, _, found = case
    for part, rows in G.items():
        norms = sorted((float(g.norm()) for g in rows), reverse=True)
        fewest = next(k for k in range(len(norms) + 1) if sum(norms[:k]) >= 0.9 * sum(norms))
        assert float(found.points_for_90.sel(part=part)) == pytest.approx(fewest / len(norms))


def test_logit_gaps(case):
    model, parts, *_, found = case
    for part, (x, y) in parts.items():
        gaps = []
        for z, label in zip(model(x).tolist(), y.tolist(), strict=True):
            others = sum(math.exp(v) for k, v in enumerate(z) if k != label)
            gaps.append(z[label] - math.log(others))
        np.testing.assert_allclose(found.gap.sel(part=part), np.quantile(gaps, QUANTILES), atol=1e-12)
    assert not found.past_gap.any()


@pytest.mark.parametrize("name", ["sign", "cos"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_errors_equal_a_bootstrap_that_copies_points(case, part, name):
    *_, G, y, found = case
    labels, generator = y[part], np.random.default_rng(1)
    S = np.array([[sign_and_cosine(a, b)[name] for b in G[part]] for a in G[part]])
    members = [np.flatnonzero(labels == c) for c in range(3)]
    resampled = []
    for _ in range(500):
        drawn = np.concatenate([generator.choice(m, len(m)) for m in members])
        copies = np.where(drawn[:, None] == drawn, np.nan, S[drawn][:, drawn])
        C = class_means(copies.tolist(), labels[drawn].tolist(), labels[drawn].tolist())
        resampled.append(summaries({cell: mean for cell, (mean, _) in C.items()}))
    within, between = np.std(resampled, axis=0, ddof=1)
    here, rtol = found.sel(part=part, measure=name), 4 * math.sqrt(1 / 400 + 1 / 1000)
    assert float(here.within_error) == pytest.approx(within, rel=rtol, abs=1e-12)
    assert float(here.between_error) == pytest.approx(between, rel=rtol, abs=1e-12)


def test_without_errors_the_rest_is_the_same():
    model, training, validation = problem()
    full, less = (measure(model, training, validation, errors=errors) for errors in (True, False))
    assert set(full.data_vars) - set(less.data_vars) == {"within_error", "between_error"}
    assert less.equals(full[list(less.data_vars)])
    assert less.arithmetic.values.tolist() == ["exact"]


def test_the_model_and_the_points_are_left_alone():
    model, training, validation = problem(dtype=torch.float32)
    before, points = copy.deepcopy(model.state_dict()), [t.clone() for t in (*training, *validation)]
    rng = torch.get_rng_state()
    measure(model, training, validation, tuple(ARITHMETICS), errors=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(points, (*training, *validation), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_fewer_training_points_than_batches():
    """Every point is a batch."""
    model, training, validation = problem(n=6)
    G = gradients(model, plain_cross_entropy, training)
    distances = [float((G[i] - G[j]).norm()) for i in range(6) for j in range(i)]
    assert float(measure(model, training, validation, errors=False).disparity) == pytest.approx(sum(distances) / 15)


# -------------------------------------------------------------------------------------------------------- fitted points

GAPS = [0.0, 3.0, 15.0, 15.8, 16.6, 20.0, 30.0, 40.0, 100.0, -5.0, -15.0, -30.0, 17.5, 18.0, 25.0, 1.0]


def in_software(name, z, y):
    """Gradients at the outputs as other software computes them: p - e_y in float32, or autograd through a clip."""
    rows = []
    for logits, label in zip(z.float(), y.tolist(), strict=True):
        if name == "float32":
            g = torch.softmax(logits, dim=0)
            g[label] -= 1
        else:
            logits = logits.clone().requires_grad_()
            p = torch.softmax(logits, dim=0)
            p = torch.clip(p / p.sum(), 1e-7, 1 - 1e-7)
            (g,) = torch.autograd.grad(-torch.log(p[label]), logits)
        rows.append(g.double())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def fitted(one_thread):
    """A linear network that reads its logits, points of known gap, and the signs of all pairs in each arithmetic."""
    (z, y), (z2, y2) = (logits_with_gap(GAPS[::step], seed=seed) for step, seed in ((1, 0), (-1, 1)))
    points = torch.cat([z, z2]), torch.cat([y, y2])
    cosines = {"exact": fitted_gram(logit_reader(), points).cos}
    zero = {"exact": torch.zeros(32, dtype=torch.bool)}
    for name in ("float32", "keras2019"):
        g, x = in_software(name, *points), points[0].double()
        G = torch.stack([torch.cat([torch.outer(g[i], x[i]).flatten(), g[i]]) for i in range(32)])
        zero[name] = G.norm(dim=1) == 0
        G = torch.stack([v / v.norm() if v.any() else v for v in G])
        cosines[name] = G @ G.T
    found = measure(logit_reader(), (z, y), (z2, y2), tuple(ARITHMETICS), errors=False)
    return points[1], cosines, zero, found


PARTS = {"train": range(16), "val": range(16, 32)}


def test_share_past_the_gap(fitted):
    *_, found = fitted
    past = sum(gap > 16 for gap in GAPS) / 16
    assert found.past_gap.values.tolist() == [past, past]
    np.testing.assert_allclose(found.gap.sel(part="train"), np.quantile(GAPS, QUANTILES), atol=1e-4)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_share_of_zero_gradients(fitted, name):
    *_, zero, found = fitted
    for part, index in PARTS.items():
        share = sum(bool(zero[name][i]) for i in index) / 16
        assert float(found.zero.sel(arithmetic=name, part=part)) == share
    clipped = sum(abs(gap) > 16.2 for gap in GAPS) / 16
    assert {"exact": 0, "keras2019": clipped}.get(name, share) == share


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("regime", REGIMES)
def test_share_of_pairs_with_another_sign_than_the_exact_one(fitted, regime, name):
    _, cosines, _, found = fitted
    rows, columns = (PARTS[part] for part in REGIMES[regime])
    kept = [(i, j) for i in rows for j in columns if i != j]
    wrong = sum(bool(cosines[name][i, j].sign() != cosines["exact"][i, j].sign()) for i, j in kept) / len(kept)
    assert float(found.wrong_sign.sel(arithmetic=name, regime=regime)) == pytest.approx(wrong, abs=1e-12)
    assert wrong == 0 if name == "exact" else wrong > 0.05


@pytest.mark.parametrize("name", ARITHMETICS)
def test_class_matrices_of_fitted_points(fitted, name):
    y, cosines, _, found = fitted
    for regime, parts in REGIMES.items():
        rows, columns = (PARTS[part] for part in parts)
        for measured, S in (("cos", cosines[name]), ("sign", cosines[name].sign())):
            block = [[math.nan if i == j else float(S[i, j]) for j in columns] for i in rows]
            C = found.stiffness.sel(arithmetic=name, regime=regime, measure=measured)
            for (a, b), (mean, _) in class_means(block, y[rows].tolist(), y[columns].tolist()).items():
                assert float(C.sel(class_a=a, class_b=b)) == pytest.approx(mean, abs=1e-5)


def test_a_network_whose_logits_are_huge():
    """Its last layer is scaled up, and most labels are its own answers."""
    model, (x, y), (x2, y2) = problem(n=40, dtype=torch.float32)
    with torch.no_grad():
        for p in model[2].parameters():
            p *= 30
        y, y2 = (torch.cat([labels[:6], model(inputs[6:]).argmax(1)]) for inputs, labels in ((x, y), (x2, y2)))
    found = measure(model, (x, y), (x2, y2), tuple(ARITHMETICS), errors=False)
    cos = fitted_gram(model, (torch.cat([x, x2]), torch.cat([y, y2]))).cos
    for regime, parts in REGIMES.items():
        rows, columns = ({"train": range(40), "val": range(40, 58)}[part] for part in parts)
        block = [[math.nan if i == j else float(cos[i, j].sign()) for j in columns] for i in rows]
        labels = ({"train": y, "val": y2}[part].tolist() for part in parts)
        expected = summaries({cell: mean for cell, (mean, _) in class_means(block, *labels).items()})
        here = found.sel(arithmetic="exact", regime=regime, measure="sign")
        assert [float(here.within), float(here.between)] == pytest.approx(expected, abs=1e-9)
    past = float(found.past_gap.sel(part="train"))
    zero = float(found.zero.sel(arithmetic="keras2019", part="train"))
    assert past > 0.3
    assert zero >= past - 1 / 40


def test_clipping_takes_stiffness_within_classes_to_the_square_of_the_share_that_is_not_clipped():
    gaps = [0.0, 20.0, 1.0, 2.0, 30.0, 3.0, 18.0, 4.0]  # three in eight are clipped, in every class alike
    (z, y), points2 = logits_with_gap([gap for gap in gaps for _ in range(4)]), logits_with_gap([1.0] * 12)
    found = measure(logit_reader(), (z, y), points2, tuple(ARITHMETICS), errors=False)
    here = found.within.sel(regime="train-train", measure="sign")
    assert float(here.sel(arithmetic="keras2019")) == pytest.approx(
        float(here.sel(arithmetic="exact")) * 5 * 4 / (8 * 7), abs=0.1
    )


def test_a_class_that_only_one_part_has():
    model, training, (x2, _) = problem()
    parts = {"train": training, "val": (x2, torch.arange(18) % 2)}
    G = {part: gradients(model, plain_cross_entropy, points) for part, points in parts.items()}
    y = {part: points[1] for part, points in parts.items()}
    found = measure(model, *parts.values(), errors=False).sel(arithmetic="exact", measure="sign")
    assert found.stiffness.sel(regime="train-val", class_b=2).isnull().all()
    for regime in REGIMES:
        expected = summaries(class_matrix(G, y, regime, "sign"))
        assert [float(found[name].sel(regime=regime)) for name in ("within", "between")] == pytest.approx(expected)


def test_points_without_any_gradient():
    """Beyond a gap of 745 even the exact gradient is zero: shares are 1, the rest 0, nothing is NaN."""
    points = logits_with_gap([800.0] * 12)
    found = measure(logit_reader(), points, points, tuple(ARITHMETICS), errors=True)
    assert not [name for name, array in found.data_vars.items() if array.isnull().any()]
    assert (found.zero.sel(arithmetic=["exact", "keras2019"]) == 1).all()
    assert (found.past_gap == 1).all()
    exact = found.sel(arithmetic="exact")
    for name in ("within", "between", "weighted_within", "weighted_between", "within_share", "points_for_90"):
        assert not exact[name].any()
    assert float(found.gradient_norm) == float(found.mean_norm) == float(found.disparity) == 0


# ------------------------------------------------------------------------------------------------ points and evaluation


def rows_of(points, dataset):
    """Where points stand in a data set: their images are all different."""
    return [
        next(k for k, image in enumerate(dataset[0]) if torch.equal(image, x) and dataset[1][k] == y)
        for x, y in zip(*points, strict=True)
    ]


def test_measured_points_are_balanced_and_of_their_own_part():
    digits = load("digits")
    training, validation = measured_points(digits, 40, seed=1)
    for points, part in ((training, digits.train), (validation, digits.validation)):
        assert points[0].shape == (40, 1, 8, 8)
        assert torch.bincount(points[1]).tolist() == [4] * 10
        assert len(set(rows_of(points, part))) == 40


def test_a_seed_means_the_same_points_and_fewer_are_among_them():
    digits = load("digits")
    drawn = [(40, 1), (40, 1), (40, 2), (20, 1)]
    first, again, other, fewer = (measured_points(digits, size, seed) for size, seed in drawn)
    for k, part in enumerate((digits.train, digits.validation)):
        assert rows_of(first[k], part) == rows_of(again[k], part)
        assert set(rows_of(first[k], part)) != set(rows_of(other[k], part))
        assert set(rows_of(fewer[k], part)) < set(rows_of(first[k], part))


def test_more_points_than_there_are_is_refused():
    with pytest.raises(ValueError, match="at most"):
        measured_points(load("digits"), 500, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_is_the_mean_loss_and_the_share_that_is_right(dtype):
    model, (x, y), _ = problem(n=150, m=0, dtype=dtype)
    losses, right = [], []
    for z, label in zip(model(x).double().tolist(), y.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(v) for v in z)) - z[label])
        right.append(z.index(max(z)) == label)
    loss, accuracy = evaluate(model, (x, y))
    assert loss == pytest.approx(sum(losses) / 150, rel=1e-6)
    assert accuracy == sum(right) / 150
    assert 0 < accuracy < 1


def test_evaluation_of_confident_networks_keeps_its_digits():
    z, y = logits_with_gap([30.0] * 5)
    loss, accuracy = evaluate(logit_reader(), (z, y))
    assert loss == pytest.approx(math.exp(-30), rel=1e-3)
    assert accuracy == 1
