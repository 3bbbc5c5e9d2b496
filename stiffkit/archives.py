r"""The files of the data sets: where they lie, fetching them, and what must be in them.

`digits` (scikit-learn's) and `hierarchy` (generated) are embedded. The others are read from `NAME.npz` in the folder
`$STIFFKIT_DATA` (default: the user's cache folder), in the layout of Keras' `mnist.npz`:

* `x_train`, `x_test`: images, shape (n, h, w) or (n, h, w, 3), uint8;
* `y_train`, `y_test`: labels 0 to K - 1, shape (n,), any integer type;
* `classes`: the names of the K classes, shape (K,), strings; may be left out.

Anything else in it is not read: the superclasses of CIFAR-100 are in `stiffkit.superclasses`, by the names of classes.

A missing file is fetched through torchvision, which checks the MD5 of what it downloads.
"""

import difflib
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stiffkit._torchvision import download
from stiffkit.superclasses import SUPERCLASSES, classes_of


@dataclass(frozen=True)
class _Source:
    classes: tuple[str, ...]
    checksum: str
    torchvision: str | None  # its class of torchvision.datasets; None: embedded


_NUMERALS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOURCES = {
    "digits": _Source(_NUMERALS, "7fc3a0ba337bf67a680280fe36b589861738dc726cedc2405f93832c11e2183a", None),
    "mnist": _Source(_NUMERALS, "09188002361db2d0c735b4c24c7f3b42b2ec471eb2d28af44306628fd69c65ec", "MNIST"),
    "fashion_mnist": _Source(
        _CLOTHES, "52290e8ad52b63890e762aaa12e38cb18652e834a7328ff70d1581a8c6004f58", "FashionMNIST"
    ),
    "cifar10": _Source(_OBJECTS, "7eee070fdc68a599fde3bdeedcc0b4fd335a33cbd3b2d0f497d98534969cf616", "CIFAR10"),
    "cifar100": _Source(
        classes_of("cifar100"), "eebbf9e2df955b0215939663cfb641136436198cad9a864f9493f21651bb1988", "CIFAR100"
    ),
    "hierarchy": _Source(
        classes_of("hierarchy"), "c691c1f580ce30e4e12d37cffdedbf43af9fd09751f08151d0e4295fbecfdef7", None
    ),
}


def data_folder() -> Path:
    """Return the folder of the `.npz` files: `$STIFFKIT_DATA`, by default one in the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STIFFKIT_DATA")
    return Path(chosen).expanduser() if chosen else user_cache_path("stiffkit", appauthor=False) / "data"


def location(name: str) -> Path | None:
    """Return where the file of a data set belongs, whether or not it is there; None for an embedded one."""
    return data_folder() / f"{name}.npz" if _source(name).torchvision else None


def fetch(name: str) -> Path:
    """Make sure that the file of a data set is there, and return its path. A file that is there is left alone.

    Downloads through torchvision, which checks the MD5, into a temporary folder beside the file, and moves the `.npz`
    into its place when it is whole. Processes that fetch the same data at once wait for the first of them. The file
    can be copied to other machines.

    Raises:
        ValueError: an unknown name, an embedded data set, or a download that is corrupt.
        FileNotFoundError: the download failed.
        OSError: the folder cannot be written.
        ImportError: torchvision is not installed.

    """
    path = location(name)
    if path is None:
        raise ValueError(f"{name} is embedded, there is nothing to fetch")
    if path.exists():
        return path
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(f"{path.parent} cannot be written ({error}). Set STIFFKIT_DATA to a folder that can.") from None
    try:
        if not path.exists():
            _fetch_into(path, name)
    finally:
        lock.release()
    return path


def verify(name: str) -> str:
    """Return the checksum of a data set (see `stiffkit.data.Dataset`) if the data are official. Fetches nothing.

    Raises:
        ValueError: other data, or a file that is corrupt or not in the layout above.
        FileNotFoundError: there is no file.

    """
    path = location(name)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path} is not there. {_HOW_TO_GET.format(name=name, folder=path.parent)}")
    found, official = checksum(read(name)[0]), _source(name).checksum
    if found != official:
        raise ValueError(f"{path or name} does not hold the official data: its checksum is {found}, not {official}")
    return found


_HOW_TO_GET = (
    "Run `stiffkit data fetch {name}` where there is a network, copy {name}.npz from another machine into {folder} "
    "(another folder: set STIFFKIT_DATA), or take the embedded data set digits."
)


def _source(name: str) -> _Source:
    if name not in SOURCES:
        near = difflib.get_close_matches(str(name).lower(), SOURCES, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no data set {name!r}.{suggestion} Known are {', '.join(SOURCES)}.")
    return SOURCES[name]


def _fetch_into(path: Path, name: str) -> None:
    how = _HOW_TO_GET.format(name=name, folder=path.parent)
    source = _source(name)
    unpacked = path.with_name(f".{name}.part")
    shutil.rmtree(unpacked, ignore_errors=True)  # what a killed process left: whoever is here holds the lock
    try:
        unpacked.mkdir()
        arrays = download(source.torchvision, unpacked)
        np.savez(unpacked / path.name, **arrays, classes=np.array(source.classes))
        os.replace(unpacked / path.name, path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. {how}") from None
    except OSError as error:
        raise FileNotFoundError(f"{path} is not there and could not be fetched ({error}). {how}") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def read(name: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the four arrays in canonical order, images as (n, h, w, c), and the names of the classes."""
    if _source(name).torchvision is None:
        return _EMBEDDED[name](), _source(name).classes
    path = fetch(name)
    try:
        return _canonical(_open(path), _source(name).classes)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}. Delete it and run `stiffkit data fetch {name}`, or put a sound copy in its place."
        ) from None


def _read_digits() -> dict[str, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    x, y = _sorted(digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int64))
    test = fixed_part(y, 3)
    return {"x_train": x[~test], "y_train": y[~test], "x_test": x[test], "y_test": y[test]}


def _generated() -> dict[str, np.ndarray]:
    """Images of 8 x 8: a pattern of the realm, one of the superclass, one of the class and noise, in integers."""
    random = np.random.RandomState(0)
    realms, superclasses = len(SUPERCLASSES["hierarchy"]) // 3, len(SUPERCLASSES["hierarchy"])
    classes = len(classes_of("hierarchy"))
    sizes = (realms, superclasses, classes)
    patterns = [random.randint(0, 256, (n, 8, 8)).repeat(classes // n, axis=0) for n in sizes]
    means = sum(weight * pattern for weight, pattern in zip((3, 4, 3), patterns, strict=True))
    arrays = {}
    for part, each in (("train", 60), ("test", 40)):
        y = np.arange(classes).repeat(each)
        x = (means[y] + 6 * random.randint(0, 256, (len(y), 8, 8))) // 16
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _sorted(x.astype(np.uint8)[..., None], y)
    return arrays


_EMBEDDED = {"digits": _read_digits, "hierarchy": _generated}


def shuffled_classes(y: np.ndarray, seed: int) -> dict[int, np.ndarray]:
    """Return the indices of each class, shuffled."""
    random = np.random.RandomState(seed)  # the one generator whose stream NumPy promises never to change
    return {int(label): random.permutation(np.flatnonzero(y == label)) for label in np.unique(y)}


def fixed_part(y: np.ndarray, parts: int) -> np.ndarray:
    """Return a mask of 1/`parts` of each class (rounded down), drawn once for all."""
    drawn = np.zeros(len(y), dtype=bool)
    for indices in shuffled_classes(y, seed=0).values():
        drawn[indices[: len(indices) // parts]] = True
    return drawn


_UNSOUND = (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def _open(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:  # np.load(path) may leak it
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except _UNSOUND as error:
        raise ValueError(f"not a sound .npz file of plain arrays ({error})") from None
    missing = [f"{axis}_{part}" for axis in "xy" for part in ("train", "test") if f"{axis}_{part}" not in arrays]
    if missing:
        raise ValueError(f"no array {', '.join(missing)} in it (found: {', '.join(arrays) or 'none'})")
    return arrays


def _canonical(
    arrays: Mapping[str, np.ndarray], default_classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    classes = _checked_classes(arrays["classes"]) if "classes" in arrays else default_classes
    result = {}
    for part, least in (("train", 1), ("test", 2)):  # each half of the test split needs one
        x, y = _checked_part(arrays[f"x_{part}"], arrays[f"y_{part}"], part, len(classes))
        counts = np.bincount(y, minlength=len(classes))
        if counts.min() < least:
            raise ValueError(f"class {counts.argmin()} has {counts.min()} points in y_{part}, at least {least} needed")
        result[f"x_{part}"], result[f"y_{part}"] = _sorted(x, y)
    train, test = (result[f"x_{part}"].shape[1:] for part in ("train", "test"))
    if train != test:
        raise ValueError(f"the images of x_train and x_test differ in size: {train} and {test}")
    return result, classes


def _checked_classes(classes: np.ndarray) -> tuple[str, ...]:
    if classes.ndim != 1 or classes.dtype.kind not in "Uiu" or len(set(classes.tolist())) < max(2, classes.size):
        raise ValueError(
            "classes must be at least 2 different names, strings of shape (K,): "
            f"got {classes.dtype}, shape {classes.shape}"
        )
    return tuple(map(str, classes.tolist()))


def _checked_part(x: np.ndarray, y: np.ndarray, part: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)) or 0 in x.shape:
        raise ValueError(
            f"x_{part} must be uint8 images, shape (n, h, w) or (n, h, w, 3): got {x.dtype}, shape {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(
            f"y_{part} must be integers, one for each image, shape ({len(x)},): got {y.dtype}, shape {y.shape}"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"the labels in y_{part} run from {y.min()} to {y.max()}, must be 0 to {classes - 1}")
    return (x if x.ndim == 4 else x[..., None]), y.astype(np.int64)


def _sorted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By class, then by image bytes (rows, columns, channels): the same for whatever order the source has."""
    x = np.ascontiguousarray(x)
    images = x.reshape(len(x), -1).view(f"S{x[0].size}")[:, 0]  # compared as bytes: far faster than column by column
    order = np.lexsort((images, y))
    return x[order], y[order]


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the four arrays of `read` (see `stiffkit.data.Dataset`)."""
    digest = hashlib.sha256()
    for key in ("x_train", "y_train", "x_test", "y_test"):
        array = arrays[key].astype("|u1" if key.startswith("x") else "<i8", copy=False)
        digest.update(f"{key} {array.shape} ".encode())
        digest.update(array)
    return digest.hexdigest()
