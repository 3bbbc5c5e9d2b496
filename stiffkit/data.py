"""Data sets: labelled images in one canonical order, standardised, with fixed splits.

Where they come from, and what a file must hold: `stiffkit.archives`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from stiffkit.archives import SOURCES, checksum, fixed_part, read, shuffled_classes

Points = tuple[torch.Tensor, torch.Tensor]
NAMES = tuple(SOURCES)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, ready for a network.

    Attributes:
        name: as in `load`.
        classes: the names of the K classes.
        train, validation, test: `(inputs, targets)`: (n, c, h, w) float32 and (n,) int64 in 0 to K - 1, in canonical
            order (class, then image bytes). Onset of overfitting and stopping are judged on `validation`, every
            generalization number on `test`: they are the two halves of the official test split, class by class.
        checksum: SHA-256 of the images (uint8) and labels (int64) in canonical order, before preprocessing; the same
            for the same data in whatever order or integer type the file has them.

    """

    name: str
    classes: tuple[str, ...]
    train: Points
    validation: Points
    test: Points
    checksum: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train[0].shape[1:])

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, part)[1]):,} {part}" for part in ("train", "validation", "test"))
        return f"<Dataset {self.name}: {len(self.classes)} classes, points {self.shape}, {sizes}>"


def load(name: str, *, sphere: bool = True) -> Dataset:
    r"""Load a data set; a file that is missing is fetched first.

    Images are standardised with the mean and standard deviation of the training set, one of each per channel, and
    then, with `sphere`, each image $x$ is scaled to $x / \lVert x \rVert_2$, as in v3 of the paper (an image that is
    zero stays zero). Computed in float64, returned as float32.

    Args:
        name: one of `stiffkit.data.NAMES`.
        sphere: scale each image to unit norm.

    Raises:
        ValueError: an unknown name, or a file that is corrupt or not in the layout of `stiffkit.archives`.
        FileNotFoundError: the file is missing and cannot be fetched.
        ImportError: scikit-learn (`digits`) or torchvision (a missing file) is not installed.

    >>> digits = load("digits")
    >>> digits
    <Dataset digits: 10 classes, points (1, 8, 8), 1,201 train, 296 validation, 300 test>
    >>> digits.train[0].flatten(1).norm(dim=1).mean().round(decimals=4)
    tensor(1.)

    """
    arrays, classes = read(name)
    mean, std = _channel_moments(arrays["x_train"])
    y = {part: torch.from_numpy(arrays[f"y_{part}"]) for part in ("train", "test")}
    x = {part: _standardise(arrays[f"x_{part}"], mean, std, sphere) for part in ("train", "test")}
    validation = torch.from_numpy(fixed_part(arrays["y_test"], 2))
    test = ~validation
    return Dataset(
        name=name,
        classes=classes,
        train=(x["train"], y["train"]),
        validation=(x["test"][validation], y["test"][validation]),
        test=(x["test"][test], y["test"][test]),
        checksum=checksum(arrays),
    )


def balanced_subset(y: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Draw the same number of points from every class that occurs in `y`.

    Args:
        y: labels, shape (n,), an integer dtype.
        size: number of points to draw, a positive multiple of the number of classes in `y`.
        seed: 0 to 2**32 - 1. The smaller of two sizes with one seed draws a subset of the larger.

    Returns:
        Indices into `y`, shape (size,), int64, on `y`'s device, class by class, within a class in the order drawn.

    Raises:
        ValueError: a size that is not such a multiple, or a class with too few points.

    >>> y = torch.tensor([0, 1, 0, 1, 1, 0])
    >>> y[balanced_subset(y, 4, seed=1)]
    tensor([0, 0, 1, 1])

    """
    if y.ndim != 1 or y.is_floating_point() or len(y) == 0:
        raise ValueError(f"y must hold at least one integer label, shape (n,): got {y.dtype}, shape {tuple(y.shape)}")
    members = shuffled_classes(y.cpu().numpy(), seed)
    share, rest = divmod(size, len(members))
    if size < 1 or rest:
        raise ValueError(f"size must be a positive multiple of the {len(members)} classes in y: got {size}")
    for label, indices in members.items():
        if len(indices) < share:
            most = len(members) * min(map(len, members.values()))
            raise ValueError(
                f"class {label} has only {len(indices)} points, size {size} needs {share}: take at most {most}"
            )
    return torch.from_numpy(np.concatenate([indices[:share] for indices in members.values()])).to(y.device)


def random_labels(y: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Permute a share of the labels among themselves, all of them in Fort et al., v1, Fig. 4.

    Every class keeps its size. Some of the permuted points get their own label again: of K balanced classes one in K.

    Args:
        y: labels, shape (n,), an integer dtype.
        share: of the points whose labels are permuted, in [0, 1]; which ones is drawn as well.
        seed: 0 to 2**32 - 1. The points of the smaller of two shares are among those of the larger.

    Returns:
        Labels, shape (n,), as `y`.

    >>> y = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> random_labels(y, 0.0, seed=1).equal(y), random_labels(y, 1.0, seed=1).bincount()
    (True, tensor([3, 3]))

    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be a number from 0 to 1: got {share}")
    random = np.random.RandomState(seed)
    chosen = random.permutation(len(y))[: round(share * len(y))]
    permuted = y.clone()
    permuted[torch.from_numpy(chosen)] = y[torch.from_numpy(random.permutation(chosen))]
    return permuted


def _channel_moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, from sums of integers: the same on every machine."""
    values = np.arange(256, dtype=np.int64)
    means, stds = [], []
    for channel in range(x.shape[3]):
        counts = torch.bincount(torch.from_numpy(x[..., channel].reshape(-1)), minlength=256).numpy()
        n, first, second = int(counts.sum()), int(counts @ values), int(counts @ values**2)
        means.append(first / n)
        stds.append(math.sqrt((n * second - first**2) / n**2))
    return np.array(means), np.array(stds)


def _standardise(x: np.ndarray, mean: np.ndarray, std: np.ndarray, sphere: bool) -> torch.Tensor:
    n, height, width, channels = x.shape
    mean, std = mean[:, None, None], np.where(std > 0, std, 1.0)[:, None, None]
    result = np.empty((n, channels, height, width), dtype=np.float32)
    for start in range(0, n, 128):  # in place and in NumPy: quick, and the sums do not depend on the number of threads
        images = x[start : start + 128].transpose(0, 3, 1, 2).astype(np.float64, order="C")
        images -= mean
        images /= std
        if sphere:
            norms = np.sqrt(np.einsum("nchw,nchw->n", images, images))
            images /= np.where(norms > 0, norms, 1.0)[:, None, None, None]
        result[start : start + 128] = images
    return torch.from_numpy(result)
