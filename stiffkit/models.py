"""The networks of the paper, seeded."""

from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from stiffkit.data import Dataset


def build_model(
    name: str,
    dataset: Dataset,
    seed: int,
    *,
    initialisation: str = "keras",
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Module:
    r"""Build one of the paper's networks for the images and classes of a data set.

    Args:
        name: "fc", three hidden layers of 500, 300 and 100 (Fort et al., v3); "cnn", three 3 x 3 convolutions with 16,
            32 and 32 channels (v3); "cnn_v1", four with 32, 64, 128 and 256 (v1). Each convolution is padded to keep
            the image's size and followed by 2 x 2 max-pooling; one linear layer ends the network. "resnet20" (v3), as
            Keras' example has its first version: a convolution and nine blocks of two, in stages of 16, 32 and 64
            channels, the first block of a stage halving the image, shortcuts added before the last non-linearity,
            the mean over places, one linear layer. Biases everywhere, no dropout.
        dataset: gives the shape of an image and the number of classes.
        seed: the same weights for the same seed, whatever the state of torch's own generator.
        initialisation: "keras", Glorot-uniform weights (Glorot and Bengio 2010) with zero bias, the default of Keras
            and so the likely choice of the paper, which names none; for "resnet20" Keras' `he_normal`, as its example
            has it; or "torch", PyTorch's default of weights and biases uniform in $\pm 1 / \sqrt{\text{inputs}}$. It
            changes the class matrix at the start (chapter 1).
        activation: of the hidden layers: "relu" as in the paper; "tanh" or "linear", whose features have both signs
            (chapter 8). The weights at the start are the same.
        batch_norm: with batch normalisation after each convolution of "resnet20" but those of the shortcuts, as in
            Keras' example; the paper's third version has none. It is measured in eval mode, whose running means follow
            the batches slowly: after 50 steps 60 % of them is still what they began with. The example's weight decay,
            augmentation and falling rate are left out.

    Raises:
        ValueError: an unknown name, images too small for the pooling, or batch norm in a network that never has it.

    The width of the padding is not stated in the paper.

    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; known are {', '.join(MODELS)}")
    if initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation {initialisation!r} is unknown; known are {', '.join(INITIALISATIONS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    options = {"batch_norm": True} if batch_norm else {}
    if batch_norm and name != "resnet20":
        raise ValueError(f"batch norm is an option of resnet20, {name} has none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](dataset.shape, len(dataset.classes), ACTIVATIONS[activation], **options)
        if initialisation == "keras":
            model.apply(_he_normal if name == "resnet20" else _glorot)
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


class _Block(nn.Module):
    """Two convolutions and what leads past them; at stride 2 padding is on the right and below, as Keras' "same"."""

    def __init__(self, before: int, channels: int, stride: int, activation: type[nn.Module], batch_norm: bool) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.ZeroPad2d(1)
        self.first = nn.Conv2d(before, channels, 3, stride)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(_norm(channels, batch_norm) for _ in range(2))
        self.activations = nn.ModuleList(activation() for _ in range(2))
        self.shortcut = nn.Identity() if before == channels else nn.Conv2d(before, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activations[0](self.norms[0](self.first(self.pad(x))))
        return self.activations[1](self.norms[1](self.second(y)) + self.shortcut(x))


def _resnet20(
    shape: tuple[int, int, int], classes: int, activation: type[nn.Module], batch_norm: bool = False
) -> nn.Module:
    colours, *size = shape
    if min(size) < 4 or any(side % 4 for side in size):
        raise ValueError(
            f"images of {size[0]} x {size[1]} pixels cannot be halved twice: multiples of 4 are needed; take the model "
            "fc"
        )
    channels = (16,) * 4 + (32,) * 3 + (64,) * 3
    blocks = [_Block(a, b, 1 + (a < b), activation, batch_norm) for a, b in pairwise(channels)]
    head = nn.Conv2d(colours, 16, 3, padding=1), _norm(16, batch_norm), activation()
    return nn.Sequential(*head, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    """With the constants of Keras: 0.001 under the root, and 0.99 of the running mean kept at each step."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) if batch_norm else nn.Identity()


def _he_normal(module: nn.Module) -> None:
    """As Keras draws it: a normal cut off at two of its standard deviations and scaled to a variance of 2 / inputs."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        deviation = (2 / module.weight[0].numel()) ** 0.5 / 0.87962566103423978
        nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(module.bias)


def _glorot(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


MODELS = {
    "fc": _fully_connected,
    "cnn": partial(_convolutional, channels=(16, 32, 32)),
    "cnn_v1": partial(_convolutional, channels=(32, 64, 128, 256)),
    "resnet20": _resnet20,
}
INITIALISATIONS = ("keras", "torch")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
