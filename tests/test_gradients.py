import copy
import random
import warnings
import weakref
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CLASSES,
    LOSSES,
    MODELS,
    WEIGHT,
    Forward,
    N,
    assert_agrees,
    build,
    dyadic_mlp,
    fitted_gram,
    gradients,
    logit_reader,
    logits_with_gap,
    loop_gram,
    one_hot,
    pick,
    plain_cross_entropy,
    reference_gram,
    softmax_gradient,
    take,
    to,
    transformer,
)
from torch import nn

import stiffkit.signals
from stiffkit import GradientGram, gradient_gram, gradient_norms, losses, per_sample, stiffness
from stiffkit._torchvision import import_torchvision

REFUSED = (ValueError, TypeError)
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
GAPS = [0.0, 3.0, 8.0, 15.0, 17.0, 25.0, 35.0, 37.0, 60.0, 100.0, -5.0, -40.0, -100.0]
FAR = [*GAPS, 200.0, 400.0, 690.0, 700.0, -700.0]


@contextmanager
def _silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gram_of(case, *sets, **options):
    """What torch.func refuses is measured with a warning, everything else without."""
    with {True: pytest.warns(UserWarning, match="torch.func"), False: nullcontext(), None: _silent()}[case.looped]:
        return gradient_gram(case.model, case.loss, *sets, **options)


def need(model):
    if model == "BERT":
        pytest.importorskip("transformers")


def points_of(model, n=N):
    need(model)
    case = build(model, n=n)
    return case, case.points


def concatenate(a, b):
    """Two point sets as one."""
    if isinstance(a, torch.Tensor):
        return torch.cat([a, b])
    if isinstance(a, dict):
        return {name: concatenate(a[name], b[name]) for name in a}
    return tuple(concatenate(x, y) for x, y in zip(a, b, strict=True))


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------- against the loop in float64

EVERY_LOSS = [
    "mlp",
    "stride, padding, groups, dilation, max-pool",
    "as many steps as points",
    "called twice",
    "GRU",
    "BERT",
]
EVERY_MODEL = ["class weights", "stiffkit's squared error", "own"]
PRODUCT = [(m, loss) for m in MODELS for loss in LOSSES if m in EVERY_LOSS or loss in EVERY_MODEL]


@pytest.mark.parametrize(("model", "loss"), PRODUCT)
def test_two_sets_equal_the_loop(model, loss):
    need(model)
    case = build(model, loss)
    gram = gram_of(case, case.points, case.points2)
    assert_agrees(gram, loop_gram(case.model, case.reference, case.points, case.points2))
    assert not gram.self_pairs.any()


@pytest.mark.parametrize("model", MODELS)
def test_one_set_equals_the_loop(model):
    need(model)
    case = build(model, seed=1)
    gram = gram_of(case, case.points)
    assert_agrees(gram, loop_gram(case.model, case.reference, case.points))
    assert torch.equal(gram.self_pairs, torch.eye(N, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["module", "own"])
@pytest.mark.parametrize("model", MODELS)
def test_float64_network_equals_the_loop_to_rounding(model, loss):
    need(model)
    case = build(model, loss, dtype=torch.float64, seed=2)
    gram = gram_of(case, case.points)
    assert_agrees(gram, loop_gram(case.model, case.reference, case.points), torch.float64)


@pytest.mark.parametrize("loss", ["module", "squared error"])
@pytest.mark.parametrize("model", MODELS)
def test_layers_equal_the_loop_and_sum_to_the_whole(model, loss):
    need(model)
    case = build(model, loss, seed=3)
    layers = gram_of(case, case.points, case.points2, by="layer")
    G, H = (gradients(case.model, case.reference, points) for points in (case.points, case.points2))
    trained = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
    owner = np.repeat([name.rpartition(".")[0] for name, _ in trained], [p.numel() for _, p in trained])
    assert set(layers) == set(owner)
    for name, gram in layers.items():
        columns = torch.from_numpy(owner == name)
        assert_agrees(gram, reference_gram(G[:, columns], H[:, columns]))
    whole = gram_of(case, case.points, case.points2)
    scale = float(whole.norms.max() * whole.norms2.max())
    torch.testing.assert_close(sum(g.dot for g in layers.values()), whole.dot, rtol=0, atol=1e-6 * scale)


LAYER_BY_LAYER = [
    "linear",
    "linear without bias",
    "mlp",
    "nested",
    "residual",
    "stride, padding, groups, dilation, max-pool",
    "stride that does not divide",
    "as many channels, rows and columns as points",
    "channels last",
    "changed in place",
    "sequences",
    "as many steps as points",
    "frozen layer",
    "frozen weight",
    "frozen convolution bias",
    "frozen on sequences",
    "uneven convolutions",
    "circular and reflecting padding",
    "one and three dimensions",
    "batch norm in eval mode",
    "layer and group norm",
    "norms of sequences and images",
    "padded embedding",
    "positions looked up once",
    "two numbers a sample",
]


@pytest.mark.parametrize("model", LAYER_BY_LAYER)
def test_networks_of_known_layers_do_without_torch_func(model, monkeypatch):
    monkeypatch.setattr(torch.func, "vmap", None)  # needing it would give the warning of the loop, an error here
    case = build(model, seed=4)
    gram = gradient_gram(case.model, case.loss, case.points, case.points2)
    assert_agrees(gram, loop_gram(case.model, case.reference, case.points, case.points2))


def test_only_what_is_no_known_layer_goes_through_torch_func(monkeypatch):
    """A network with a parameter of its own beside known layers: one small gradient a point, not all of them."""
    seen = []
    plain = per_sample.pullback
    monkeypatch.setattr("stiffkit.gradients.pullback", lambda *args: seen.append(args[3]) or plain(*args))
    case = build("class token")
    gradient_gram(case.model, case.loss, case.points)
    (names,) = seen
    known = {name for name, m in case.model.named_modules() if type(m) in (nn.Linear, nn.LayerNorm, nn.Conv2d)}
    assert names
    assert not {name for name in names if name.rpartition(".")[0] in known}


@pytest.mark.parametrize("model", MODELS)
def test_norms_equal_the_loop(model):
    case, points = points_of(model)
    with {True: pytest.warns(UserWarning, match="torch.func"), False: nullcontext(), None: _silent()}[case.looped]:
        norms = gradient_norms(case.model, case.loss, points)
    expected = gradients(case.model, case.reference, points).norm(dim=1)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize(("frozen", "bias"), [("", True), ("", False), ("weight", True), ("bias", True)])
@pytest.mark.parametrize("positions", [2, 30])
def test_norms_of_short_and_of_long_sequences(positions, frozen, bias):
    """Of short ones from pairs of positions, of long ones from the gradients."""
    model = nn.Sequential(nn.Linear(20, 30, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(30 * positions, CLASSES))
    if frozen:
        getattr(model[0], frozen).requires_grad_(False)
    points = torch.randn(N, positions, 20), torch.arange(N) % CLASSES
    expected = gradient_gram(model, CROSS_ENTROPY, points).norms
    torch.testing.assert_close(gradient_norms(model, CROSS_ENTROPY, points), expected, rtol=1e-5, atol=0)
    some = gradient_norms(model, CROSS_ENTROPY, points, parameters=["3.bias"], max_memory=10_000)
    expected = gradient_gram(model, CROSS_ENTROPY, points, parameters=["3.bias"]).norms
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_norms_of_sequences_where_squares_leave_the_range_of_float32(size):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, CLASSES, bias=False)).double()
    model[1].weight.data *= size
    points = torch.randn(N, 2, 20), torch.randn(N, 2, CLASSES)

    def loss(z, y):
        return (z * y).flatten(1).sum(dim=1)

    expected = gradients(model, loss, (points[0].double(), points[1])).norm(dim=1)
    torch.testing.assert_close(gradient_norms(model.float(), loss, points), expected, rtol=1e-5, atol=0)


def test_norms_of_no_points():
    case = build("mlp")
    assert gradient_norms(case.model, case.loss, take(case.points, slice(0))).shape == (0,)


@pytest.mark.parametrize("model", ["mlp", "GRU", "class token", "tied embedding"])
def test_some_of_the_parameters(model):
    case = build(model, seed=2)
    names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    chosen = names[::2]
    G, H = (gradients(case.model, case.reference, points) for points in (case.points, case.points2))
    sizes = [p.numel() for p in case.model.parameters() if p.requires_grad]
    columns = torch.from_numpy(np.repeat([name in chosen for name in names], sizes))
    expected = reference_gram(G[:, columns], H[:, columns])
    with _silent():
        for parameters in (chosen, set(chosen), lambda name, p: name in chosen):
            gram = gradient_gram(case.model, case.loss, case.points, case.points2, parameters=parameters)
            assert_agrees(gram, expected)
    assert [name for name, p in case.model.named_parameters() if p.requires_grad] == names


def test_a_single_name_and_names_that_are_wrong():
    case = build("mlp")
    one = gradient_gram(case.model, case.loss, case.points, parameters="1.weight")
    assert_agrees(one, reference_gram(gradients(case.model, case.reference, case.points)[:, : 6 * 8]))
    with pytest.raises(ValueError, match=r"no trainable parameter is called '1\.weigth'; did you mean '1\.weight'"):
        gradient_gram(case.model, case.loss, case.points, parameters=["1.weigth"])
    with pytest.raises(ValueError, match=r"no parameter was chosen; there are 1\.weight"):
        gradient_gram(case.model, case.loss, case.points, parameters=lambda name, p: False)
    assert all(p.requires_grad for p in case.model.parameters())


def test_layers_are_named_after_the_module_that_owns_the_parameters():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Forward(lambda s, x: s.fc(x), fc=nn.Linear(5, CLASSES)))
    grams = gradient_gram(model, CROSS_ENTROPY, (torch.randn(N, 4), torch.arange(N) % CLASSES), by="layer")
    assert list(grams) == ["0", "2.fc"]
    assert all(isinstance(gram, GradientGram) for gram in grams.values())


sizes = st.integers(0, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=sizes, m=st.none() | sizes, features=st.integers(1, 5), classes=st.integers(1, 4), deep=st.booleans())
def test_shapes(n, m, features, classes, deep):
    torch.manual_seed(100 * n + features)
    layers = [nn.Linear(features, 3), nn.Tanh(), nn.Linear(3, classes)] if deep else [nn.Linear(features, classes)]
    model = nn.Sequential(*layers).double()
    sets = [
        (torch.randn(k, features, dtype=torch.float64), torch.randint(classes, (k,))) for k in (n, m) if k is not None
    ]
    gram = gradient_gram(model, CROSS_ENTROPY, *sets)
    rows, columns = sets[0], sets[-1]
    both = fitted_gram(model, concatenate(rows, columns))
    expected = type(both)(both.cos[:n, n:], both.norms[:n], both.norms2[n:])
    assert gram.cos.shape == (n, len(columns[1]))
    assert_agrees(gram, expected, torch.float64)
    assert int(gram.self_pairs.sum()) == (n if m is None else 0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(n=st.integers(0, 3), channels=st.integers(1, 3), size=st.integers(4, 7), stride=st.integers(1, 3))
def test_image_shapes(n, channels, size, stride):
    torch.manual_seed(n)
    model = nn.Sequential(nn.Conv2d(channels, 3, 3, stride, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = model.append(nn.Linear(12, CLASSES)).double()
    points = torch.randn(n, channels, size, size, dtype=torch.float64), torch.randint(CLASSES, (n,))
    assert_agrees(gradient_gram(model, CROSS_ENTROPY, points), fitted_gram(model, points), torch.float64)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_regression_in_closed_form(dtype):
    case = build("linear", n=30, dtype=dtype)
    (x, y), K = case.points, gradient_gram(case.model, CROSS_ENTROPY, case.points).dot
    x, residual = x.double(), to(case.model(x).detach(), torch.float64).softmax(1) - one_hot(y)
    torch.testing.assert_close(
        K, residual @ residual.T * (x @ x.T + 1), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("model", ["mlp", "stride, padding, groups, dilation, max-pool", "class token", "called twice"])
def test_mean_of_the_matrix_is_the_squared_gradient_of_the_mean_loss(model):
    case = build(model, n=20)
    inputs, targets = case.points
    parameters = list(case.model.parameters())
    mean = torch.autograd.grad(F.cross_entropy(case.model(inputs), targets), parameters)
    squared = sum(g.double().square().sum() for g in mean)
    torch.testing.assert_close(gradient_gram(case.model, case.loss, case.points).dot.mean(), squared, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_symmetric_and_positive_semidefinite(model):
    case, points = points_of(model, n=12)
    gram = gram_of(case, points)
    torch.testing.assert_close(gram.cos, gram.cos.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram.cos.diagonal(), (~gram.zero).double(), rtol=0, atol=1e-6)
    assert torch.linalg.eigvalsh(gram.cos).min() > -1e-5
    assert gram.cos.abs().max() < 1 + 1e-6


@pytest.mark.parametrize("model", ["mlp", "class token", "sorts the batch", "uneven convolutions", "GRU"])
def test_permuting_points_permutes_rows(model):
    case, points = points_of(model, n=9)
    order = torch.randperm(9)
    gram, permuted = gram_of(case, points), gram_of(case, take(points, order))
    torch.testing.assert_close(permuted.cos, gram.block(order, order).cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted.norms, gram.norms[order], rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [3.0, 1e6, 1e-6, 1e30, 1e-30, 1e-140, 1e60])
@pytest.mark.parametrize("model", ["mlp", "class token"])
def test_scaling_the_loss_leaves_sign_and_cosine_alone(model, factor):
    case = build(model)
    gram = gradient_gram(case.model, case.loss, case.points)
    scaled = gradient_gram(case.model, lambda z, y: factor * case.loss(z, y), case.points)
    torch.testing.assert_close(scaled.cos, gram.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled.norms, factor * gram.norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", ["nested", "class token", "circular and reflecting padding"])
def test_a_small_step_on_one_point_changes_the_loss_of_another(model):
    case = build(model, dtype=torch.float64)
    (inputs, targets), step = case.points, 1e-5
    G = gradients(case.model, case.reference, case.points)

    def losses_after(vector):
        moved = copy.deepcopy(case.model)
        with torch.no_grad():
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(moved.parameters()) + vector, moved.parameters()
            )
            return case.loss(moved(inputs), targets)

    changes = torch.stack([(losses_after(-step * g) - losses_after(step * g)) / 2 for g in G])
    torch.testing.assert_close(changes, -step * gram_of(case, case.points).dot, rtol=1e-5, atol=1e-5 * step)


@pytest.mark.parametrize("model", ["mlp", "class token", "batch norm in eval mode"])
def test_more_points_than_go_into_one_pass(model):
    case = build(model, n=300, m=270)
    gram = gradient_gram(case.model, case.loss, case.points, case.points2)
    assert_agrees(gram, loop_gram(case.model, case.reference, case.points, case.points2))


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("model", ["class token", "GRU"])
def test_little_free_memory_changes_nothing(model, sets, monkeypatch):
    case = build(model, n=17)
    plenty = gram_of(case, *[case.points, case.points2][:sets])
    size = sum(p.numel() for p in case.model.parameters())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=60 * size, total=60 * size))
    little = gram_of(case, *[case.points, case.points2][:sets])
    torch.testing.assert_close(little.cos, plenty.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(little.dot, plenty.dot, rtol=0, atol=1e-6 * float(plenty.dot.abs().max()))


class Reuses(nn.Module):
    """Copies every batch into the same memory before its first layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 50), nn.Linear(50, CLASSES)
        self.register_buffer("memory", torch.zeros(300, 6), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.memory[: len(x)] = x
        return self.b(self.a(self.memory[: len(x)]).tanh())


def test_a_model_that_writes_every_batch_into_the_same_memory():
    torch.manual_seed(0)
    model, points = Reuses(), (torch.randn(300, 6), torch.arange(300) % CLASSES)
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    with _silent():
        gram = gradient_gram(model, CROSS_ENTROPY, points, max_memory=2**20)
    assert_agrees(gram, loop_gram(plain, plain_cross_entropy, points, points))


@pytest.mark.parametrize("by", [None, "layer"])
def test_points_that_are_padding_alone(by):
    model = Forward(lambda s, x: s.b(s.a(x).mean(1)), a=nn.Embedding(5, 4, padding_idx=0), b=nn.Linear(4, CLASSES))
    points = torch.zeros(3, 6, dtype=torch.long), torch.arange(3)
    gram = gradient_gram(model, CROSS_ENTROPY, points, by=by)
    if by:
        assert gram["a"].zero.all()
        gram = gram["b"]
    assert_agrees(gram, reference_gram(gradients(model, plain_cross_entropy, points)))
    assert_agrees(
        gradient_gram(model, CROSS_ENTROPY, points, points), loop_gram(model, plain_cross_entropy, points, points)
    )


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("by", [None, "layer"])
@pytest.mark.parametrize("model", ["mlp", "class token", "sequences", "padded embedding", "batch norm in eval mode"])
def test_max_memory_changes_nothing(model, by, sets):
    case = build(model, n=17)
    points = [case.points, case.points2][:sets]
    plenty, little = (gradient_gram(case.model, case.loss, *points, by=by, max_memory=m) for m in (None, 4000))
    for key in plenty if by else [None]:
        a, b = (g[key] if by else g for g in (little, plenty))
        torch.testing.assert_close(a.cos, b.cos, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.norms, b.norms, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(a.norms2, b.norms2, rtol=1e-5, atol=1e-12)


def test_three_blocks_of_a_quarter_of_the_memory_are_there_at_a_time(monkeypatch):
    case, alive, most, rooms = build("sequences", n=17), weakref.WeakValueDictionary(), [], []

    def signals(*args):
        rooms.append(max(args[-1]))
        most.append(len(alive) + 1)
        alive[len(most)] = found = really(*args)
        return found

    really = stiffkit.signals.signals
    monkeypatch.setattr("stiffkit.gradients.signals", signals)
    gradient_gram(case.model, case.loss, case.points, case.points2, max_memory=4000)
    assert len(most) > 9
    assert max(most) <= 3
    assert max(rooms[1:]) <= 4000 / 4


@pytest.mark.parametrize("bytes_", [0, -1])
def test_memory_below_nothing_is_refused(bytes_):
    case = build("mlp")
    with pytest.raises(ValueError, match="max_memory must be a number of bytes above 0"):
        gradient_gram(case.model, case.loss, case.points, max_memory=bytes_)


@pytest.mark.parametrize("model", ["sequences", "stride, padding, groups, dilation, max-pool"])
def test_two_sets_of_different_sizes_in_many_slices(model, monkeypatch):
    case = build(model, n=17)
    monkeypatch.setattr("stiffkit.gradients.SLICE_BYTES", 1024)
    few = case.points2[0][:5], case.points2[1][:5]
    assert_agrees(gram_of(case, case.points, few), loop_gram(case.model, case.reference, case.points, few))


def test_two_sets_are_a_block_of_their_union():
    case = build("mlp")
    union = gradient_gram(case.model, case.loss, concatenate(case.points, case.points2))
    two = gradient_gram(case.model, case.loss, case.points, case.points2)
    torch.testing.assert_close(two.cos, union.block(slice(N), slice(N, None)).cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(two.norms2, union.norms[N:], rtol=1e-5, atol=0)


def test_the_same_call_gives_the_same_bits():
    case = build("stride, padding, groups, dilation, max-pool", n=20)
    first, second = (gradient_gram(case.model, case.loss, case.points) for _ in range(2))
    assert torch.equal(first.cos, second.cos)
    assert torch.equal(first.norms, second.norms)


# ------------------------------------------------------------------------------------------------------ fitted points

EXACT = {
    "module": (CROSS_ENTROPY, lambda t: t),
    "functional": (lambda z, y: F.cross_entropy(z, y, reduction="none"), lambda t: t),
    "stiffkit": (losses.cross_entropy, lambda t: t),
    "nll of log-softmax": (lambda z, y: F.nll_loss(F.log_softmax(z, -1), y, reduction="none"), lambda t: t),
    "nll module": (lambda z, y: nn.NLLLoss(reduction="none")(nn.LogSoftmax(dim=1)(z), y), lambda t: t),
    "gathered log-softmax": (lambda z, y: -pick(torch.log_softmax(z, 1), y), lambda t: t),
    "half of two": (lambda z, y: (CROSS_ENTROPY(z, y) + F.cross_entropy(z, y, reduction="none")) / 2, lambda t: t),
    "keywords": (lambda z, y: F.cross_entropy(input=z, target=y, reduction="none"), lambda t: t),
    "positions": (lambda z, y: F.cross_entropy(z, y, None, None, -100, None, "none"), lambda t: t),
    "a row at a time": (
        lambda z, y: torch.stack([F.cross_entropy(*pair) for pair in zip(z, y, strict=True)]),
        lambda t: t,
    ),
    "a batch of one at a time": (
        lambda z, y: torch.stack([F.cross_entropy(z[i : i + 1], y[i : i + 1], WEIGHT) for i in range(len(y))]),
        lambda t: t,
    ),
    "divergence": (
        lambda z, y: F.kl_div(F.log_softmax(z, 1), one_hot(y.cpu()).to(z.device), reduction="none").sum(1),
        lambda t: t,
    ),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"), lambda t: t * WEIGHT),
    "functional class weights": (lambda z, y: F.cross_entropy(z, y, WEIGHT, reduction="none"), lambda t: t * WEIGHT),
    "nll class weights": (
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, WEIGHT.to(z.device), reduction="none"),
        lambda t: t * WEIGHT,
    ),
    "ignored class": (
        nn.CrossEntropyLoss(ignore_index=2, reduction="none"),
        lambda t: t * torch.tensor([1.0, 1.0, 0.0]),
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
        lambda t: 0.9 * t + 0.1 / CLASSES,
    ),
    "weights and smoothing": (
        lambda z, y: F.cross_entropy(z, y, WEIGHT, label_smoothing=0.1, reduction="none"),
        lambda t: (0.9 * t + 0.1 / CLASSES) * WEIGHT,
    ),
}


@pytest.mark.parametrize("spelling", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fitted_points_to_a_gap_of_700(spelling, dtype):
    loss, mass = EXACT[spelling]
    z, y = logits_with_gap(FAR, CLASSES)
    model, points = logit_reader(CLASSES).to(dtype), (z.to(dtype), y)
    gram = gradient_gram(model, loss, points)
    assert_agrees(gram, fitted_gram(model, points, mass(one_hot(y))), dtype)


@pytest.mark.parametrize("targets", ["one-hot", "spread"])
def test_fitted_points_with_soft_targets(targets):
    z, y = logits_with_gap(FAR, CLASSES)
    t = {"one-hot": one_hot(y), "spread": torch.rand(len(z), CLASSES).softmax(1)}[targets].float()
    gram = gradient_gram(logit_reader(CLASSES), CROSS_ENTROPY, (z, t))
    assert_agrees(gram, fitted_gram(logit_reader(CLASSES), (z, y), t))


@pytest.mark.parametrize("scale", [1, 16, 64, 128])
def test_confidence_of_a_deep_network_touches_neither_sign_nor_cosine(scale):
    model, points = dyadic_mlp(scale)
    gram = gradient_gram(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), points)
    assert_agrees(gram, fitted_gram(model, points))
    assert scale < 128 or gram.norms.min() < 1e-60


def test_confidence_of_a_network_that_goes_whole():
    model, (x, y) = dyadic_mlp(64)
    model = Forward(lambda s, x: s.inner(x) * s.scale, inner=model, scale=nn.Parameter(torch.ones(4)))
    assert_agrees(gradient_gram(model, CROSS_ENTROPY, (x, y)), fitted_gram(model, (x, y)))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_cross_entropy_of_changed_logits(temperature):
    """A temperature, and a class that is not allowed."""
    z, y = logits_with_gap(GAPS, CLASSES)

    def loss(z, y):
        z = torch.cat([z / temperature, z[:, :1].detach()], 1)
        return F.cross_entropy(z.masked_fill(torch.tensor([False] * CLASSES + [True]), -torch.inf), y, reduction="none")

    gram = gradient_gram(logit_reader(CLASSES), loss, (z, y))
    scaled = fitted_gram(logit_reader(CLASSES), (z, y), temperature=temperature)
    assert_agrees(gram, scaled)


def test_a_network_trained_to_a_loss_of_one_in_a_hundred_thousand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4))
    x, y = torch.randn(40, 10), torch.arange(40) % 4
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    while (loss := F.cross_entropy(model(x), y)) > 1e-5:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_agrees(gradient_gram(model, CROSS_ENTROPY, (x, y)), fitted_gram(model, (x, y)))


def test_fitted_tokens():
    """Outputs (n, T, classes), one loss a sample over its tokens, padding ignored."""
    torch.manual_seed(0)
    z, y = logits_with_gap(torch.linspace(30, 100, 12).tolist(), CLASSES)
    z, y = z.view(3, 4, CLASSES), y.view(3, 4).clone()
    y[1, 2:] = -100
    gram = gradient_gram(
        logit_reader(CLASSES),
        lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(1),
        (z, y),
    )
    G = torch.zeros(3, CLASSES * (CLASSES + 1), dtype=torch.float64)
    for i, t in (y != -100).nonzero().tolist():
        direction, length = softmax_gradient(z[i, t].tolist(), one_hot(y[i, t]).tolist())
        G[i] += length * torch.outer(direction, torch.cat([z[i, t].double(), torch.ones(1)])).flatten()
    assert_agrees(gram, reference_gram(G))


@pytest.mark.parametrize("gap", [-30.0, 5.0, 20.0, 50.0, 300.0])
def test_last_layer_is_stiff_within_a_class_at_any_confidence(gap):
    torch.manual_seed(0)
    body, x, y = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(12, 6), torch.arange(12) % CLASSES
    model = nn.Sequential(*body, nn.Linear(8, CLASSES))
    with torch.no_grad():
        model[2].weight.mul_(gap)
    last = gradient_gram(model, CROSS_ENTROPY, (x, y), by="layer")["2"]
    assert (stiffness(last, "sign")[(y[:, None] == y) & ~last.self_pairs] == 1).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: -pick(z.softmax(1), y).log(),
        lambda z, y: -pick(F.softmax(z, dim=1), y).log(),
        lambda z, y: z.logsumexp(1) - pick(z, y),
    ],
)
def test_losses_that_cancel_are_named_by_a_warning(loss):
    fitted, ordinary = (logits_with_gap(gaps, CLASSES) for gaps in ([50.0, 50.0, 50.0], [2.0, 1.0, 0.0]))
    with pytest.warns(UserWarning, match=r"(?i)cancel|precision|digits|float64"):
        gradient_gram(logit_reader(CLASSES), loss, fitted)
    assert_agrees(gradient_gram(logit_reader(CLASSES), loss, ordinary), fitted_gram(logit_reader(CLASSES), ordinary))


@pytest.mark.parametrize("gaps", [[[50.0], [60.0]], [[36.0, 37.0, 38.0], [38.0, 37.0, 36.0]]])
def test_fitted_binary_cross_entropy_is_exact_or_named_by_a_warning(gaps):
    z, loss = torch.tensor(gaps), lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gram = gradient_gram(logit_reader(z.shape[1]), loss, (z, torch.ones_like(z)))
    if not any("cancel" in str(warning.message) for warning in seen):
        g, features = -(-z.double()).sigmoid(), torch.cat([z, torch.ones(len(z), 1)], 1).double()
        assert_agrees(gram, reference_gram((g[:, :, None] * features[:, None]).flatten(1)))


def test_a_loss_that_does_not_cancel_gives_no_warning():
    """The log-sigmoid of PyTorch keeps its digits."""
    z = torch.tensor([[50.0], [3.0]])
    gram = gradient_gram(logit_reader(1), lambda z, t: -F.logsigmoid(z)[:, 0], (z, torch.ones(2)))
    g, features = -(-z.double()).sigmoid(), torch.cat([z, torch.ones(len(z), 1)], 1).double()
    assert_agrees(gram, reference_gram(g * features))


def test_the_warning_comes_once_and_counts_the_points():
    z, y = logits_with_gap([60.0, 1.0, 2.0, 50.0, 1.0, 3.0, 70.0], CLASSES)
    with pytest.warns(UserWarning, match="(?i)cancel") as seen:
        gradient_gram(logit_reader(CLASSES), lambda z, y: z.logsumexp(1) - pick(z, y), (z, y))
    assert len(seen) == 1
    assert "3 of 7" in str(seen[0].message)


def test_ignored_tokens_may_have_any_logits():
    """The first class is not allowed, and padding is ignored: PyTorch's loss is 0 there, not NaN."""
    z, y = torch.randn(3, 4, CLASSES), torch.tensor([[1, 2, -100, -100], [2, 1, 1, -100], [1, 1, 2, 2]])

    def loss(z, y):
        z = torch.cat([torch.full_like(z[..., :1], -torch.inf), z[..., 1:]], -1)
        return F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(1)

    gram = gradient_gram(logit_reader(CLASSES), loss, (z, y))

    def of_the_others(z, y):
        return F.cross_entropy(z[..., 1:].transpose(1, 2), y.where(y < 0, y - 1), reduction="none").sum(1)

    assert_agrees(gram, loop_gram(logit_reader(CLASSES), of_the_others, (z, y)))


def test_a_perfect_fit_has_a_zero_gradient_and_no_warning():
    gram = gradient_gram(logit_reader(2), losses.mse, (torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 1])))
    assert gram.zero.tolist() == gram.zero2.tolist() == [True, False]
    assert gram.cos.tolist() == [[0, 0], [0, 1]]


# --------------------------------------------------------------------------------------------- the losses' arithmetic


def test_float32_loss_keeps_its_arithmetic():
    z, y = logits_with_gap([0.0, 1.0, 4.0, 20.0, 40.0, 80.0, -20.0], CLASSES)
    gram = gradient_gram(logit_reader(CLASSES), losses.cross_entropy_float32, (z, y))
    fused = (z.softmax(1) - one_hot(y).float()).double()
    features = torch.cat([z, torch.ones(len(z), 1)], 1).double()
    assert_agrees(gram, reference_gram((fused[:, :, None] * features[:, None]).flatten(1)))


def test_keras2019_has_no_gradient_past_the_gap():
    z, y = logits_with_gap([0.0, 4.0, -4.0, -15.0, 15.0, 17.0, 30.0, 90.0, -17.0, -60.0], CLASSES)
    gram = gradient_gram(logit_reader(CLASSES), losses.cross_entropy_keras2019, (z, y))
    exact = gradient_gram(logit_reader(CLASSES), losses.cross_entropy, (z, y))
    assert gram.zero.tolist() == [False] * 5 + [True] * 5
    torch.testing.assert_close(gram.cos[:4, :4], exact.cos[:4, :4], rtol=0, atol=1e-5)
    assert not gram.cos[5:].any()
    assert not gram.cos[:, 5:].any()
    assert not gram.norms[5:].any()


# ---------------------------------------------------------------------------------------------------- inputs, outputs


class Scores(NamedTuple):
    logits: torch.Tensor
    other: torch.Tensor


def two_heads():
    torch.manual_seed(0)
    return Forward(lambda s, x: Scores(s.a(x), s.b(x).tanh()), a=nn.Linear(4, CLASSES), b=nn.Linear(4, 2)), (
        torch.randn(N, 4),
        torch.arange(N) % CLASSES,
    )


def test_a_loss_function_gets_the_outputs_as_they_are():
    model, points = two_heads()
    seen = []

    def loss(outputs, y):
        seen.append({leaf.dtype for leaf in outputs})
        return F.cross_entropy(outputs[0], y, reduction="none") + outputs[1].square().sum(1)

    gram = gradient_gram(model, loss, points)
    both = Forward(lambda s, x: torch.cat(s.inner(x), 1), inner=model)
    reference = lambda z, y: F.cross_entropy(z[:, :CLASSES], y, reduction="none") + z[:, CLASSES:].square().sum(1)  # noqa: E731
    assert_agrees(gram, loop_gram(both, reference, points))
    assert set().union(*seen) == {torch.float64}


def test_a_loss_module_gets_the_logits():
    model, points = two_heads()
    gram = gradient_gram(model, CROSS_ENTROPY, points)
    assert_agrees(gram, loop_gram(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), points))


def test_a_tuple_of_outputs():
    model, points = two_heads()
    plain = Forward(lambda s, x: tuple(s.inner(x)), inner=model)
    gram = gradient_gram(plain, lambda outputs, y: F.cross_entropy(outputs[0], y, reduction="none"), points)
    torch.testing.assert_close(gram.cos, gradient_gram(model, CROSS_ENTROPY, points).cos, rtol=0, atol=1e-6)


def test_regression_with_one_output():
    model, x, t = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(N, 3), torch.randn(N)
    gram = gradient_gram(model, lambda z, t: (z[:, 0] - t) ** 2, (x, t))
    assert_agrees(gram, loop_gram(model, lambda z, t: (z[:, 0] - t) ** 2, (x, t)))


def test_strided_and_expanded_inputs():
    case = build("mlp")
    x, y = torch.randn(3, 2, 2 * N).permute(2, 1, 0)[::2], torch.zeros(1, dtype=torch.int64).expand(N)
    gram = gradient_gram(case.model, case.loss, (x, y))
    same = gradient_gram(case.model, case.loss, (x.contiguous(), y.clone()))
    torch.testing.assert_close(gram.cos, same.cos, rtol=0, atol=1e-6)


def test_a_batch_of_a_data_loader():
    case = build("mlp")
    batch = next(iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*case.points), batch_size=N)))
    assert torch.equal(
        gradient_gram(case.model, case.loss, batch).cos, gradient_gram(case.model, case.loss, case.points).cos
    )


def test_copies_of_a_point_are_points():
    case = build("mlp")
    doubled = take(case.points, torch.tensor([0, 1, 1, 2]))
    gram = gradient_gram(case.model, case.loss, doubled)
    assert gram.self_pairs.tolist() == torch.eye(4, dtype=torch.bool).tolist()
    torch.testing.assert_close(gram.cos[1, 2], torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", [None, "layer"])
@pytest.mark.parametrize("model", ["mlp", "class token", "BERT", "GRU", "dict inputs"])
@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 4), (4, 0), (0, 0)])
def test_empty_sets(model, n, m, by):
    need(model)
    case = build(model, n=n, m=m or 0)
    with _silent():
        grams = gradient_gram(case.model, case.loss, case.points, *([case.points2] if m is not None else []), by=by)
    for gram in grams.values() if by else [grams]:
        assert gram.cos.shape == gram.dot.shape == gram.self_pairs.shape == (n, m or 0)
        assert (gram.norms.shape, gram.norms2.shape, gram.zero.shape) == ((n,), (m or 0,), (n,))


def test_dead_network_has_zero_gradients():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, CLASSES, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-1)
    x, y = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [2, 0, 1]]), torch.tensor([0, 1, 2])
    gram = gradient_gram(model, CROSS_ENTROPY, (x, y))
    assert gram.zero.tolist() == gram.zero2.tolist() == [True, False, True]
    assert gram.cos.tolist() == [[0, 0, 0], [0, pytest.approx(1), 0], [0, 0, 0]]
    assert gram.norms.tolist()[::2] == [0, 0]


# ------------------------------------------------------------------------------------------------------------- blocks


def test_a_block_keeps_everything():
    case = build("mlp", "ignored class", n=9)
    gram = gradient_gram(case.model, case.loss, case.points)
    rows, columns = torch.tensor([4, 0, 4]), [7, 4]
    block = gram.block(rows, columns)
    for name in ("cos", "dot", "self_pairs"):
        assert torch.equal(getattr(block, name), getattr(gram, name)[rows][:, columns])
    assert torch.equal(block.norms, gram.norms[rows])
    assert torch.equal(block.norms2, gram.norms2[columns])
    assert torch.equal(block.zero, gram.zero[rows])
    assert torch.equal(block.zero2, gram.zero2[columns])


def test_self_pairs_of_blocks():
    case = build("mlp")
    gram = gradient_gram(case.model, case.loss, case.points)
    assert gram.block([0, 2, 2], [2, 0]).self_pairs.tolist() == [[False, True], [True, False], [True, False]]
    assert gram.block([2, 2], [2, 2]).self_pairs.all()
    assert not gram.block(slice(0, 2), slice(2, None)).self_pairs.any()
    assert gram.block([-1], [N - 1]).self_pairs.all()
    assert gram.block(slice(1, 4), slice(1, 4)).block([2], [2, 1]).self_pairs.tolist() == [[True, False]]
    assert gram.block([], slice(None)).cos.shape == (0, N)


def test_a_block_of_two_sets_has_no_self_pairs():
    case = build("mlp")
    block = gradient_gram(case.model, case.loss, case.points, case.points2).block([1, 1], [1, 0])
    assert block.cos.shape == (2, 2)
    assert not block.self_pairs.any()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: CROSS_ENTROPY(z, y).mean(),
    ],
)
@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("model", ["mlp", "class token", "GRU"])
def test_mean_and_scalar_losses_are_refused(model, loss, n):
    case = build(model, n=n)
    with pytest.raises(REFUSED, match='reduction="none"'):
        gradient_gram(case.model, loss, case.points)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: CROSS_ENTROPY(z, y)[:, None],
        lambda z, y: F.mse_loss(z, one_hot(y), reduction="none"),
        lambda z, y: CROSS_ENTROPY(z, y)[None],
        lambda z, y: CROSS_ENTROPY(z, y)[:-1],
        lambda z, y: CROSS_ENTROPY(z, y).mean(0, keepdim=True),
        lambda z, y: CROSS_ENTROPY(z, y).sum().item(),
        lambda z, y: None,
    ],
)
@pytest.mark.parametrize("n", [2, N])
def test_losses_of_a_wrong_shape_are_refused(loss, n):
    case = build("mlp", n=n)
    with pytest.raises(REFUSED, match=r"\(n,\)|one loss|shape|tensor"):
        gradient_gram(case.model, loss, case.points)


def dropping(**members):
    return Forward(lambda s, x: s.b(s.a(x)[0][:, -1]), **members, b=nn.Linear(4, CLASSES))


NOT_IN_TRAINING = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)), (4,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES)), (4,)),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(4, 5), nn.AlphaDropout(0.5), nn.Linear(5, CLASSES)), (4,)),
    "2d dropout": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(27, CLASSES)),
        (1, 4, 4),
    ),
    "transformer": (
        lambda: nn.Sequential(transformer(4, batch_first=True), nn.Flatten(), nn.Linear(12, CLASSES)),
        (3, 4),
    ),
    "attention": (
        lambda: Forward(
            lambda s, x: s.b(s.a(x, x, x)[0][:, -1]),
            a=nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
            b=nn.Linear(4, CLASSES),
        ),
        (3, 4),
    ),
    "recurrent dropout": (lambda: dropping(a=nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)), (3, 4)),
    "functional dropout": (
        lambda: Forward(lambda s, x: s.a(F.dropout(x, 0.5, training=s.training)), a=nn.Linear(4, CLASSES)),
        (4,),
    ),
}


@pytest.mark.parametrize("kind", NOT_IN_TRAINING)
def test_train_mode_is_refused_with_advice(kind):
    make, shape = NOT_IN_TRAINING[kind]
    with pytest.raises(REFUSED, match=r"eval\(\)"):
        gradient_gram(make().train(), CROSS_ENTROPY, (torch.randn(N, *shape), torch.arange(N) % CLASSES))


def test_train_mode_that_changes_nothing_is_accepted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.0), nn.Dropout(0.5), nn.Linear(5, CLASSES))
    points = torch.randn(N, 4), torch.arange(N) % CLASSES
    model.train()[1].eval()
    model[3].eval()
    gram = gradient_gram(model, CROSS_ENTROPY, points)
    assert_agrees(gram, loop_gram(model.eval(), lambda z, y: F.cross_entropy(z, y, reduction="none"), points))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["mlp", "class token"])
def test_points_without_a_finite_loss_are_named(model, value):
    case = build(model, n=12)
    case.points[0][torch.tensor([7, 11])] = value
    with pytest.raises(REFUSED, match=r"7.*11"):
        gradient_gram(case.model, case.loss, case.points)


def test_points_of_the_second_set_without_a_finite_loss_are_named():
    case = build("mlp", m=12)
    case.points2[0][9, 0, 0] = float("nan")
    with pytest.raises(REFUSED, match=r"9"):
        gradient_gram(case.model, case.loss, case.points, case.points2)


def test_an_infinite_loss_of_finite_outputs_is_named():
    loss = lambda z, y: CROSS_ENTROPY(z, y) / (torch.arange(len(y)) != 3)  # noqa: E731
    case = build("mlp")
    with pytest.raises(REFUSED, match="3"):
        gradient_gram(case.model, loss, case.points)


MIXING = {
    "centred": lambda s, x: s.a(x - x.mean(0)),
    "a little": lambda s, x: s.a(x + 1e-2 * x.mean(0)),
    "scaled by the largest": lambda s, x: s.a(x / x.abs().max()),
    "softmax over points": lambda s, x: s.a(x.softmax(0)),
    "cumulated": lambda s, x: s.a(x).cumsum(0),
    "shifted": lambda s, x: s.a(x).roll(1, 0),
    "last layer": lambda s, x: s.a(x) - s.a(x).mean(0),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("n", [2, N])
def test_forward_that_mixes_samples_is_refused(kind, n):
    model = Forward(MIXING[kind], a=nn.Linear(4, CLASSES))
    with pytest.raises(REFUSED, match=r"(?i)mix|other|batch|depend"):
        gradient_gram(model, CROSS_ENTROPY, (torch.randn(n, 4), torch.arange(n) % CLASSES))


def test_forward_that_mixes_samples_is_refused_for_one_point_against_many():
    model, x, y = Forward(MIXING["centred"], a=nn.Linear(4, CLASSES)), torch.randn(N, 4), torch.arange(N) % CLASSES
    for sets in ([(x[:1], y[:1]), (x, y)], [(x, y), (x[:1], y[:1])]):
        with pytest.raises(REFUSED, match=r"(?i)mix|other|batch|depend"):
            gradient_gram(model, CROSS_ENTROPY, *sets)


MIXERS = {
    "attention over points": (
        lambda: nn.Sequential(transformer(4, batch_first=False), nn.Flatten(), nn.Linear(12, CLASSES)),
        (3, 4),
    ),
    "batch norm without running statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, CLASSES)),
        (4,),
    ),
    "recurrent over points": (
        lambda: Forward(lambda s, x: s.b(s.a(x)[0][:, -1]), a=nn.GRU(4, 4), b=nn.Linear(4, CLASSES)),
        (3, 4),
    ),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_modules_that_mix_samples_are_refused(kind):
    make, shape = MIXERS[kind]
    with pytest.raises(REFUSED, match=r"(?i)mix|other|batch|depend"):
        gradient_gram(make().eval(), CROSS_ENTROPY, (torch.randn(N, *shape), torch.arange(N) % CLASSES))


def test_a_network_without_trainable_parameters_is_refused():
    case = build("mlp")
    with pytest.raises(REFUSED, match=r"(?i)parameter|requires_grad"):
        gradient_gram(case.model.requires_grad_(False), case.loss, case.points)
    with pytest.raises(REFUSED, match=r"(?i)parameter|requires_grad"):
        gradient_gram(nn.ReLU(), case.loss, (torch.randn(N, CLASSES), case.points[1]))


@pytest.mark.parametrize("model", ["mlp", "dict inputs", "tuple inputs"])
def test_inputs_and_targets_of_different_lengths_are_refused(model):
    case = build(model)
    for points in ((case.points[0], case.points[1][:-1]), (case.points[0], case.points2[1][:1])):
        with pytest.raises(REFUSED, match=f"{N}"):
            gradient_gram(case.model, case.loss, points)
        with pytest.raises(REFUSED, match=f"{N}"):
            gradient_gram(case.model, case.loss, case.points2, points)


def test_inputs_of_different_lengths_are_refused():
    case = build("tuple inputs")
    (x, k), y = case.points
    with pytest.raises(REFUSED):
        gradient_gram(case.model, case.loss, ((x, k[:-1]), y))


def test_unknown_grouping_is_refused():
    case = build("mlp")
    with pytest.raises(REFUSED, match="layer"):
        gradient_gram(case.model, case.loss, case.points, by="block")


# ------------------------------------------------------------------------------------------------------ left as found


def state(model):
    """Everything of a model and of the process that a measurement could touch."""
    hooks = lambda module: {k: dict(v) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)}  # noqa: E731
    return {
        "parameters": {k: (id(p), p.data_ptr(), p.requires_grad, p.is_leaf) for k, p in model.named_parameters()},
        "values": {k: p.detach().clone() for k, p in model.named_parameters()},
        "grad": {k: (id(p.grad), None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()},
        "buffers": {k: (id(b), b.clone()) for k, b in model.named_buffers()},
        "modules": {k: (id(m), type(m), m.training, sorted(vars(m)), hooks(m)) for k, m in model.named_modules()},
        "generators": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
        "process": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
    }


def assert_same(before, after):
    for name in before:
        torch.testing.assert_close(
            _comparable(after[name]),
            _comparable(before[name]),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def _comparable(tree):
    """Tensors stay; everything else becomes one string."""
    if isinstance(tree, torch.Tensor):
        return tree
    if isinstance(tree, dict):
        return {str(k): _comparable(v) for k, v in tree.items()} or {"": torch.zeros(0)}
    if isinstance(tree, tuple) and any(isinstance(leaf, torch.Tensor) for leaf in tree):
        return tuple(_comparable(leaf) for leaf in tree)
    return torch.tensor(list(repr(tree).encode()))


def used(case):
    """A model in the middle of its life: gradients, hooks, mixed training flags, a frozen parameter."""
    model = case.model
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    model.register_forward_hook(lambda module, args, output: None)
    next(model.children(), model).register_full_backward_hook(lambda module, grad_input, grad_output: None)
    next(model.children(), model).training ^= True
    return model


UNTOUCHED = [
    "linear",
    "mlp",
    "batch norm in eval mode",
    "weight norm",
    "frozen weight",
    "class token",
    "two modules, one weight",
    "one module in two places",
    "one module under two names",
    "hook that changes an output",
    "GRU",
    "experts",
]


@pytest.mark.parametrize("by", [None, "layer"])
@pytest.mark.parametrize("model", UNTOUCHED)
def test_the_model_is_left_as_found(model, by):
    case = build(model)
    before = state(used(case))
    with _silent():
        gradient_gram(case.model, case.loss, case.points, case.points2, by=by)
    assert_same(before, state(case.model))


class Interrupted(Exception):  # noqa: N818
    pass


def interrupt(*_):
    raise Interrupted


@pytest.mark.parametrize("where", ["loss", "forward", "second set", "nan", "shape", "backward", "later"])
@pytest.mark.parametrize("model", UNTOUCHED)
def test_the_model_is_left_as_found_after_an_exception(model, where):
    case = build(model)
    before_hooks = used(case)
    loss, sets = case.loss, [case.points, case.points2]
    if where == "loss":
        loss = interrupt
    if where == "forward":
        before_hooks.register_forward_hook(interrupt)
    if where == "second set":
        sets[1] = (torch.randn(3, 1, 1, 1, 1), torch.zeros(3, dtype=torch.int64))
    if where == "nan":
        loss = lambda z, y: case.loss(z, y) * float("nan")  # noqa: E731
    if where == "shape":
        loss = lambda z, y: case.loss(z, y).mean()  # noqa: E731
    if where == "backward":
        loss = lambda z, y: Backward.apply(case.loss(z, y))  # noqa: E731
    if where == "later":
        calls = []
        loss = lambda z, y: interrupt() if len(calls) > 1 else calls.append(1) or case.loss(z, y)  # noqa: E731
    before = state(case.model)
    with _silent():
        if where == "later":
            with suppress(Interrupted):
                gradient_gram(case.model, loss, *sets)
        else:
            with pytest.raises((*REFUSED, Interrupted, RuntimeError)):
                gradient_gram(case.model, loss, *sets)
    assert_same(before, state(case.model))


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, v):
        raise Interrupted


class Counting(nn.Module):
    """Counts its calls in a buffer, as batch norm does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)])
def test_buffers_that_forward_changes_are_restored(layer):
    model = nn.Sequential(Counting(layer), nn.Tanh(), nn.Flatten(), nn.Linear(3, CLASSES))
    x = torch.randn(N, 4) if isinstance(layer, nn.Linear) else torch.randn(N, 4, 1)
    before = state(model)
    with _silent():
        gradient_gram(model, CROSS_ENTROPY, (x, torch.arange(N) % CLASSES))
    assert_same(before, state(model))


@pytest.mark.parametrize("where", ["forward", "loss"])
def test_what_draws_random_numbers_is_refused_and_the_generator_left_as_found(where):
    """Also where nothing depends on them: two points cannot show that."""
    layer = nn.Linear(4, CLASSES)
    model = Forward(lambda s, x: s.a(x + 0 * torch.rand(len(x), 4)), a=layer) if where == "forward" else layer
    loss = CROSS_ENTROPY if where == "forward" else lambda z, y: CROSS_ENTROPY(z, y) + 0 * torch.rand(len(y))
    points, before = (torch.ones(N, 4), torch.arange(N) % CLASSES), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"random numbers.*eval"):
        gradient_gram(model, loss, points)
    assert torch.equal(torch.get_rng_state(), before)


def test_points_are_left_as_found():
    case = build("mlp")
    x, y = case.points[0].requires_grad_(), case.points[1]
    before = x.detach().clone()
    gram = gradient_gram(case.model, case.loss, (x, y))
    assert x.grad is None
    assert torch.equal(x, before)
    assert not gram.cos.requires_grad
    assert not gram.norms.requires_grad


@pytest.mark.parametrize(
    "model", ["mlp", "class token", "GRU", "experts", "stride, padding, groups, dilation, max-pool"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(model, mode):
    case = build(model)
    expected = gram_of(case, case.points)
    with mode():
        inside = gram_of(case, case.points)
        made_inside = gram_of(case, take(case.points, torch.arange(N)))
    afterwards = gram_of(case, case.points)
    for gram in (inside, made_inside, afterwards):
        torch.testing.assert_close(gram.cos, expected.cos, rtol=0, atol=1e-6)
        assert not gram.cos.is_inference() or mode is torch.inference_mode


@pytest.mark.parametrize("model", ["mlp", "class token", "GRU"])
def test_points_made_in_inference_mode(model):
    case = build(model)
    expected = gram_of(case, case.points)
    with torch.inference_mode():
        points = take(case.points, torch.arange(N))
    torch.testing.assert_close(gram_of(case, points).cos, expected.cos, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ larger models

# Networks of others, whole


def gpt2():
    """Tied embeddings, one loss a sequence."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 60, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(0, 60, (N, 10))

    def loss(output, targets):
        z = getattr(output, "logits", output)[:, :-1].transpose(1, 2)
        return F.cross_entropy(z, targets[:, 1:], reduction="none").mean(1)

    return model, loss, ({"input_ids": tokens}, tokens)


def vit():
    """Attention in `nn.MultiheadAttention`, a class token and positions that forward uses itself."""
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model = import_torchvision().models.VisionTransformer(**sizes, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zero as it comes: no gradient would reach the layers below
    return model, CROSS_ENTROPY, (torch.randn(N, 3, 16, 16), torch.arange(N) % CLASSES)


def gru():
    def forward(s, x):
        return s.out(s.gru(s.embedding(x))[0][:, -1])

    parts = {"embedding": nn.Embedding(30, 8), "gru": nn.GRU(8, 12, batch_first=True), "out": nn.Linear(12, CLASSES)}
    return Forward(forward, **parts), CROSS_ENTROPY, (torch.randint(0, 30, (N, 7)), torch.arange(N) % CLASSES)


def mobilenet():
    model = import_torchvision().models.mobilenet_v2(num_classes=CLASSES, width_mult=0.25)
    return model, CROSS_ENTROPY, (torch.randn(N, 3, 32, 32), torch.arange(N) % CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("network", [gpt2, vit, gru, mobilenet])
def test_networks_of_others(network):
    import_torchvision()  # before transformers, which imports it too
    torch.manual_seed(0)
    model, loss, points = network()
    model.eval()
    with _silent():
        gram = gradient_gram(model, loss, points)
        norms = gradient_norms(model, loss, points)
    assert_agrees(gram, loop_gram(model, loss, points))
    torch.testing.assert_close(norms, gram.norms, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_resnet18():
    try:
        torchvision = import_torchvision()
    except ImportError as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=CLASSES), torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 32, 32))
    points = x, torch.arange(6) % CLASSES
    gram = gradient_gram(model.eval(), CROSS_ENTROPY, points)
    assert_agrees(gram, loop_gram(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), points))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("network", [gpt2, vit, gru, mobilenet])
def test_cuda_networks_of_others(network):
    """In eval mode, in which cuDNN refuses a backward pass through recurrent layers."""
    import_torchvision()
    torch.manual_seed(0)
    model, loss, points = network()
    expected = loop_gram(model.eval(), loss, points)
    with _silent():
        gram = gradient_gram(model.to("cuda"), loss, to(points, "cuda"))
    assert torch.backends.cudnn.enabled
    assert_agrees(gram, expected)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("model", MODELS)
def test_cuda_equals_the_loop(model):
    need(model)
    case = build(model, "class weights")
    expected = loop_gram(case.model, case.reference, case.points, case.points2)
    case.model.to("cuda")
    with _silent():
        gram = gradient_gram(case.model, case.loss, to(case.points, "cuda"), to(case.points2, "cuda"))
    assert gram.cos.device.type == gram.norms2.device.type == gram.self_pairs.device.type == "cpu"
    assert_agrees(gram, expected)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("spelling", EXACT)
def test_cuda_fitted_points(spelling):
    loss, mass = EXACT[spelling]
    z, y = logits_with_gap(FAR, CLASSES)
    expected = fitted_gram(logit_reader(CLASSES), (z, y), mass(one_hot(y)))
    assert_agrees(gradient_gram(logit_reader(CLASSES).cuda(), loss, (z.cuda(), y.cuda())), expected)
