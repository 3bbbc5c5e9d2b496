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


def resnet20_written_out(parameters, x, norms=None):
    """The network from its parameters in order; with norms, (mean, variance) of each in eval mode."""
    take = iter(parameters)

    def conv(h, stride=1, padding=(1, 1, 1, 1)):
        return F.conv2d(F.pad(h, padding), next(take), next(take), stride)

    def norm(h):
        if norms is None:
            return h
        mean, variance = next(norms)
        return F.batch_norm(h, mean, variance, next(take), next(take), eps=1e-3)

    h = norm(conv(x)).relu()
    for stage in range(3):
        for block in range(3):
            halved = stage > 0 and block == 0
            first = [next(take), next(take)], [next(take), next(take)]
            norm_parameters = [next(take) for _ in range(4)] if norms else []
            shortcut = [next(take), next(take)] if halved else None
            y = F.conv2d(F.pad(h, (0, 1, 0, 1) if halved else (1, 1, 1, 1)), *first[0], 2 if halved else 1)
            if norms:
                y = F.batch_norm(y, *next(norms), *norm_parameters[:2], eps=1e-3)
            y = F.conv2d(F.pad(y.relu(), (1, 1, 1, 1)), *first[1])
            if norms:
                y = F.batch_norm(y, *next(norms), *norm_parameters[2:], eps=1e-3)
            h = (y + (F.conv2d(h, *shortcut, 2) if halved else h)).relu()
    return F.linear(h.mean(dim=(2, 3)), next(take), next(take))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_resnet20_written_out(batch_norm):
    model = build_model("resnet20", images(3, 32, 32, classes=7), 2, batch_norm=batch_norm).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == 19 * batch_norm
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
    norms = iter([(m.running_mean, m.running_var) for m in layers]) if batch_norm else None
    x = torch.randn(2, 3, 32, 32, generator=generator)
    torch.testing.assert_close(model(x), resnet20_written_out(model.parameters(), x, norms), rtol=1e-4, atol=1e-4)


def test_resnet20_has_the_size_of_keras_example():
    """Its summary gives 274,442 parameters for CIFAR-10, of which 1,376 belong to batch norm that is not trained."""
    model = build_model("resnet20", CIFAR, 1, batch_norm=True)
    moving = sum(m.num_features * 2 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert sum(p.numel() for p in model.parameters()) + moving == 274_442
    assert moving == 1_376


def test_he_normal_is_keras():
    """Cut off at two standard deviations of the normal, whose variance is then 2 / inputs; biases zero."""
    model = build_model("resnet20", images(3, 32, 32, classes=100), 1)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 5000:
            deviation = (2 / module.weight[0].numel()) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
            assert float(module.weight.detach().abs().max()) <= 2 * deviation / 0.8796
            assert not module.bias.any()


def test_batch_norm_is_an_option_of_resnet20_alone():
    with pytest.raises(ValueError, match="batch norm is an option of resnet20, cnn has none"):
        build_model("cnn", CIFAR, 1, batch_norm=True)
    with pytest.raises(ValueError, match="multiples of 4"):
        build_model("resnet20", images(1, 10, 10), 1)


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
