"""Training: a plain loop of torch's optimisers as reference, seeds, checkpoints, threads, divergence, errors."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stiffkit.data import load
from stiffkit.losses import cross_entropy_float32
from stiffkit.models import build_model
from stiffkit.training import train

N, BATCH = 50, 32  # batches of 32 and 18
PLAIN = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(dtype=torch.float32, n=N):
    """A small network and points for it."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return model, (torch.randn(n, 6, generator=generator).to(dtype), torch.arange(n) % 3)


class Recorder:
    """A loss for targets that are numbers of points: cross-entropy, and a list of the batches it has seen."""

    def __init__(self, labels):
        self.labels, self.batches, self.threads = labels, [], set()

    def __call__(self, outputs, index):
        self.batches.append(index)
        self.threads.add(torch.get_num_threads())
        return F.cross_entropy(outputs, self.labels[index], reduction="none")


def recorded(model, points, **options):
    """Train to the end; the checkpoints and the batches, as numbers of points."""
    loss = Recorder(points[1])
    checkpoints = list(train(model, (points[0], torch.arange(len(points[1]))), loss=loss, **options))
    return checkpoints, loss.batches


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trained(**options):
    model, points = problem()
    for _ in train(model, points, **({"checkpoints": [3], "seed": 1} | options)):
        pass
    return weights(model)


# What is computed


@pytest.mark.parametrize("optimizer", PLAIN)
def test_equals_a_plain_loop(optimizer):
    model, (x, y) = problem(torch.float64)
    plain = copy.deepcopy(model)
    (last,), batches = recorded(
        model, (x, y), checkpoints=[4], seed=2, optimizer=optimizer, learning_rate=0.03, batch_size=BATCH
    )
    steps = PLAIN[optimizer](plain.parameters(), lr=0.03)
    losses = []
    for batch in batches:
        each = F.cross_entropy(plain(x[batch]), y[batch], reduction="none")
        losses += each.tolist()
        steps.zero_grad()
        each.mean().backward()
        steps.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-9, atol=1e-12)
    assert last.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not torch.allclose(weights(model), weights(problem(torch.float64)[0]), atol=1e-3)


def test_defaults_are_adam_on_cross_entropy_in_batches_of_32():
    by_default = trained(checkpoints=[100], unit="images")
    options = {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32, "loss": cross_entropy_float32}
    assert torch.equal(by_default, trained(checkpoints=[100], unit="images", **options))
    model, points = problem()
    recorded(model, points, checkpoints=[100], unit="images", seed=1, learning_rate=1e-3)
    torch.testing.assert_close(by_default, weights(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [(50, 32, [32, 18]), (6, 2, [2, 2, 2]), (5, 9, [5])])
def test_every_epoch_holds_each_point_once_in_a_new_order(n, batch_size, sizes):
    model, points = problem(n=n)
    _, batches = recorded(model, points, checkpoints=[3], seed=1, batch_size=batch_size)
    assert [len(batch) for batch in batches] == 3 * sizes
    epochs = torch.cat(batches).view(3, n)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(n).repeat(3, 1))
    assert len({tuple(epoch.tolist()) for epoch in [torch.arange(n), *epochs]}) == 4


def test_batches_of_about_one_length_hold_each_point_once():
    n, size = 1_000, 8
    lengths = torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(0))
    model, points = problem(n=n)
    _, batches = recorded(model, points, checkpoints=[2], seed=1, batch_size=size, lengths=lengths)
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    for epoch in (first, second):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(n))
        assert {len(batch) for batch in epoch} == {size}
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in batches]
    assert sorted(spread)[len(spread) // 2] <= 2, "most batches need next to no padding"
    assert not torch.equal(torch.cat(first), torch.cat(second))
    means = torch.stack([lengths[batch].float().mean() for batch in first])
    assert not torch.equal(means, means.sort().values), "short ones do not come first"
    _, batches = recorded(model, points, checkpoints=[6], seed=1, batch_size=size, lengths=lengths)
    ends = [float(lengths[batch].float().mean()) for batch in batches[len(first) - 1 :: len(first)]]
    assert len(ends) == 6
    assert min(ends) < 40, "an epoch may end with a batch of any length"
    with pytest.raises(ValueError, match="there are 1000 points and 999 lengths"):
        train(model, points, checkpoints=[1], seed=1, lengths=lengths[1:])


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_goes_on_draws_the_same_batches_and_the_same_dropout(stop):
    lengths = torch.arange(N) % 7
    options = {"seed": 3, "unit": "images", "batch_size": 20, "lengths": lengths}  # batches of 20, 20, 10 in any order

    def network():
        model, points = problem()
        return nn.Sequential(nn.Dropout(0.3), *model), points

    whole, points = network()
    at = [c.state for c in train(whole, points, checkpoints=[20, 50, 70, 100, 150], **options)][-1]
    first, _ = network()
    *_, checkpoint = train(first, points, checkpoints=[20, 50, 70, 100][:stop], **options)
    state = copy.deepcopy(checkpoint.state)
    second, _ = network()
    torch.manual_seed(99)
    list(train(second, points, checkpoints=[150], resume=state, **options))
    assert at["images"] == 150
    assert torch.equal(weights(second), weights(whole))
    still, _ = network()
    list(train(still.eval(), points, checkpoints=[150], **options))
    assert not torch.equal(weights(still), weights(whole))


def test_gradients_are_cut_to_a_norm():
    moved = {}
    for clip in (0.0, 1e-3, 1e3):
        model, points = problem()
        before = weights(model)
        list(
            train(model, points, checkpoints=[32], unit="images", seed=1, optimizer="sgd", learning_rate=1.0, clip=clip)
        )
        moved[clip] = float((weights(model) - before).norm())
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1e3] == moved[0.0] > 0.01


def test_mixed_precision_is_near_and_leaves_weights_and_losses_in_float32():
    ends, losses = [], []
    for mixed in (False, True):
        model, points = problem()
        (end,) = train(model, points, checkpoints=[20], seed=1, mixed=mixed)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ends.append(weights(model))
        losses.append(end.loss)
    assert 0 < float((ends[1] - ends[0]).norm() / ends[0].norm()) < 0.01
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_the_loss_of_a_checkpoint_is_the_mean_since_the_last_one():
    model, (x, y) = problem(torch.float64)
    plain = copy.deepcopy(model)
    (start, middle, end), batches = recorded(
        model, (x, y), checkpoints=[0, 1, 3], seed=4, optimizer="sgd", learning_rate=0.5
    )
    sums = []
    for batch in batches:
        each = F.cross_entropy(plain(x[batch]), y[batch], reduction="none")
        gradients = torch.autograd.grad(each.mean(), list(plain.parameters()))
        sums.append(each.sum().item())
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p -= 0.5 * g
    assert math.isnan(start.loss)
    assert middle.loss == pytest.approx(sum(sums[:2]) / N, rel=1e-5)
    assert end.loss == pytest.approx(sum(sums[2:]) / (2 * N), rel=1e-5)


# Seeds


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_seed_means_the_same_weights_bit_for_bit_whatever_the_callers_threads(optimizer):
    x, y = load("digits").train
    points, results = (x[:200], y[:200]), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        model = build_model("fc", load("digits"), 1)
        torch.manual_seed(threads)
        for _ in train(model, points, checkpoints=[1], seed=7, optimizer=optimizer):
            pass
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_checkpoints_and_what_is_done_at_them_change_no_bit():
    model, points = problem()
    for checkpoint in train(model, points, checkpoints=[0, 0.3, 1, 1.5, 3], seed=1):
        torch.set_num_threads(2)
        torch.rand(9)
        checkpoint.model(points[0]).sum().backward()
    assert torch.equal(weights(model), trained(checkpoints=[3]))
    assert torch.equal(weights(model), trained(checkpoints=[3 * N], unit="images"))


def test_another_seed_gives_another_order():
    assert not torch.equal(trained(seed=1), trained(seed=2))


def test_the_global_generator_is_left_alone():
    model, points = problem()
    before = torch.get_rng_state()
    assert len(list(train(model, points, checkpoints=[0, 2], seed=1))) == 2
    assert torch.equal(torch.get_rng_state(), before)


# Checkpoints


def reached(checkpoints, unit, n=N):
    model, points = problem(n=n)
    return [(c.images, c.epochs) for c in train(model, points, checkpoints=checkpoints, unit=unit, seed=1)]


def test_a_checkpoint_in_images_is_reached_with_the_first_batch_that_brings_them():
    # 32, 50, 82, 100, 132 images are seen after the first batches
    assert reached([0, 1, 33, 82, 101], "images") == [(0, 0), (32, 0.64), (50, 1), (82, 1.64), (132, 2.64)]


def test_a_checkpoint_in_epochs():
    assert reached([0, 0.5, 1, 2.1], "epochs") == [(0, 0), (32, 0.64), (50, 1), (132, 2.64)]


@pytest.mark.parametrize("unit", ["epochs", "images"])
def test_the_start_alone_trains_nothing(unit):
    model, points = problem()
    (checkpoint,), batches = recorded(model, points, checkpoints=[0], unit=unit, seed=1)
    assert (checkpoint.images, checkpoint.epochs, checkpoint.diverged) == (0, 0, False)
    assert batches == []
    assert torch.equal(weights(model), weights(problem()[0]))


def test_the_start_need_not_be_a_checkpoint():
    assert reached([2], "epochs") == [(100, 2)]


def test_a_small_fraction_of_an_epoch_is_not_the_start():
    assert reached([0.005], "epochs") == [(32, 0.64)]


def test_every_entry_of_the_checkpoints_has_a_record():
    assert [images for images, _ in reached([10, 20, 40], "images")] == [32, 32, 50]


def test_a_checkpoint_holds_the_live_model_and_optimizer():
    model, points = problem()
    for checkpoint in train(model, points, checkpoints=[0, 1], seed=1):
        assert checkpoint.model is model
    assert isinstance(checkpoint.optimizer, torch.optim.Adam)
    assert [p for group in checkpoint.optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert all(int(state["step"]) == 2 for state in checkpoint.optimizer.state.values())


# Threads


def test_training_runs_in_one_thread_and_the_callers_are_back_at_every_checkpoint():
    torch.set_num_threads(3)
    model, (x, y) = problem()
    loss = Recorder(y)
    seen = [
        torch.get_num_threads() for _ in train(model, (x, torch.arange(N)), checkpoints=[0, 1, 2], seed=1, loss=loss)
    ]
    assert loss.threads == {1}
    assert [*seen, torch.get_num_threads()] == [3, 3, 3, 3]


def test_closing_early_gives_the_threads_back():
    torch.set_num_threads(3)
    checkpoints = train(*problem(), checkpoints=[0, 1, 2], seed=1)
    assert [next(checkpoints).images, next(checkpoints).images] == [0, N]
    checkpoints.close()
    assert torch.get_num_threads() == 3
    assert next(checkpoints, None) is None


def test_threads_that_the_caller_sets_at_a_checkpoint_stay():
    torch.set_num_threads(3)
    checkpoints = train(*problem(), checkpoints=[0, 1, 2], seed=1)
    next(checkpoints)
    torch.set_num_threads(2)
    assert next(checkpoints).images == N
    assert torch.get_num_threads() == 2


def test_a_loss_that_raises_gives_the_threads_back():
    def fails(outputs, targets):
        raise RuntimeError("the loss of the caller")

    torch.set_num_threads(3)
    with pytest.raises(RuntimeError, match="the loss of the caller"):
        list(train(*problem(), checkpoints=[1], seed=1, loss=fails))
    assert torch.get_num_threads() == 3


# A run that diverges


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_diverging_run_ends_with_a_record(optimizer):
    checkpoints = list(train(*problem(), checkpoints=[0, 1, 2, 40], seed=1, optimizer=optimizer, learning_rate=1e30))
    assert [c.diverged for c in checkpoints] == [False] * (len(checkpoints) - 1) + [True]
    assert not math.isfinite(checkpoints[-1].loss)
    assert checkpoints[-1].images in (N, 2 * N)


def test_divergence_is_noticed_at_the_end_of_the_epoch():
    model, (x, y) = problem()
    x[7] = torch.nan
    start, last = train(model, (x, y), checkpoints=[0, 30], seed=1)
    assert (start.diverged, last.diverged) == (False, True)
    assert (last.images, last.epochs) == (N, 1)


def test_divergence_is_noticed_at_a_checkpoint_within_an_epoch():
    model, (x, y) = problem()
    x[:] = torch.nan
    (last,) = train(model, (x, y), checkpoints=[1, 3000], unit="images", seed=1)
    assert (last.images, last.diverged) == (32, True)


def test_a_run_that_does_not_diverge_says_so():
    assert not any(c.diverged for c in train(*problem(), checkpoints=[0, 1, 2], seed=1))


# Errors, when called and not at the first checkpoint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "'lion'.*adam, sgd"),
        ({"unit": "steps"}, "epochs.*images.*'steps'"),
        ({"checkpoints": []}, "checkpoints"),
        ({"checkpoints": [-1, 2]}, "checkpoints.*-1"),
        ({"checkpoints": [0, 2, 1]}, r"checkpoints.*\[0, 2, 1\]"),
        ({"checkpoints": [1, 1]}, r"checkpoints.*\[1, 1\]"),
        ({"checkpoints": [5, 5], "unit": "images"}, r"checkpoints.*\[5, 5\]"),
    ],
)
def test_errors_come_when_called(options, message):
    model, points = problem()
    with pytest.raises(ValueError, match=message):
        train(model, points, **({"checkpoints": [1], "seed": 1} | options))


@pytest.mark.parametrize(
    ("checkpoints", "unit"),
    list(itertools.product([[-0.001], [-0.001, 1]], ["images", "epochs"])),
)
def test_a_fraction_below_zero_is_negative_too(checkpoints, unit):
    with pytest.raises(ValueError, match="checkpoints"):
        train(*problem(), checkpoints=checkpoints, unit=unit, seed=1)


# Devices


def test_training_multiplies_in_full_precision_and_the_callers_setting_is_back():
    conv = torch.backends.cudnn.conv
    before, seen = conv.fp32_precision, set()

    def loss(outputs, targets):
        seen.add(conv.fp32_precision)
        return F.cross_entropy(outputs, targets, reduction="none")

    conv.fp32_precision = "tf32"
    try:
        checkpoints = [conv.fp32_precision for _ in train(*problem(), checkpoints=[0, 1], seed=1, loss=loss)]
    finally:
        conv.fp32_precision = before
    assert (seen, set(checkpoints)) == ({"ieee"}, {"tf32"})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["fc", "cnn"])
def test_the_first_twenty_steps_are_the_same_on_a_device(name):
    digits = load("digits")
    models = {}
    for device in ("cpu", "cuda"):
        models[device] = build_model(name, digits, seed=1).to(device)
        points = tuple(part.to(device) for part in digits.train)
        list(train(models[device], points, checkpoints=[640], unit="images", seed=1))
    expected = weights(models["cpu"])
    assert (weights(models["cuda"]).cpu() - expected).norm() < 1e-4 * expected.norm()
