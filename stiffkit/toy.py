"""A problem in the plane, small enough to see where a step on one example helps and where it hurts (chapter 1)."""

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stiffkit.data import Points
from stiffkit.losses import cross_entropy
from stiffkit.steps import loss_change
from stiffkit.training import train

STAGES = ("untrained", "trained")
POINT = (0.35, 0.3)  # where the step is taken


def pinwheel(x: Tensor) -> Tensor:
    r"""The class of each point of the plane: one of three arms, $\lfloor 3 (\theta + 2 r) / 2 \pi \rfloor \bmod 3$.

    Args:
        x: shape (n, 2); r and $\theta$ are its polar coordinates.

    Returns:
        Shape (n,), int64, in 0 to 2.

    """
    turn = torch.atan2(x[:, 1], x[:, 0]) + 2 * x.norm(dim=1)
    return (3 * turn / (2 * torch.pi)).floor().long() % 3


def toy_points(n: int, seed: int) -> Points:
    """Points drawn evenly from the square [-1, 1] x [-1, 1], with their classes."""
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, pinwheel(x)


def step_on_toy(learning_rate: float, seed: int, resolution: int = 81) -> xr.Dataset:
    """One step of gradient descent on one point, and how the loss changed all over the plane.

    The network has two hidden ReLU layers of 64; it is measured untrained and after 60 passes over 600 points (Adam,
    learning rate 0.003, batch 32).

    Args:
        learning_rate: of the one step.
        seed: of weights, points and their order.
        resolution: grid points a side.

    Returns:
        A Dataset: `toy_change` (toy_stage, toy_y, toy_x), the change of the loss of each grid point labelled with its
        own class; `toy_class` (toy_y, toy_x); `toy_accuracy` (toy_stage) on the grid.

    """
    axis = torch.linspace(-1, 1, resolution)
    grid = torch.cartesian_prod(axis, axis).flip(1)  # rows run along y
    labels = pinwheel(grid)
    point = torch.tensor([POINT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    changes, accuracy = [], []
    for checkpoint in train(model, toy_points(600, seed), checkpoints=[0, 60], seed=seed, learning_rate=3e-3):
        descent = torch.optim.SGD(checkpoint.model.parameters(), lr=learning_rate)
        change = loss_change(checkpoint.model, cross_entropy, (point, pinwheel(point)), (grid, labels), descent)
        changes.append(change[0].view(resolution, resolution).numpy())
        with torch.no_grad():
            accuracy.append(float((model(grid).argmax(dim=1) == labels).double().mean()))
    return xr.Dataset(
        {
            "toy_change": (("toy_stage", "toy_y", "toy_x"), np.stack(changes)),
            "toy_class": (("toy_y", "toy_x"), labels.view(resolution, resolution).numpy()),
            "toy_accuracy": ("toy_stage", accuracy),
        },
        {"toy_stage": list(STAGES), "toy_y": axis.numpy(), "toy_x": axis.numpy()},
    )
