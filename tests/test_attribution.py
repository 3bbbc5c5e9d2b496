"""What stiffness is made of: held to loops over pairs of explicit gradients, in float64."""

import numpy as np
import pytest
import torch
from oracles import gradients, logit_reader
from torch import nn

from stiffkit.attribution import PAIRS, whole
from stiffkit.endpoints import clipped_misfit, clipped_prediction
from stiffkit.gradients import gradient_gram
from stiffkit.losses import cross_entropy, cross_entropy_keras2019, mse
from stiffkit.measurement import ARITHMETICS, REGIMES, measure

pytestmark = pytest.mark.usefixtures("one_thread")

N, M = 30, 24
ROWS = {"train": range(N), "val": range(N, N + M)}
LAYERS = {1: slice(0, 40), 2: slice(40, 67)}  # of a gradient that is laid out flat


class Case:
    """A network with large outputs, so that most points are clipped; its gradients, one by one."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(generator=generator)
            self.model[2].weight *= 8
        x = torch.randn(N + M, 4, generator=generator, dtype=torch.float64)
        z = self.model(x).detach()
        noise = torch.randint(0, 3, (N + M,), generator=generator)
        self.y = torch.where(torch.rand(N + M, generator=generator) < 0.7, z.argmax(1), noise)
        self.points = x, self.y
        self.G = {"exact": gradients(self.model, cross_entropy, self.points)}  # held to closed forms elsewhere
        self.G["keras2019"] = gradients(self.model, cross_entropy_keras2019, self.points)
        self.right = (z.argmax(1) == self.y).numpy()
        others = z.scatter(1, self.y[:, None], -torch.inf).logsumexp(1)
        self.gap = (z.gather(1, self.y[:, None])[:, 0] - others).numpy()
        parts = (x[:N], self.y[:N]), (x[N:], self.y[N:])
        self.found = measure(self.model, *parts, tuple(ARITHMETICS), errors=False, attribution=True)

    def pairs(self, regime, same):
        """Ordered pairs of one regime, of one class or of two, without those of a point with itself."""
        rows, columns = (ROWS[part] for part in regime.split("-"))
        return [(i, j) for i in rows for j in columns if i != j and (self.y[i] == self.y[j]) == same]

    def macro(self, value, regime, same):
        """The mean over class pairs of the mean over their pairs; pairs of value None are left out."""
        cells = {}
        for i, j in self.pairs(regime, same):
            if (v := value(i, j)) is not None:
                cells.setdefault((int(self.y[i]), int(self.y[j])), []).append(v)
        return np.mean([np.mean(values) for values in cells.values()])


def cosine(a, b, padding=0.0):
    size = float(((a @ a + padding) * (b @ b + padding)).sqrt())
    return float(a @ b) / size if size else 0.0


@pytest.fixture(scope="module")
def case(one_thread):
    case = Case()
    zero = (case.G["keras2019"] == 0).all(1)
    assert 0.2 < zero.double().mean() < 0.8, "some are clipped, not all"
    assert 0.1 < case.right.mean() < 0.9
    return case


each = [pytest.mark.parametrize("regime", REGIMES), pytest.mark.parametrize("kind", ["within", "between"])]


def of_each(test):
    for mark in each:
        test = mark(test)
    return test


@of_each
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_by_themselves_and_their_shares(case, regime, kind, layer):
    G, part = case.G["exact"], LAYERS[layer]
    here, same = case.found.sel(regime=regime, layer=layer), kind == "within"
    sign = case.macro(lambda i, j: np.sign(float(G[i, part] @ G[j, part])), regime, same)
    assert float(here[f"layer_{kind}"].sel(measure="sign")) == pytest.approx(sign, abs=1e-9)
    own = case.macro(lambda i, j: cosine(G[i, part], G[j, part]), regime, same)
    assert float(here[f"layer_{kind}"].sel(measure="cos")) == pytest.approx(own, abs=1e-9)
    share = case.macro(lambda i, j: float(G[i, part] @ G[j, part] / G[i].norm() / G[j].norm()), regime, same)
    assert float(here[f"share_{kind}"]) == pytest.approx(share, abs=1e-9)


@of_each
def test_shares_add_up_to_the_cosine(case, regime, kind):
    here = case.found.sel(regime=regime)
    cos = here[kind].sel(arithmetic="exact", measure="cos")
    assert float(here[f"share_{kind}"].sum("layer")) == pytest.approx(float(cos), abs=1e-12)


@of_each
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_pairs_of_right_and_wrong_points(case, regime, kind, wrong):
    G, here = case.G["exact"], case.found.sel(regime=regime, rightness=PAIRS[wrong])
    number = {pair: 2 - int(case.right[list(pair)].sum()) for pair in case.pairs(regime, kind == "within")}
    chosen = [pair for pair, k in number.items() if k == wrong]
    for measure_, value in (("cos", cosine), ("sign", lambda a, b: np.sign(float(a @ b)))):
        mean = np.mean([value(G[i], G[j]) for i, j in chosen]) if chosen else np.nan
        assert float(here[f"pair_{kind}"].sel(measure=measure_)) == pytest.approx(mean, abs=1e-9, nan_ok=True)
    if kind == "within":
        assert float(here.pair_share) == pytest.approx(len(chosen) / len(number))


@of_each
@pytest.mark.parametrize("name", ["exact", "keras2019"])
def test_zero_gradients_left_out_and_norms_padded(case, regime, kind, name):
    G, here, same = case.G[name], case.found.sel(regime=regime, arithmetic=name), kind == "within"
    zero = (G == 0).all(1)
    alive = case.macro(lambda i, j: None if zero[i] or zero[j] else cosine(G[i], G[j]), regime, same)
    assert float(here[f"alive_{kind}"].sel(measure="cos")) == pytest.approx(alive, abs=1e-6)
    padded = case.macro(lambda i, j: cosine(G[i], G[j], 1e-12), regime, same)
    assert float(here[f"padded_{kind}"]) == pytest.approx(padded, abs=1e-6)


def test_unclipped_points_of_each_class(case):
    zero = (case.G["keras2019"] == 0).all(1)
    for part, rows in ROWS.items():
        for label in range(3):
            left = np.mean([not zero[i] for i in rows if case.y[i] == label])
            assert float(case.found.unclipped.sel(arithmetic="keras2019", part=part, class_a=label)) == left
    assert bool((case.found.unclipped.sel(arithmetic="exact") == 1).all())


def test_deciles_of_the_gap(case):
    order, G = np.argsort(case.gap[:N], kind="stable"), case.G["exact"]
    for decile, members in enumerate(np.split(order, 10), start=1):
        chosen = [(i, j) for i, j in case.pairs("train-train", True) if i in members]
        mean = np.mean([np.sign(float(G[i] @ G[j])) for i, j in chosen])
        here = case.found.sel(decile=decile)
        assert float(here.decile_within.sel(arithmetic="exact")) == pytest.approx(mean)
        assert float(here.decile_gap) == pytest.approx(case.gap[members].mean())


def test_the_whole_is_what_is_measured_at_once(case):
    direct = gradient_gram(case.model, cross_entropy, case.points)
    summed = whole(gradient_gram(case.model, cross_entropy, case.points, by="layer"))
    torch.testing.assert_close(summed.cos, direct.cos, atol=1e-12, rtol=0)
    torch.testing.assert_close(summed.norms, direct.norms, atol=0, rtol=1e-12)
    assert torch.equal(summed.self_pairs, direct.self_pairs)


def test_gradients_of_1e_200_are_summed_without_underflow():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[1].weight.copy_(torch.eye(3))
        for layer in model:
            layer.bias.zero_()
    points = 470 * torch.eye(3, dtype=torch.float64), torch.arange(3)
    summed = whole(gradient_gram(model, cross_entropy, points, by="layer"))
    assert 0 < float(summed.norms.max()) < 1e-190
    torch.testing.assert_close(summed.cos, gradient_gram(model, cross_entropy, points).cos, atol=1e-12, rtol=0)


def test_the_loss_that_a_network_was_trained_with():
    model, x, y = logit_reader(), torch.eye(4)[torch.arange(12) % 4] * 0.5, torch.arange(12) % 4
    found = measure(model, (x, y), (x, y), ("exact", "own"), errors=False, own=mse)
    G = gradients(model.double(), lambda z, t: ((z - nn.functional.one_hot(t, 4)) ** 2).mean(1), (x.double(), y))
    same = [np.sign(float(G[i] @ G[j])) for i in range(12) for j in range(12) if i != j and y[i] == y[j]]
    assert float(found.within.sel(arithmetic="own", measure="sign", regime="train-train")) == np.mean(same)


@pytest.mark.parametrize("clipped", [0, 1, 3, 5])
def test_a_known_share_of_clipped_points_gives_the_predicted_value(clipped):
    """Of each class's five points so many have a gap past 16: of 20 pairs those without a clipped point count."""
    gaps = torch.tensor(([20.0] * clipped + [2.0] * (5 - clipped)) * 4, dtype=torch.float64)
    y = torch.arange(4).repeat_interleave(5)
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    z = z.scatter(1, y[:, None], (others + gaps)[:, None]).float()
    found = measure(logit_reader(), (z, y), (z, y), tuple(ARITHMETICS), errors=False, attribution=True)
    here = found.sel(regime="train-train", measure="sign").within
    left = 5 - clipped
    assert float(here.sel(arithmetic="exact")) == 1
    assert float(here.sel(arithmetic="keras2019")) == left * (left - 1) / 20
    mixed = found.expand_dims("images")
    assert float(clipped_prediction(mixed, "train-val", "class").item()) == pytest.approx((left / 5) ** 2)
    assert float(found.sel(regime="train-val", measure="sign", arithmetic="keras2019").within) == (
        pytest.approx((left / 5) ** 2)
    )
    assert float(clipped_misfit(mixed, "train-val", "class")) == pytest.approx(0, abs=1e-12)
    assert float(clipped_misfit(mixed, "train-val", "all")) == pytest.approx(0, abs=1e-12)
