"""The networks of the paper, seeded."""

from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import nn

from stiffkit.data import Dataset


def build_model(
    name: str, dataset: Dataset, seed: int, *, initialisation: str = "keras", activation: str = "relu"
) -> nn.Module:
    r"""Build one of the paper's networks for the images and classes of a data set.

    Args:
        name: "fc", three hidden layers of 500, 300 and 100 (Fort et al., v3); "cnn", three 3 x 3 convolutions with 16,
            32 and 32 channels (v3); "cnn_v1", four with 32, 64, 128 and 256 (v1). Each convolution is padded to keep
            the image's size and followed by 2 x 2 max-pooling; one linear layer ends the network. Biases everywhere,
            no normalisation, no dropout.
        dataset: gives the shape of an image and the number of classes.
        seed: the same weights for the same seed, whatever the state of torch's own generator.
        initialisation: "keras", Glorot-uniform weights (Glorot and Bengio 2010) with zero bias, the default of Keras
            and so the likely choice of the paper, which names none; or "torch", PyTorch's default of weights and biases
            uniform in $\pm 1 / \sqrt{\text{inputs}}$. It changes the class matrix at the start (chapter 1).
        activation: of the hidden layers: "relu" as in the paper; "tanh" or "linear", whose features have both signs
            (chapter 8). The weights at the start are the same.

    Raises:
        ValueError: an unknown name, or images too small for the pooling.

    The width of the padding is not stated in the paper.

    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; known are {', '.join(MODELS)}")
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation {initialisation!r} is unknown; known are {', '.join(INITIALISATIONS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](dataset.shape, len(dataset.classes), ACTIVATIONS[activation])
        if initialisation == "keras":
            model.apply(_glorot)
    return model


def _fully_connected(shape: tuple[int, int, int], classes: int, activation: type[nn.Module]) -> nn.Module:
    widths = [prod(shape), 500, 300, 100]
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], classes))


def _convolutional(
    shape: tuple[int, int, int], classes: int, activation: type[nn.Module], channels: tuple[int, ...]
) -> nn.Module:
    colours, *size = shape
    smallest = 2 ** len(channels)
    if min(size) < smallest:
        raise ValueError(
            f"images of {size[0]} x {size[1]} pixels vanish in {len(channels)} poolings: at least "
            f"{smallest} x {smallest} are needed; take the model fc, or larger images"
        )
    layers: list[nn.Module] = []
    for a, b in pairwise((colours, *channels)):
        layers += [nn.Conv2d(a, b, 3, padding=1), activation(), nn.MaxPool2d(2)]
    features = channels[-1] * prod(side // smallest for side in size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def _glorot(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


MODELS = {
    "fc": _fully_connected,
    "cnn": partial(_convolutional, channels=(16, 32, 32)),
    "cnn_v1": partial(_convolutional, channels=(32, 64, 128, 256)),
}
INITIALISATIONS = ("keras", "torch")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
