"""Layers by themselves: products and norms of their gradients against autograd, sample by sample, of any shape."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from stiffkit.layers import Buffer, has_shape, layer_products, layer_squares, squares_and_sum, without_idle_positions

pytestmark = pytest.mark.usefixtures("one_thread")
quick = settings(max_examples=60, deadline=None, derandomize=True)
few = st.integers(1, 3)
SLICES = st.sampled_from([1, 400, 4_000, 2**20])  # bytes: from one column at a time to all of them


def signal(module, a):
    """A layer's signal for random output gradients, and its per-sample gradients (n, numbers) by autograd."""
    out = module(a)
    b = torch.randn_like(out)
    rows = []
    for i in range(len(a)):
        found = torch.autograd.grad(module(a[i : i + 1]), list(module.parameters()), b[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in found]))
    return without_idle_positions(module, a, b), torch.stack(rows)


def check(module, a, a2, slice_bytes):
    """Hold products of two sets, and of the first with itself, to those of autograd's gradients."""
    module.double()
    assert has_shape(module, a, len(a))
    (rows, g), (columns, h) = signal(module, a), signal(module, a2)
    check_products(module, [rows], [columns], g, h, slice_bytes)
    buffer = Buffer(slice_bytes)
    agree([layer_squares(module, *rows, buffer)], [g.square().sum(1)])
    agree(squares_and_sum(module, *rows, buffer), (g.square().sum(1), g.sum(0).square().sum()))


def check_products(module, rows, columns, g, h, slice_bytes):
    buffers = Buffer(slice_bytes), Buffer(slice_bytes)
    agree(layer_products(module, rows, rows, buffers), (g @ g.T, g.square().sum(1), g.square().sum(1)))
    agree(layer_products(module, rows, columns, buffers), (g @ h.T, g.square().sum(1), h.square().sum(1)))


def agree(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@quick
@given(
    lengths=st.lists(few, min_size=2, max_size=4), n=few, bias=st.booleans(), tokens=st.booleans(), slice_bytes=SLICES
)
def test_pieces_of_different_lengths(lengths, n, bias, tokens, slice_bytes):
    """As a model makes them that cuts each batch of sequences to the longest of them."""
    module = (nn.Embedding(4, 3, padding_idx=0) if tokens else nn.Linear(3, 2, bias=bias)).double()

    def pieces(lengths):
        drawn = [torch.randint(4, (n, t)) if tokens else torch.randn(n, t, 3, dtype=torch.float64) for t in lengths]
        found, gradients = zip(*(signal(module, a) for a in drawn), strict=True)
        return list(found), torch.cat(gradients)

    (rows, g), (columns, h) = pieces(lengths), pieces(lengths[1:])
    check_products(module, rows, columns, g, h, slice_bytes)


@quick
@given(
    n=few,
    m=few,
    dimensions=few,
    groups=few,
    width=few,
    kernel=few,
    stride=few,
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
    bias=st.booleans(),
    last=st.booleans(),
    slice_bytes=SLICES,
)
def test_convolutions(
    n, m, dimensions, groups, width, kernel, stride, dilation, padding, mode, bias, last, slice_bytes
):
    shape = [5, 4, 6][:dimensions]
    assume(all(size + 2 * padding > dilation * (kernel - 1) for size in shape))
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode, "bias": bias}
    module = kind(groups * width, groups * 2, kernel, groups=groups, **options)
    a, a2 = (torch.randn(k, groups * width, *shape, dtype=torch.float64) for k in (n, m))
    if last and dimensions == 2:
        a = a.contiguous(memory_format=torch.channels_last)
    check(module, a, a2, slice_bytes)


@quick
@given(n=st.integers(1, 9), m=few, positions=few, more=few, padding=st.none() | st.just(0), slice_bytes=SLICES)
def test_embeddings(n, m, positions, more, padding, slice_bytes):
    """Few tokens, so that many samples have one, and sequences of different lengths in the two sets."""
    module = nn.Embedding(4, 3, padding_idx=padding)
    check(module, torch.randint(4, (n, positions)), torch.randint(4, (m, more)), slice_bytes)


@quick
@given(n=few, m=few, positions=few, inputs=few, outputs=few, bias=st.booleans(), slice_bytes=SLICES)
def test_linear_layers_on_sequences(n, m, positions, inputs, outputs, bias, slice_bytes):
    module = nn.Linear(inputs, outputs, bias=bias)
    a, a2 = (torch.randn(k, positions, inputs, dtype=torch.float64) for k in (n, m))
    check(module, a, a2, slice_bytes)


@quick
@given(n=few, m=few, positions=few, width=st.integers(2, 4), kind=st.sampled_from(["layer", "rms", "group", "batch"]))
def test_normalisations(n, m, positions, width, kind):
    modules = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width),
        "group": lambda: nn.GroupNorm(1, width),
        "batch": lambda: nn.BatchNorm1d(width).eval(),
    }
    shape = (width, positions) if kind in ("group", "batch") else (positions, width)
    check(modules[kind](), *(torch.randn(k, *shape, dtype=torch.float64) for k in (n, m)), 2**20)
