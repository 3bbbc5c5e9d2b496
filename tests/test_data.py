"""Data sets: preprocessing, splits, balanced subsets, and the real data."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import made_up, same, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiffkit import archives, data


def rows(points):
    """Each point as bytes of its image and its label, so that points can be counted and compared."""
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(*points, strict=True)]


# The embedded set


def test_digits_are_whole_split_and_official():
    digits = data.load("digits")
    assert sum(len(y) for _, y in (digits.train, digits.validation, digits.test)) == 1797
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in (digits.train, digits.test))
    assert digits.test[1].bincount().min() >= 29
    assert (digits.train[0].flatten(1).norm(dim=1) - 1).abs().max() < 1e-6
    assert archives.verify("digits") == digits.checksum
    assert same(digits, data.load("digits"))


def test_repr_is_one_line():
    assert repr(data.load("digits")) == (
        "<Dataset digits: 10 classes, points (1, 8, 8), 1,201 train, 296 validation, 300 test>"
    )


# Preprocessing and splits, on made-up files


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    classes=st.integers(2, 5),
    train=st.integers(1, 4),
    test=st.integers(2, 7),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    colour=st.booleans(),
    sphere=st.booleans(),
)
def test_load_agrees_with_a_loop_over_images(data_folder, seed, classes, train, test, size, colour, sphere):
    arrays = made_up(seed, classes, train, test, size, colour)
    write(data_folder, arrays)
    loaded = data.load("mnist", sphere=sphere)
    assert loaded.shape == (3 if colour else 1, *size)

    channels = arrays["x_train"].astype(float).reshape(-1, loaded.shape[0])
    mean, std = channels.mean(axis=0), channels.std(axis=0)
    expected = {}
    for part in ("train", "test"):
        points = sorted(
            zip(arrays[f"y_{part}"], arrays[f"x_{part}"], strict=True), key=lambda p: (p[0], p[1].tobytes())
        )
        images = []
        for _, image in points:
            standard = (image.reshape(*size, -1) - mean) / np.where(std > 0, std, 1)
            norm = np.sqrt((standard**2).sum())
            images.append(np.moveaxis(standard / norm if sphere and norm > 0 else standard, -1, 0))
        expected[part] = torch.from_numpy(np.array(images)), torch.tensor([int(label) for label, _ in points])

    torch.testing.assert_close(loaded.train[0].double(), expected["train"][0], rtol=1e-6, atol=1e-7)
    assert torch.equal(loaded.train[1], expected["train"][1])
    halves = loaded.validation[1].bincount(minlength=classes), loaded.test[1].bincount(minlength=classes)
    assert halves[0].tolist() == [test // 2] * classes
    assert halves[1].tolist() == [test - test // 2] * classes
    whole = torch.cat([loaded.validation[0], loaded.test[0]]).double()
    assert torch.allclose(whole.sum(), expected["test"][0].sum(), atol=1e-4)


def test_halves_are_disjoint_and_together_the_test_split(data_folder):
    arrays = made_up(classes=10, test=9, size=(4, 4))
    write(data_folder, arrays)
    loaded = data.load("mnist")
    validation, test = rows(loaded.validation), rows(loaded.test)
    assert len(set(validation) | set(test)) == len(validation) + len(test) == 90
    assert [label for _, label in test] == sorted(label for _, label in test)


@pytest.mark.parametrize("sphere", [True, False])
def test_constant_images_give_no_nan(data_folder, sphere):
    arrays = made_up()
    arrays["x_train"][:] = 7  # no spread, and every training image becomes zero
    arrays["x_test"][:5] = 7
    write(data_folder, arrays)
    loaded = data.load("mnist", sphere=sphere)
    assert torch.equal(loaded.train[0], torch.zeros_like(loaded.train[0]))
    assert all(points[0].isfinite().all() for points in (loaded.validation, loaded.test))


# balanced_subset


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    draw=st.data(),
)
def test_balanced_subset_is_balanced_distinct_and_nested(counts, seed, dtype, draw):
    labels = [3 * k for k in range(len(counts))]  # classes need not be 0 to K - 1
    y = torch.tensor(np.repeat(labels, counts), dtype=dtype)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    each = draw.draw(st.integers(1, min(counts)))
    indices = data.balanced_subset(y, each * len(counts), seed)
    assert indices.dtype == torch.int64
    assert y[indices].tolist() == np.repeat(labels, each).tolist()
    assert len(set(indices.tolist())) == len(indices)
    assert torch.equal(indices, data.balanced_subset(y, each * len(counts), seed))
    assert set(indices.tolist()) <= set(data.balanced_subset(y, min(counts) * len(counts), seed).tolist())


def test_a_seed_means_the_same_points_everywhere():
    y = torch.arange(1000) % 3
    assert data.balanced_subset(y, 9, seed=1).tolist() == PINNED
    assert data.balanced_subset(y, 9, seed=2).tolist() != PINNED


@settings(deadline=None)
@given(n=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_random_labels_permute_a_share_among_themselves(n, share, seed):
    y = torch.arange(n) % 7
    permuted = data.random_labels(y, share, seed)
    assert permuted.bincount(minlength=7).equal(y.bincount(minlength=7))
    assert int((permuted != y).sum()) <= round(share * n)
    assert permuted.equal(data.random_labels(y, share, seed))
    assert y.equal(torch.arange(n) % 7)


def test_the_points_with_random_labels_grow_with_the_share():
    y = torch.arange(10_000)  # every label its own, so that a point that keeps it is one in 10,000
    changed = [set((data.random_labels(y, share, 3) != y).nonzero()[:, 0].tolist()) for share in (0.25, 0.5, 1.0)]
    for few, more in pairwise(changed):
        assert len(few - more) <= 3
    assert [len(c) for c in changed] == pytest.approx([2500, 5000, 10_000], abs=5)
    assert not data.random_labels(y, 1.0, 3).equal(data.random_labels(y, 1.0, 4))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_random_labels_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        data.random_labels(torch.arange(5), share, 1)


PINNED = [177, 810, 540, 985, 445, 142, 833, 734, 836]


@pytest.mark.parametrize(
    ("y", "size", "message"),
    [
        ([0, 0, 1, 1], 3, "multiple of the 2 classes in y: got 3"),
        ([0, 0, 1, 1], 0, "positive multiple"),
        ([0, 0, 1, 1], -2, "positive multiple"),
        ([0, 0, 0, 4, 4], 6, "class 4 has only 2 points, size 6 needs 3: take at most 4"),
        ([], 2, "at least one integer label"),
        ([0.0, 1.0], 2, "integer label.*float32"),
        ([[0, 1]], 2, r"shape \(1, 2\)"),
    ],
)
def test_balanced_subset_refuses(y, size, message):
    with pytest.raises(ValueError, match=message):
        data.balanced_subset(torch.tensor(y), size, seed=1)


# The real data, where they are


@pytest.mark.parametrize(
    ("name", "sizes", "mean", "std"),
    [
        ("mnist", (60000, 4999, 5001), [0.1307], [0.3081]),
        ("fashion_mnist", (60000, 5000, 5000), [0.2860], [0.3530]),
        ("cifar10", (50000, 5000, 5000), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_data(name, sizes, mean, std):
    path = archives.location(name)
    if not path.exists():
        pytest.skip(f"{path} is not there (stiffkit data fetch {name})")
    loaded = data.load(name, sphere=False)
    assert loaded.checksum == archives.SOURCES[name].checksum
    assert tuple(len(y) for _, y in (loaded.train, loaded.validation, loaded.test)) == sizes
    darkest = loaded.train[0].amin(dim=(0, 2, 3))  # a black pixel is -mean / std, the numbers known from the literature
    torch.testing.assert_close(darkest, -torch.tensor(mean) / torch.tensor(std), rtol=1e-3, atol=0)
    variance, means = torch.var_mean(loaded.train[0].double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-6, atol=0)
    assert means.abs().max() < 1e-7
