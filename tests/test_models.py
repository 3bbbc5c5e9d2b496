"""The networks of the paper: sizes counted by hand, the forward pass written out, seeds and initialisations."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stiffkit.data import Dataset, load
from stiffkit.models import build_model

NAMES = ("fc", "cnn", "cnn_v1")
INITIALISATIONS = ("keras", "torch")


def images(*shape, classes=10, n=1):
    """A data set of black images of one shape."""
    points = torch.zeros(n, *shape), torch.arange(n) % classes
    return Dataset("black", tuple(map(str, range(classes))), points, points, points, "")


MNIST, CIFAR = images(1, 28, 28), images(3, 32, 32)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_the_cnn_has_the_size_that_the_paper_gives():
    assert sum(p.numel() for p in build_model("cnn", CIFAR, 1).parameters()) == 19_466


@pytest.mark.parametrize(
    ("name", "dataset", "count"),
    [
        ("fc", MNIST, (784 * 500 + 500) + (500 * 300 + 300) + (300 * 100 + 100) + (100 * 10 + 10)),
        ("fc", CIFAR, (3072 * 500 + 500) + (500 * 300 + 300) + (300 * 100 + 100) + (100 * 10 + 10)),
        ("fc", images(2, 3, 5, classes=7), (30 * 500 + 500) + (500 * 300 + 300) + (300 * 100 + 100) + (100 * 7 + 7)),
        ("cnn", MNIST, (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + (32 * 3 * 3 * 10 + 10)),
        ("cnn", images(1, 8, 8), (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + (32 * 10 + 10)),
        (
            "cnn_v1",
            CIFAR,
            (27 * 32 + 32)
            + (32 * 9 * 64 + 64)
            + (64 * 9 * 128 + 128)
            + (128 * 9 * 256 + 256)
            + (256 * 2 * 2 * 10 + 10),
        ),
        (
            "cnn_v1",
            images(1, 16, 31, classes=3),
            (9 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 9 * 128 + 128) + (128 * 9 * 256 + 256) + (256 * 3 + 3),
        ),
    ],
)
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_parameters_counted_by_hand(name, dataset, count, initialisation):
    model = build_model(name, dataset, 1, initialisation=initialisation)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not list(model.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_forward_pass_written_out(name):
    model = build_model(name, images(3, 17, 34), 3, initialisation="torch")
    h = x = torch.randn(5, 3, 17, 34, generator=torch.Generator().manual_seed(0))
    *hidden, last = zip(*[iter(model.parameters())] * 2, strict=True)
    for weight, bias in hidden:
        if weight.ndim == 4:
            h = F.max_pool2d(F.conv2d(h, weight, bias, padding=1).relu(), 2)
        else:
            h = F.linear(h.flatten(1), weight, bias).relu()
    torch.testing.assert_close(model(x), F.linear(h.flatten(1), *last))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_a_seed_means_the_same_weights_whatever_the_global_generators(name, initialisation):
    def build(seed):
        return flat(build_model(name, CIFAR, seed, initialisation=initialisation))

    first = build(5)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    torch.rand(7)
    assert torch.equal(build(5), first)
    assert not torch.equal(build(6), first)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_the_global_generators_are_left_alone(initialisation):
    torch.manual_seed(3)
    before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    build_model("fc", MNIST, 1, initialisation=initialisation)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert random.getstate() == python_before


def fans(weight):
    """Inputs and outputs of one unit; a convolution's are those of its whole window."""
    window = math.prod(weight.shape[2:])
    return weight.shape[1] * window, weight.shape[0] * window


def assert_uniform(values, bound):
    """Evenly spread over [-bound, bound]; five standard errors for mean and variance."""
    n = values.numel()
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert values.abs().max() > bound * (1 - 12 / n)
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * n)
    assert values.square().mean() / bound**2 == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / n))


@pytest.mark.parametrize("name", NAMES)
def test_keras_means_glorot_uniform_and_zero_bias(name):
    for weight, bias in zip(*[iter(build_model(name, CIFAR, 1).parameters())] * 2, strict=True):
        assert_uniform(weight.detach(), math.sqrt(6 / sum(fans(weight))))
        assert not bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_torch_means_weights_and_biases_by_the_number_of_inputs(name):
    model = build_model(name, CIFAR, 1, initialisation="torch")
    for weight, bias in zip(*[iter(model.parameters())] * 2, strict=True):
        bound = 1 / math.sqrt(fans(weight)[0])
        assert_uniform(weight.detach(), bound)
        assert bias.abs().max() <= bound
        assert bias.std().item() / bound == pytest.approx(1 / math.sqrt(3), rel=0.5)


def test_keras_is_the_default():
    assert torch.equal(flat(build_model("fc", MNIST, 2)), flat(build_model("fc", MNIST, 2, initialisation="keras")))


def test_embedded_digits_fit_the_two_networks_of_the_third_version():
    digits = load("digits")
    x = digits.train[0][:3]
    assert build_model("fc", digits, 1)(x).shape == build_model("cnn", digits, 1)(x).shape == (3, 10)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet'.*fc, cnn, cnn_v1"):
        build_model("resnet", MNIST, 1)
    with pytest.raises(ValueError, match=r"'he'.*keras, torch"):
        build_model("fc", MNIST, 1, initialisation="he")


@pytest.mark.parametrize(
    ("name", "shape", "needed"), [("cnn_v1", (1, 8, 8), 16), ("cnn_v1", (3, 32, 15), 16), ("cnn", (1, 7, 28), 8)]
)
def test_images_that_vanish_in_the_poolings_are_refused(name, shape, needed):
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]}.*{needed} x {needed}"):
        build_model(name, images(*shape), 1)
