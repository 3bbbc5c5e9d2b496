import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CLASSES, MODELS, Forward, build, class_means, dyadic_mlp, logit_reader, logits_with_gap
from torch import nn

from stiffkit import (
    GradientGram,
    class_cosine,
    class_stiffness,
    gradient_gram,
    group_stiffness,
    losses,
    stiffness,
    within_between,
)

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
REFUSED = (ValueError, TypeError)


pytestmark = pytest.mark.usefixtures("one_thread")


def hand_made(cos, norms, same=True):
    """A Gram matrix with the given cosines."""
    cos, norms = torch.tensor(cos, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)
    self_pairs = torch.eye(len(cos), dtype=torch.bool) if same else torch.zeros(cos.shape, dtype=torch.bool)
    return GradientGram(cos=cos, norms=norms, norms2=norms, self_pairs=self_pairs)


def assert_cells(C, cells):
    """Values and counts of a class matrix against {(a, b): (mean, pairs)}."""
    assert C.dims == ("class_a", "class_b")
    assert {(a, b) for a in C.class_a.values.tolist() for b in C.class_b.values.tolist()} == set(cells)
    for (a, b), (mean, pairs) in cells.items():
        cell = C.sel(class_a=a, class_b=b)
        assert int(cell.pairs) == pairs
        assert float(cell) == pytest.approx(mean, abs=1e-12, nan_ok=True)


# ----------------------------------------------------------------------------------------------------------- stiffness


def test_sign_and_cosine():
    gram = hand_made([[1, 0.5, 0], [0.5, 1, -0.25], [0, -0.25, 1]], [2, 3, 1])
    nan = math.nan
    torch.testing.assert_close(
        stiffness(gram, "cos"),
        torch.tensor([[nan, 0.5, 0], [0.5, nan, -0.25], [0, -0.25, nan]], dtype=torch.float64),
        equal_nan=True,
    )
    torch.testing.assert_close(
        stiffness(gram, "sign"),
        torch.tensor([[nan, 1, 0], [1, nan, -1], [0, -1, nan]], dtype=torch.float64),
        equal_nan=True,
    )


@pytest.mark.parametrize("measure", ["sign", "cos"])
def test_stiffness_of_measured_points(measure):
    case = build("mlp")
    one, two = (gradient_gram(case.model, case.loss, *sets) for sets in ([case.points], [case.points, case.points2]))
    assert torch.equal(stiffness(one, measure).isnan(), one.self_pairs)
    assert not stiffness(two, measure).isnan().any()
    assert stiffness(two, measure).shape == two.cos.shape
    assert stiffness(two, measure).dtype == torch.float64


def test_stiffness_leaves_the_gram_matrix_alone():
    gram = hand_made([[1, 0.5], [0.5, 1]], [1, 1])
    stiffness(gram, "cos")
    assert gram.cos.tolist() == [[1, 0.5], [0.5, 1]]


@pytest.mark.parametrize("measure", ["sign", "cos"])
def test_zero_gradients_count_as_zero(measure):
    case = build("mlp", "ignored class", n=8)
    gram = gradient_gram(case.model, case.loss, case.points)
    S = stiffness(gram, measure)
    assert 0 < gram.zero.sum() < 8
    assert (S[gram.zero].nan_to_num() == 0).all()
    assert (S[:, gram.zero2].nan_to_num() == 0).all()
    assert torch.equal(S.isnan(), torch.eye(8, dtype=torch.bool))


def test_sign_where_the_inner_product_underflows():
    z, y = logits_with_gap([700.0] * 6, CLASSES)
    gram = gradient_gram(logit_reader(CLASSES), CROSS_ENTROPY, (z, y))
    assert not gram.dot.any()
    assert set(stiffness(gram, "sign")[~gram.self_pairs].tolist()) <= {-1.0, 1.0}


def test_copies_in_a_block_are_pairs_of_a_point_with_itself():
    case = build("mlp")
    block = gradient_gram(case.model, case.loss, case.points).block([3, 3, 0], [0, 3])
    assert stiffness(block, "cos").isnan().tolist() == [[False, True], [False, True], [True, False]]


def test_unknown_measure_is_refused():
    with pytest.raises(REFUSED, match="cos"):
        stiffness(hand_made([[1]], [1]), "cosine")


# ------------------------------------------------------------------------------------------------------ class matrices


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_class_matrix_equals_four_loops(kind):
    torch.manual_seed(0)
    y, S = [3, 1, 1, 3, 3, 7, 1], torch.randn(7, 7, dtype=torch.float64).fill_diagonal_(math.nan)
    assert_cells(class_stiffness(S, kind(y)), class_means(S.tolist(), y, y))


def test_class_matrix_of_two_sets_equals_four_loops():
    torch.manual_seed(0)
    y, y2, S = [3, 1, 1, 3], [7, 3, 7, 3, 3], torch.randn(4, 5, dtype=torch.float64)
    assert_cells(class_stiffness(S, y, y2), class_means(S.tolist(), y, y2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_class_matrix_of_any_shape(data):
    y, y2 = (data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=5)) for _ in range(2))
    values = st.sampled_from([-1.0, 0.0, 0.5, 1.0, math.nan])
    S = data.draw(st.lists(st.lists(values, min_size=len(y2), max_size=len(y2)), min_size=len(y), max_size=len(y)))
    C = class_stiffness(torch.tensor(S, dtype=torch.float64), torch.tensor(y), torch.tensor(y2))
    assert_cells(C, class_means(S, y, y2))


def test_classes_are_sorted_and_labelled():
    C = class_stiffness(torch.zeros(3, 4, dtype=torch.float64), [5, -2, 5], [9, 0, 9, 0])
    assert C.dims == ("class_a", "class_b")
    assert C.class_a.values.tolist() == [-2, 5]
    assert C.class_b.values.tolist() == [0, 9]
    assert C.pairs.dims == ("class_a", "class_b")
    assert C.pairs.values.tolist() == [[2, 2], [4, 4]]
    assert np.issubdtype(C.pairs.dtype, np.integer)


def test_a_class_of_one_point_has_no_pair_within():
    S = torch.tensor([[math.nan, 0.5, 1.0], [0.5, math.nan, 0.0], [1.0, 0.0, math.nan]], dtype=torch.float64)
    C = class_stiffness(S, [0, 1, 1])
    assert math.isnan(C.sel(class_a=0, class_b=0))
    assert int(C.pairs.sel(class_a=0, class_b=0)) == 0
    assert float(C.sel(class_a=1, class_b=1)) == 0


def test_one_labelling_is_refused_for_two_sets():
    case = build("mlp", n=4, m=4)
    S = stiffness(gradient_gram(case.model, case.loss, case.points, case.points2), "cos")
    for rectangle in (S, S[:, :3]):
        with pytest.raises(REFUSED, match="y2"):
            class_stiffness(rectangle, case.points[1])


@pytest.mark.parametrize(
    ("y", "y2"), [([0, 1, 1], None), ([0, 1], [0, 1, 1]), ([0, 1, 1, 0], [0]), ([[0, 1, 0, 1]], None)]
)
def test_labels_of_a_wrong_length_are_refused(y, y2):
    with pytest.raises(REFUSED):
        class_stiffness(torch.zeros(4, 4, dtype=torch.float64).fill_diagonal_(math.nan), y, y2)


def test_class_matrix_of_a_set_with_itself_is_symmetric():
    case = build("mlp", n=20)
    C = class_stiffness(stiffness(gradient_gram(case.model, case.loss, case.points), "sign"), case.points[1])
    np.testing.assert_allclose(C.values, C.values.T, atol=1e-12)
    assert int(C.pairs.sum()) == 20 * 19


# -------------------------------------------------------------------------------------------------- within and between


def labelled(values, a=None, b=None, **leading):
    values = np.asarray(values, dtype=float)
    a = list(range(values.shape[-2])) if a is None else a
    b = list(range(values.shape[-1])) if b is None else b
    return xr.DataArray(values, dims=(*leading, "class_a", "class_b"), coords={"class_a": a, "class_b": b, **leading})


def test_within_and_between_are_means_over_cells():
    """v3 eq. 7: the sum over ordered pairs of classes, divided by their number; not weighted by pairs of points."""
    C = [[1, 2, 4], [8, 16, 32], [64, 128, 256]]
    W = within_between(labelled(C))
    assert float(W.within) == pytest.approx(float(Fraction(1 + 16 + 256, 3)))
    assert float(W.between) == pytest.approx(float(Fraction(2 + 4 + 8 + 32 + 64 + 128, 3 * 2)))


def test_cells_count_alike_however_many_points_they_hold():
    y = [0, 0, 0, 0, 1, 1]
    S = torch.where(torch.tensor(y)[:, None] == 0, 1.0, 0.0).double().expand(6, 6).clone().fill_diagonal_(math.nan)
    W = within_between(class_stiffness(S, y))
    assert (float(W.within), float(W.between)) == (0.5, 0.5)


def test_empty_cells_are_left_out():
    W = within_between(labelled([[math.nan, 1, 2], [3, 5, math.nan], [6, 4, 7]]))
    assert float(W.within) == pytest.approx(6)
    assert float(W.between) == pytest.approx((1 + 2 + 3 + 6 + 4) / 5)


def test_nothing_to_average_is_nan_without_a_warning():
    W = within_between(labelled([[math.nan]], [0], [0]))
    assert math.isnan(W.within)
    assert math.isnan(W.between)


def test_further_dimensions_are_kept():
    values = np.arange(2 * 3 * 4 * 4, dtype=float).reshape(2, 3, 4, 4)
    W = within_between(labelled(values, seed=[1, 2], images=[0, 32, 64]))
    assert W.within.dims == W.between.dims == ("seed", "images")
    assert W.within.seed.values.tolist() == [1, 2]
    for s, i in np.ndindex(2, 3):
        one = within_between(labelled(values[s, i]))
        assert float(W.within[s, i]) == pytest.approx(float(one.within))
        assert float(W.between[s, i]) == pytest.approx(float(one.between))


def test_the_diagonal_is_where_the_labels_agree():
    W = within_between(labelled([[1, 2], [4, 8], [16, 32]], a=[0, 1, 5], b=[1, 5]))
    assert float(W.within) == pytest.approx((4 + 32) / 2)
    assert float(W.between) == pytest.approx((1 + 2 + 8 + 16) / 4)


def test_order_of_dimensions_does_not_matter():
    C = labelled([[[1, 2], [4, 8]]], run=[7])
    W, turned = within_between(C), within_between(C.transpose("class_b", "run", "class_a"))
    assert W.within.item() == turned.within.item() == 4.5
    assert W.between.item() == turned.between.item() == 3


# ------------------------------------------------------------------------------------------- the matrix from class sums


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore:torch.func cannot")
def test_class_sums_equal_the_gram_matrix(model):
    if model == "BERT":
        pytest.importorskip("transformers")
    case = build(model, n=9)
    y = case.points[1]
    expected = class_stiffness(stiffness(gradient_gram(case.model, case.loss, case.points), "cos"), y)
    assert_same_matrix(class_cosine(case.model, case.loss, case.points, y), expected)


def assert_same_matrix(found, expected):
    xr.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert found.dims == expected.dims
    assert found.pairs.values.tolist() == expected.pairs.values.tolist()


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.cross_entropy_float32, losses.cross_entropy_keras2019])
def test_class_sums_of_fitted_points(loss):
    z, y = logits_with_gap([0.0, 2.0, 20.0, 40.0, 100.0, 700.0, 3.0, 50.0, -30.0], CLASSES)
    expected = class_stiffness(stiffness(gradient_gram(logit_reader(CLASSES), loss, (z, y)), "cos"), y)
    assert_same_matrix(class_cosine(logit_reader(CLASSES), loss, (z, y), y), expected)


def test_class_sums_with_zero_gradients_and_a_class_of_one():
    case = build("mlp", "ignored class", n=9)
    groups = [0, 0, 1, 2, 2, 1, 1, 4, 2]
    gram = gradient_gram(case.model, case.loss, case.points)
    assert gram.zero.any()
    found = class_cosine(case.model, case.loss, case.points, groups)
    assert_same_matrix(found, class_stiffness(stiffness(gram, "cos"), groups))
    assert math.isnan(found.sel(class_a=4, class_b=4))


def test_class_sums_leave_the_model_alone():
    case = build("batch norm in eval mode", n=7)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        class_cosine(case.model, case.loss, case.points, case.points[1])
    torch.testing.assert_close(case.model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_class_sums_refuse_what_the_gram_matrix_refuses():
    case = build("mlp")
    with pytest.raises(REFUSED, match='reduction="none"'):
        class_cosine(case.model, nn.CrossEntropyLoss(), case.points, case.points[1])
    with pytest.raises(REFUSED, match=r"eval\(\)"):
        class_cosine(case.model.train(), case.loss, case.points, case.points[1])
    with pytest.raises(REFUSED):
        class_cosine(case.model.eval(), case.loss, case.points, case.points[1][:-1])
    mixing = Forward(lambda s, x: s.fc(x.flatten(1) - x.flatten(1).mean(0)), fc=nn.Linear(6, CLASSES))
    with pytest.raises(REFUSED, match=r"(?i)mix|other|batch|depend"):
        class_cosine(mixing, case.loss, case.points, case.points[1])


# -------------------------------------------------------------------------------------------------- what theory demands


def test_uniform_outputs_give_the_baseline_at_initialisation():
    """Within a class +1, between classes -1/(K-1) times the cosine of the features, here 1."""
    model = nn.Linear(2, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.ones(8, 2), torch.arange(8) % 4
    gram = gradient_gram(model, CROSS_ENTROPY, (x, y))
    C = class_stiffness(stiffness(gram, "cos"), y)
    np.testing.assert_allclose(C.values, np.where(np.eye(4), 1, -1 / 3), atol=1e-6)
    W = within_between(class_stiffness(stiffness(gram, "sign"), y))
    assert (float(W.within), float(W.between)) == (1, -1)


@pytest.mark.parametrize("scale", [1, 32, 128])
def test_last_layer_within_class_sign_is_one_at_any_confidence(scale):
    model, (x, y) = dyadic_mlp(scale)
    y = y.roll(1)
    last = gradient_gram(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), (x, y), by="layer")["2"]
    C = class_stiffness(stiffness(last, "sign"), y)
    diagonal = np.diag(C.values)[np.diag(C.pairs.values) > 0]
    assert len(diagonal)
    assert (diagonal == 1).all()
    assert float(within_between(C).within) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_group_stiffness_is_a_mean_over_cells(seed):
    random = np.random.default_rng(seed)
    groups = random.integers(0, 3, 8).tolist()
    C = xr.DataArray(random.uniform(-1, 1, (2, 8, 8)), dims=("seed", "class_a", "class_b"))
    C[0, 1, 2] = np.nan
    found = group_stiffness(C, groups)
    for k in range(2):
        cells = {"within": [], "related": [], "unrelated": []}
        for i, j in itertools.product(range(8), repeat=2):
            kind = "within" if i == j else "related" if groups[i] == groups[j] else "unrelated"
            cells[kind].append(float(C[k, i, j]))
        for kind, values in cells.items():
            assert float(found[kind][k]) == pytest.approx(np.nanmean(values))


def test_group_stiffness_without_related_classes_and_with_too_few_groups():
    C = xr.DataArray(np.eye(3), dims=("class_a", "class_b"))
    assert np.isnan(float(group_stiffness(C, ["a", "b", "c"]).related))
    with pytest.raises(ValueError, match="one for each class"):
        group_stiffness(C, ["a", "b"])
