r"""What stiffness is made of: layers, right and wrong points, fitted and unfitted ones, zero gradients.

The exact Gram matrix is the sum of the layers' ones. A layer has a stiffness of its own, and a share
$g^l_i \cdot g^l_j / (\|g_i\| \|g_j\|)$ in the cosine of each pair; the shares add up to the cosine (chapter 8).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stiffkit.alignment import class_indicators, stiffness, within_between
from stiffkit.gradients import GradientGram
from stiffkit.regimes import MEASURES, REGIMES, blocks, cells, class_matrices, labelled, sides

PAIRS = ("both right", "one wrong", "both wrong")
DECILES = 10
REGIME = {"regime": list(REGIMES)}
AXES = REGIME | {"measure": list(MEASURES)}
EPSILON = 1e-12  # that code adds to a squared norm, against a division by zero


def attribution_of(
    layers: Mapping[str, GradientGram],
    grams: Mapping[str, GradientGram],
    y: Tensor,
    parts: dict[str, slice],
    *,
    right: Tensor,
    gap: Tensor,
) -> xr.Dataset:
    r"""Where stiffness comes from at one checkpoint.

    Args:
        layers: the exact Gram matrix of each layer over all points, from input to output.
        grams: the whole Gram matrices by arithmetic, "exact" among them.
        y: the class of each point, (n,).
        parts: the slices of "train" and "val" among the points.
        right: (n,), whether each point is classified rightly.
        gap: (n,), the logit gap of each point.

    Returns:
        A Dataset, float64, with these variables, of sign and cosine where it says measure. A pair of a point with
        itself is nowhere counted.

        * `layer_within`, `layer_between` (layer, regime, measure): stiffness of each layer's gradients by themselves;
          `share_within`, `share_between` (layer, regime): means of the layers' shares in the cosine. Layers are
          numbered from 1.
        * `pair_within`, `pair_between` (rightness, regime, measure): means over the pairs of which both points are
          right, one is wrong, or both are; NaN where there are none. `pair_share` (rightness, regime): such pairs among
          those within classes.
        * `alive_within`, `alive_between` (arithmetic, regime, measure): class means over pairs of which neither
          gradient is exactly zero; `padded_within`, `padded_between` (arithmetic, regime): of the cosine with
          $10^{-12}$ added to each squared norm.
        * `unclipped` (arithmetic, part, class_a): share of each class's points whose gradient is not exactly zero.
        * `decile_gap` (decile), `decile_within` (arithmetic, decile): training points in ten equal parts by logit gap,
          their mean gap, and the mean sign of pairs within classes that begin in each part.

    """
    exact = grams["exact"]
    return xr.merge(
        [
            _by_layer(layers, exact, y, parts),
            _by_rightness(exact, y, parts, right),
            _by_zero(grams, y, parts),
            _by_gap(grams, y, parts["train"], gap),
        ]
    )


def whole(layers: Mapping[str, GradientGram]) -> GradientGram:
    """The Gram matrix of all parameters from those of the layers."""
    grams = list(layers.values())
    norms, norms2 = (_together([getattr(gram, name) for gram in grams]) for name in ("norms", "norms2"))
    cos = sum(share(gram, norms, norms2) for gram in grams).clamp(-1, 1)
    pairs = grams[0].self_pairs
    return GradientGram(cos.where(~pairs, (norms != 0).double()[:, None]), norms, norms2, pairs)


def in_sections(layers: Mapping[str, GradientGram], section_of: Callable[[str], str]) -> dict[str, GradientGram]:
    """The Gram matrices of sections of a network, such as the layers of a transformer, from those of its modules."""
    members: dict[str, dict[str, GradientGram]] = {}
    for name, gram in layers.items():
        members.setdefault(section_of(name), {})[name] = gram
    return {section: whole(grams) for section, grams in members.items()}


def share(layer: GradientGram, norms: Tensor, norms2: Tensor) -> Tensor:
    """A layer's share in the cosines, (n, m), given the norms of the whole gradients."""
    rows, columns = ((part / total).nan_to_num(0.0) for part, total in ((layer.norms, norms), (layer.norms2, norms2)))
    return layer.cos * rows[:, None] * columns


def _together(norms: list[Tensor]) -> Tensor:
    """The norm of vectors from those of their pieces; squares of 1e-200 would underflow."""
    largest = torch.stack(norms).amax(dim=0)
    return largest * sum((norm / largest).nan_to_num(0.0).square() for norm in norms).sqrt()


def _by_layer(
    layers: Mapping[str, GradientGram], exact: GradientGram, y: Tensor, parts: dict[str, slice]
) -> xr.Dataset:
    number = {"layer": range(1, len(layers) + 1)}
    own = within_between(labelled([class_matrices(g, y, parts) for g in layers.values()], number | AXES, y))
    shares = [share(gram, exact.norms, exact.norms2) for gram in layers.values()]
    grams = [GradientGram(s, exact.norms, exact.norms2, exact.self_pairs) for s in shares]
    parts_of_cosine = [[cells(block, "cos", *ys) for block, *ys in blocks(gram, y, parts)] for gram in grams]
    return xr.merge(
        [_named("layer", own), _named("share", within_between(labelled(parts_of_cosine, number | REGIME, y)))]
    )


def _by_rightness(gram: GradientGram, y: Tensor, parts: dict[str, slice], right: Tensor) -> xr.Dataset:
    same, wrong = y[:, None] == y, (~right).int()
    kinds = wrong[:, None] + wrong  # 0, 1 or 2 wrong points
    means: dict[str, list] = {"pair_within": [], "pair_between": []}
    counts = []
    for rows, columns in sides(parts):
        block, here, kind = gram.block(rows, columns), same[rows, columns], kinds[rows, columns]
        values = [stiffness(block, measure) for measure in MEASURES]
        chosen = [(kind == k) & ~block.self_pairs for k in range(len(PAIRS))]
        for name, mask in (("pair_within", here), ("pair_between", ~here)):
            means[name].append([[float(v[c & mask].mean()) for v in values] for c in chosen])
        counts.append([int((c & here).sum()) for c in chosen])
    shares = np.array(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    named = {name: (("regime", "rightness", "measure"), values) for name, values in means.items()}
    return xr.Dataset({**named, "pair_share": (("regime", "rightness"), shares)}, AXES | {"rightness": list(PAIRS)})


def _by_zero(grams: Mapping[str, GradientGram], y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Pairs of which no gradient is zero, cosines with padded norms, and which points are left in each class."""
    alive, padded, unclipped = [], [], []
    classes, members = class_indicators(y)
    for gram in grams.values():
        nothing = gram.zero[:, None] | gram.zero2
        living = GradientGram(gram.cos, gram.norms, gram.norms2, gram.self_pairs | nothing)  # leaves those pairs out
        alive.append(class_matrices(living, y, parts))
        damped = [norms / (norms.square() + EPSILON).sqrt() for norms in (gram.norms, gram.norms2)]
        shrunk = GradientGram(gram.cos * damped[0][:, None] * damped[1], gram.norms, gram.norms2, gram.self_pairs)
        padded.append([cells(block, "cos", *ys) for block, *ys in blocks(shrunk, y, parts)])
        left = (~gram.zero).double()
        unclipped.append([(members[part].T @ left[part] / members[part].sum(0)).tolist() for part in parts.values()])
    axis = {"arithmetic": list(grams)}
    values = xr.DataArray(unclipped, axis | {"part": list(parts), "class_a": classes.numpy()}, name="unclipped")
    return xr.merge(
        [
            _named("alive", within_between(labelled(alive, axis | AXES, y))),
            _named("padded", within_between(labelled(padded, axis | REGIME, y))),
            values,
        ]
    )


def _by_gap(grams: Mapping[str, GradientGram], y: Tensor, train: slice, gap: Tensor) -> xr.Dataset:
    """Pairs of training points within classes by the decile of the first one's logit gap."""
    y, gap = y[train], gap[train]
    same = y[:, None] == y
    decile = torch.empty_like(y)
    decile[gap.argsort(stable=True)] = torch.arange(len(y)) * DECILES // len(y)
    chosen = (decile[:, None] == torch.arange(DECILES)).double()
    found = []
    for gram in grams.values():
        values = stiffness(gram.block(train, train), "sign").where(same, torch.nan)
        sums, pairs = values.nan_to_num(0.0).sum(dim=1), (~values.isnan()).double().sum(dim=1)
        found.append((chosen.T @ sums / (chosen.T @ pairs)).tolist())
    return xr.Dataset(
        {
            "decile_within": (("arithmetic", "decile"), found),
            "decile_gap": ("decile", (chosen.T @ gap / chosen.sum(0)).numpy()),
        },
        {"arithmetic": list(grams), "decile": range(1, DECILES + 1)},
    )


def _named(name: str, summaries: xr.Dataset) -> xr.Dataset:
    return summaries.rename({kind: f"{name}_{kind}" for kind in ("within", "between")})
