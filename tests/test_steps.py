"""Real steps against steps written out in float64, and the problem in the plane."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import Forward, gradients
from torch import nn

from stiffkit.losses import cross_entropy
from stiffkit.steps import loss_change
from stiffkit.toy import POINT, pinwheel, step_on_toy, toy_points
from stiffkit.training import train

N, M, CLASSES = 4, 6, 3
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def problem():
    """A small smooth network in float32 and two sets of points."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    points, points2 = ((torch.randn(n, 5), torch.arange(n) % CLASSES) for n in (N, M))
    return model, points, points2


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def losses_at(model, weights, points):
    """The losses in float64 of a network with these weights."""
    model = copy.deepcopy(model).double()
    nn.utils.vector_to_parameters(weights, model.parameters())
    return F.cross_entropy(model(points[0].double()), points[1], reduction="none").detach()


def changes(model, points, points2, step, idle):
    """By hand: losses at `w + step(g_i)` minus losses at `w + idle`, a row for each of the points."""
    w = flat(model)
    after = losses_at(model, w + idle, points2)
    G = gradients(model, CROSS_ENTROPY, points)
    return torch.stack([losses_at(model, w + step(g), points2) - after for g in G])


def used(model, points, optimizer):
    """The optimizer after two steps, so that it has a state."""
    for _ in range(2):
        optimizer.zero_grad()
        CROSS_ENTROPY(model(points[0]), points[1]).mean().backward()
        optimizer.step()
    return optimizer


def state(model, optimizer, key):
    return torch.cat([optimizer.state[p][key].flatten() for p in model.parameters()]).double()


def adam_step(m, v, t, g, lr):
    """Adam as in Kingma and Ba (2015), algorithm 1, after t - 1 steps that left the moments m and v."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return -lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def assert_same(found, expected):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rate", [1e-4, 0.1, 3.0])
def test_gradient_descent_written_out(rate):
    model, points, points2 = problem()
    found = loss_change(model, CROSS_ENTROPY, points, points2, SGD(model.parameters(), lr=rate))
    assert found.shape == (N, M)
    assert_same(found, changes(model, points, points2, lambda g: -rate * g, 0))


@pytest.mark.parametrize("rate", [1e-3, 0.1])
def test_first_step_of_adam_written_out(rate):
    model, points, points2 = problem()
    found = loss_change(model, CROSS_ENTROPY, points, points2, ADAM(model.parameters(), lr=rate))
    assert_same(found, changes(model, points, points2, lambda g: -rate * g / (g.abs() + 1e-8), 0))


@pytest.mark.parametrize("fused", [False, True])
def test_what_adam_would_do_anyway_is_taken_off(fused):
    model, points, points2 = problem()
    adam = used(model, points2, ADAM(model.parameters(), lr=0.01, fused=fused))
    m, v = state(model, adam, "exp_avg"), state(model, adam, "exp_avg_sq")
    found = loss_change(model, CROSS_ENTROPY, points, points2, adam)
    idle = adam_step(m, v, 3, torch.zeros_like(m), 0.01)
    assert idle.abs().max() > 1e-3
    assert_same(found, changes(model, points, points2, lambda g: adam_step(m, v, 3, g, 0.01), idle))


def test_what_momentum_would_do_anyway_is_taken_off():
    model, points, points2 = problem()
    sgd = used(model, points2, SGD(model.parameters(), lr=0.1, momentum=0.9))
    idle = -0.1 * 0.9 * state(model, sgd, "momentum_buffer")
    found = loss_change(model, CROSS_ENTROPY, points, points2, sgd)
    assert_same(found, changes(model, points, points2, lambda g: idle - 0.1 * g, idle))


def test_the_first_order_is_minus_the_inner_product():
    model, points, points2 = problem()
    K = gradients(model, CROSS_ENTROPY, points) @ gradients(model, CROSS_ENTROPY, points2).T
    errors = []
    for epsilon in (1e-2, 1e-3, 1e-4):
        change = loss_change(model, CROSS_ENTROPY, points, points2, SGD(model.parameters(), lr=epsilon))
        errors.append((change / -epsilon - K).norm() / K.norm())
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_a_small_step_on_a_point_helps_itself():
    model, points, _ = problem()
    change = loss_change(model, CROSS_ENTROPY, points, points, SGD(model.parameters(), lr=1e-3))
    assert (change.diagonal() < 0).all()


def test_a_point_without_a_gradient_changes_nothing():
    model, points, points2 = problem()
    adam = used(model, points2, ADAM(model.parameters()))
    ignoring = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0]), reduction="none")
    change = loss_change(model, ignoring, points, points2, adam)
    assert torch.equal(change.any(dim=1), points[1] != 1)
    assert torch.equal(change.any(dim=0), points2[1] != 1)


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_model_and_optimizer_stay_as_they_are(kind):
    model, points, points2 = problem()
    optimizer = used(model, points2, kind(model.parameters(), lr=0.1))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    rng = torch.get_rng_state()
    loss_change(model, CROSS_ENTROPY, points, points2, optimizer)
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), rng)


def test_empty_sets():
    model, (x, y), points2 = problem()
    sgd, nothing = SGD(model.parameters(), lr=0.1), (x[:0], y[:0])
    shapes = [loss_change(model, CROSS_ENTROPY, *sets, sgd).shape for sets in ((nothing, points2), (points2, nothing))]
    assert shapes == [(0, M), (M, 0)]


def test_inputs_in_a_tuple():
    model, (x, y), _ = problem()
    pair = Forward(lambda self, a, b: self.net(torch.cat([a, b], dim=1)), net=copy.deepcopy(model))
    found = loss_change(
        pair, CROSS_ENTROPY, ((x[:, :2], x[:, 2:]), y), ((x[:, :2], x[:, 2:]), y), SGD(pair.parameters())
    )
    torch.testing.assert_close(found, loss_change(model, CROSS_ENTROPY, (x, y), (x, y), SGD(model.parameters())))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_no_loss_a_point_is_refused(reduction):
    model, points, points2 = problem()
    with pytest.raises(ValueError, match="one loss a point"):
        loss_change(model, nn.CrossEntropyLoss(reduction=reduction), points, points2, SGD(model.parameters()))


def test_train_mode_with_dropout_is_refused():
    model, points, points2 = problem()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        loss_change(nn.Sequential(model, nn.Dropout(0.5)), CROSS_ENTROPY, points, points2, SGD(model.parameters()))


def test_an_optimizer_straight_from_training():
    model, points, points2 = problem()
    (last,) = train(model, points2, checkpoints=[3], seed=1, learning_rate=0.01)
    m, v = state(model, last.optimizer, "exp_avg"), state(model, last.optimizer, "exp_avg_sq")
    idle = adam_step(m, v, 4, torch.zeros_like(m), 0.01)
    found = loss_change(model, cross_entropy, points, points2, last.optimizer)
    assert_same(found, changes(model, points, points2, lambda g: adam_step(m, v, 4, g, 0.01), idle))


# The problem in the plane


def arm(x, y):
    """The class of one place, in plain Python."""
    return math.floor(3 * (math.atan2(y, x) + 2 * math.hypot(x, y)) / (2 * math.pi)) % 3


def test_pinwheel_by_its_formula():
    x = torch.rand(500, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    classes = pinwheel(x)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [arm(*place) for place in x.tolist()]
    assert classes.unique().tolist() == [0, 1, 2]


def test_pinwheel_near_the_centre_has_three_equal_sectors():
    degrees = torch.tensor([1.0, 60.0, 118.0, 121.0, 180.0, 238.0, 241.0, 300.0, 358.0]).deg2rad()
    x = 1e-3 * torch.stack([degrees.cos(), degrees.sin()], dim=1)
    assert pinwheel(x).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pinwheel(x[:0]).shape == (0,)


def test_toy_points_fill_the_square_by_their_seed():
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    (x, y), (again, _), (other, _) = (toy_points(2000, seed) for seed in (1, 1, 2))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert torch.equal(y, pinwheel(x))
    assert x.abs().max() <= 1
    assert (
        (x[:, :, None] > torch.tensor([-0.5, 0, 0.5])).float().mean(0) - torch.tensor([0.75, 0.5, 0.25])
    ).abs().max() < 0.05
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.fixture(scope="module")
def toy():
    """One step; the grid holds the circled point."""
    return step_on_toy(1e-3, 1, resolution=41)


def test_step_on_toy_is_labelled_and_its_classes_lie_where_the_axes_say(toy):
    assert toy.toy_change.dims == ("toy_stage", "toy_y", "toy_x")
    assert dict(toy.sizes) == {"toy_stage": 2, "toy_y": 41, "toy_x": 41}
    for axis in (toy.toy_x, toy.toy_y):
        np.testing.assert_allclose(axis, np.linspace(-1, 1, 41), atol=1e-6)
    for x, y in ((0.5, -0.9), (-0.9, 0.5), (0.2, 0.75), (-0.3, -0.6)):
        assert int(toy.toy_class.sel(toy_x=x, toy_y=y, method="nearest")) == arm(x, y)


def test_the_step_helps_where_it_is_taken(toy):
    here = toy.toy_change.sel(toy_x=POINT[0], toy_y=POINT[1], method="nearest")
    assert (here < 0).all()


def test_untrained_the_step_helps_its_arm_and_hurts_the_others_as_chapter_1_says(toy):
    change, same = toy.toy_change.sel(toy_stage="untrained"), toy.toy_class == arm(*POINT)
    assert float((change < 0).where(same).mean()) > 0.95
    assert float((change > 0).where(~same).mean()) > 0.95


def test_trained_the_step_leaves_most_of_the_plane_alone_as_chapter_1_says(toy):
    untrained, trained = (abs(toy.toy_change.sel(toy_stage=stage)) for stage in ("untrained", "trained"))
    assert float(untrained.median() / untrained.max()) > 0.1
    assert float(trained.median() / trained.max()) < 0.01
    np.testing.assert_allclose(toy.toy_accuracy, [1 / 3, 1], atol=0.2)


def test_step_on_toy_by_its_seed(toy):
    torch.manual_seed(77)
    rng = torch.get_rng_state()
    again, other = step_on_toy(1e-3, 1, resolution=6), step_on_toy(1e-3, 2, resolution=6)
    assert torch.equal(torch.get_rng_state(), rng)
    np.testing.assert_allclose(again.toy_change, toy.toy_change[:, ::8, ::8], rtol=1e-4, atol=1e-9)
    assert not np.allclose(other.toy_change, again.toy_change, rtol=1e-2)


def test_the_toys_step_is_proportional_to_a_small_learning_rate(toy):
    smaller = step_on_toy(1e-4, 1, resolution=41).toy_change
    error = abs(10 * smaller / toy.toy_change.where(toy.toy_change != 0) - 1)
    assert 0 < float(error.quantile(0.9)) < 0.05
