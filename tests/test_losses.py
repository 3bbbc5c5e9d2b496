import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CLASSES, logit_reader, logits_with_gap, one_hot, softmax_gradient

from stiffkit import gradient_gram, losses

CROSS_ENTROPIES = [losses.cross_entropy, losses.cross_entropy_float32, losses.cross_entropy_keras2019]
EVERY = [*CROSS_ENTROPIES, losses.mse]
FAR = [0.0, 5.0, 15.0, 17.0, 36.0, 38.0, 100.0, 400.0, 700.0, -5.0, -50.0, -700.0]


def gradient(loss, z, y):
    """The gradient of a loss called as it stands, outside `gradient_gram`."""
    z = z.clone().requires_grad_()
    loss(z, y).sum().backward()
    return z.grad


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("loss", CROSS_ENTROPIES)
def test_values_are_those_of_cross_entropy(loss):
    z, y = torch.randn(8, CLASSES), torch.arange(8) % CLASSES
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y, reduction="none"), check_dtype=False)


def test_values_of_confident_points():
    z, y = logits_with_gap([30.0, 700.0, -30.0, -700.0], CLASSES)
    expected = -z.double().log_softmax(1)[torch.arange(4), y]
    torch.testing.assert_close(losses.cross_entropy(z.double(), y), expected)
    torch.testing.assert_close(losses.cross_entropy_float32(z, y).double(), expected, rtol=1e-6, atol=1e-6)
    low, high = (-float(mpmath.log(p)) for p in (1 - 2**-23, 1e-7))
    clipped = torch.tensor([low, low, high, high], dtype=torch.float64)
    torch.testing.assert_close(losses.cross_entropy_keras2019(z, y).double(), clipped, rtol=1e-5, atol=0)


def test_mse_is_the_mean_over_outputs():
    z, t = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert losses.mse(z, t).tolist() == pytest.approx([4 / 3, 5 / 3])
    assert losses.mse(z, torch.tensor([0, 2])).tolist() == pytest.approx([4 / 3, 4 / 3])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(0, 3), classes=st.integers(1, 4), wide=st.booleans())
def test_one_loss_a_sample(n, classes, wide):
    z, y = torch.randn(n, classes, dtype=torch.float64 if wide else torch.float32), torch.randint(classes, (n,))
    for loss in EVERY:
        assert loss(z, y).shape == (n,)
        assert gradient(loss, z, y).shape == z.shape


@pytest.mark.parametrize("loss", EVERY)
def test_targets_and_outputs_are_left_alone(loss):
    z, y = torch.randn(4, CLASSES), torch.arange(4) % CLASSES
    before = z.clone(), y.clone()
    gradient(loss, z, y)
    loss(z, y)
    assert torch.equal(z, before[0])
    assert torch.equal(y, before[1])


# ----------------------------------------------------------------------------------------------------------- gradients


def test_exact_gradient_to_a_gap_of_700():
    z, y = logits_with_gap(FAR, CLASSES)
    found = gradient(losses.cross_entropy, z.double(), y)
    pairs = [softmax_gradient(row, target) for row, target in zip(z.tolist(), one_hot(y).tolist(), strict=True)]
    expected = torch.stack([direction * length for direction, length in pairs])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_float32_gradient_is_fused():
    z, y = logits_with_gap([0.0, 3.0, 20.0, 60.0, -20.0], CLASSES)
    found, wide = gradient(losses.cross_entropy_float32, z, y), gradient(losses.cross_entropy_float32, z.double(), y)
    torch.testing.assert_close(found, z.softmax(1) - one_hot(y).float(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(wide, found.double(), rtol=0, atol=0)
    assert found[2:4].gather(1, y[2:4, None]).tolist() == [[0], [0]]
    assert found[2:4].abs().sum(1).min() > 0


def test_keras2019_gradient_is_clipped():
    z, y = logits_with_gap([0.0, 3.0, 15.0, -3.0, -15.0, 17.0, 40.0, 700.0, -17.0, -40.0, -700.0], CLASSES)
    found, wide = (
        gradient(losses.cross_entropy_keras2019, z, y),
        gradient(losses.cross_entropy_keras2019, z.double(), y),
    )
    fused = z.softmax(1) - one_hot(y).float()
    torch.testing.assert_close(found[:5], fused[:5], rtol=1e-5, atol=1e-6)
    assert found[:5].abs().amax(1).min() > 0
    assert not found[5:].any()
    torch.testing.assert_close(wide, found.double(), rtol=0, atol=0)


def test_mse_gradient():
    z, y = torch.randn(5, CLASSES, dtype=torch.float64), torch.arange(5) % CLASSES
    torch.testing.assert_close(gradient(losses.mse, z, y), 2 * (z - one_hot(y)) / CLASSES)


@pytest.mark.parametrize("loss", CROSS_ENTROPIES)
def test_arithmetic_survives_inside_another_loss(loss):
    """Halved, and beside an exact term that is zero."""
    z, y = logits_with_gap([2.0, 14.0, 20.0, 60.0, -3.0], CLASSES)
    alone = gradient_gram(logit_reader(CLASSES), loss, (z, y))
    inside = gradient_gram(
        logit_reader(CLASSES), lambda z, y: loss(z, y) / 2 + 0 * F.cross_entropy(z, y, reduction="none"), (z, y)
    )
    torch.testing.assert_close(inside.cos, alone.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(inside.norms, alone.norms / 2, rtol=1e-6, atol=0)


def test_arithmetics_differ_where_the_network_is_confident():
    z, y = logits_with_gap([1.0, 2.0, 40.0, 41.0, 42.0, 43.0, 44.0, 45.0], CLASSES)
    exact, fused, clipped = (gradient_gram(logit_reader(CLASSES), loss, (z, y)).cos for loss in CROSS_ENTROPIES)
    torch.testing.assert_close(fused[:2, :2], exact[:2, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(clipped[:2, :2], exact[:2, :2], rtol=0, atol=1e-5)
    assert (fused[2:, 2:] - exact[2:, 2:]).abs().max() > 0.1
    assert not clipped[2:].any()


def test_training_with_the_exact_loss_is_training_with_cross_entropy():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, CLASSES), torch.randn(9, 4), torch.arange(9) % CLASSES
    found = torch.autograd.grad(losses.cross_entropy(model(x), y).mean(), list(model.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    torch.testing.assert_close(found, expected)
