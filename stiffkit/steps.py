"""What a real optimiser step on one example does to the losses of others."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stiffkit.measuring import measurable, undisturbed
from stiffkit.output_gradients import Loss, apply_loss, call, check_shape
from stiffkit.points import Inputs, Points, PointSet, check_points


def loss_change(
    model: nn.Module, loss: Loss, points: Points, points2: Points, optimizer: torch.optim.Optimizer
) -> Tensor:
    r"""How one real step of the optimiser on one point changes the losses of others, $\Delta\mathcal L_2$.

    For plain gradient descent with learning rate $\varepsilon$ it is
    $\Delta\mathcal L_2 = -\varepsilon\, g_1 \cdot g_2 + O(\varepsilon^2)$ (Fort et al. 2019, section 2): minus the sign
    of the stiffness while $\varepsilon$ is small. What an optimiser with momentum would do anyway, with a gradient of
    zero, is taken off, so that the point's own effect is left.

    Args:
        model: with points that do not influence each other, as for `gradient_gram`.
        loss: one loss a point, as for `gradient_gram`.
        points: the n points a step is taken on, each time from the same weights.
        points2: the m points whose losses are watched.
        optimizer: built on the model's parameters; its learning rate and its state count.

    Returns:
        Shape (n, m), float64, in units of the loss; negative where the step helps. Copies of model and optimiser are
        cast to float64 and stepped; the originals stay as they are.

    """
    model = measurable(model)
    device = next(model.parameters()).device
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in stepped for p in model.parameters()):
        raise ValueError("the optimizer steps none of the model's parameters: build it on model.parameters()")
    with undisturbed(model):
        rows, columns = check_points(points, "points", device), check_points(points2, "points2", device)
        idle = _losses_after(model, loss, optimizer, None, columns)
        changes = [_losses_after(model, loss, optimizer, rows.take([i]), columns) - idle for i in range(len(rows))]
    return torch.stack(changes).cpu() if changes else idle.new_zeros(0, len(columns)).cpu()


def _losses_after(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, point: PointSet | None, watched: PointSet
) -> Tensor:
    """The losses of the watched points after a step on one point, or on nothing at all."""
    model, optimizer = copy.deepcopy((model, optimizer))  # together, so that the copies belong to each other
    model.double()
    for state in optimizer.state.values():
        state.update({key: value.double() for key, value in state.items() if torch.is_tensor(value) and value.ndim})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if point is not None:
        apply_loss(loss, call(model, _double(point.inputs)), point.targets)[0].sum().backward()
    optimizer.step()
    with torch.no_grad():
        losses = apply_loss(loss, call(model, _double(watched.inputs)), watched.targets)[0]
    check_shape(losses, len(watched))
    return losses


def _double(inputs: Inputs) -> Inputs:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
