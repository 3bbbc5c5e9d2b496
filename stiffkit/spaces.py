"""Stiffness against distance at a checkpoint: in the input, where points stay, and in the layers, where they move."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stiffkit.alignment import stiffness
from stiffkit.distances import binned, coefficients, distance, representations, same_class
from stiffkit.gradients import GradientGram
from stiffkit.regimes import MEASURES

JUDGED = ("exact", "keras2019")  # the arithmetics that curves are measured in, as far as a run has them
EDGES = np.linspace(0, 2, 41)  # of bins; no distance of points on the unit sphere is larger
OBSERVED = (0.01, 0.99)  # quantiles of the distances of pairs of one class: what lies beyond was hardly seen
INPUT_DISTANCES = {"cosine": "input", "l2": "input, L2", "l1": "input, L1"}  # and the spaces that have them
POOLED = "pooled"  # stands beside the classes


class Spaces:
    r"""Distances of fixed points: in the input once and for all, in the layers of a network at each checkpoint.

    The spaces are "input", "layer 1", ... and "output" with the cosine distance $1 - \cos$ (Fort et al., v3; v1 has the
    cosine itself, the same bins read from the other end), and "input, L2" and "input, L1", the latter divided by the
    square root of the number of pixels, so that on the unit sphere it is below 2 as well. Of sentences they are the
    model's own, "embedding" and "[CLS]".

    Args:
        inputs: (n, ...).
        y: the class of each, (n,).

    """

    def __init__(self, inputs: Tensor, y: Tensor) -> None:
        self.inputs, self.y = inputs, y.cpu()
        self._input: dict[str, Tensor] = {}
        if not inputs.is_floating_point():  # tokens, whose numbers mean nothing
            return
        pixels = inputs[0].numel()
        self._input = {
            "input": distance(inputs),
            "input, L2": distance(inputs, metric="l2"),
            "input, L1": distance(inputs, metric="l1") / pixels**0.5,
        }

    def measured(
        self, model: nn.Module, grams: Mapping[str, GradientGram], layers: Mapping[str, GradientGram] | None = None
    ) -> xr.Dataset:
        """Stiffness of the points against their distances at one checkpoint.

        Args:
            model: the network.
            grams: of the points with themselves, by arithmetic; those of `JUDGED` are taken.
            layers: the exact ones of each layer's gradients, from input to output, where they are wanted.

        Returns:
            A Dataset, float64, with these variables along `space`.

            * `curve` (space, arithmetic, measure, pairs, distance): mean stiffness in bins, of pairs of one class and
              of different ones; `count` (space, pairs, distance): the pairs behind it. Those of all pairs, and what
              classes alone would give, follow from both: `distances.pooled`.
            * `line` (space, arithmetic, measure, of, coefficient): intercept and slope of the line through the pairs of
              one class, of all classes ("pooled") and of each.
            * `observed` (space, end): the 1 % and the 99 % quantile of the distances of pairs of one class.
            * `no_angle` (space): points without a cosine distance, since their representation is zero; left out.
            * `layer_curve` (space, layer, measure, pairs, distance), with `layers`: as `curve`, of each layer's
              gradients by themselves. Layers are numbered from 1.

        """
        hidden = {name: distance(h) for name, h in representations(model, self.inputs).items() if name != "input"}
        same, found = same_class(self.y), []
        chosen = [name for name in JUDGED if name in grams]
        S = _stacked([grams[name] for name in chosen])
        S_layers = _stacked(layers.values()) if layers else None
        classes = self.y.unique()
        members = torch.stack([same, *((self.y == c)[:, None] & (self.y == c) for c in classes)])
        others = ~torch.eye(len(self.y), dtype=torch.bool)
        for D in (self._input | hidden).values():
            curves = binned(S, D, same, EDGES)
            ends = np.nanquantile(D[same & others].numpy(), OBSERVED)
            here = curves.rename(stiffness="curve", dim_0="arithmetic", dim_1="measure").assign(
                line=(("arithmetic", "measure", "of", "coefficient"), coefficients(S, D, members).numpy()),
                observed=("end", ends),
                no_angle=int(D.diagonal().isnan().sum()),
            )
            if S_layers is not None:
                by_layer = binned(S_layers, D, same, EDGES).stiffness
                here["layer_curve"] = by_layer.rename(dim_0="layer", dim_1="measure")
            found.append(here)
        return xr.concat(found, "space").assign_coords(
            space=[*self._input, *hidden],
            arithmetic=chosen,
            measure=list(MEASURES),
            of=[POOLED, *(str(int(c)) for c in classes)],
            coefficient=["intercept", "slope"],
            end=["near", "far"],
            **({"layer": range(1, len(layers) + 1)} if layers else {}),
        )


def _stacked(grams: Iterable[GradientGram]) -> Tensor:
    """Stiffness of pairs by both measures, (grams, measure, n, n)."""
    return torch.stack([torch.stack([stiffness(gram, m) for m in MEASURES]) for gram in grams])
