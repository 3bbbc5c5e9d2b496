"""What is needed of torchvision: importing it, transformers after it, and downloading its data sets.

Where its wheel is linked against CUDA and torch is the CPU-only one, `import torchvision` fails with "operator
torchvision::nms does not exist", and transformers' models then fail to import with a misleading message. With the
schemas of the two missing operators defined beforehand the import works; the operators themselves (and
`torchvision.io`) stay unusable, models, transforms and data sets work.
"""

import http.client
import importlib
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_keep_alive = []  # a library that is garbage-collected takes its schemas with it
_TIMEOUT = 15.0  # seconds without an answer after which a download is given up
_one_at_a_time = threading.Lock()  # the import and the socket timeout concern the whole process


def import_torchvision() -> ModuleType:
    """Return the module torchvision. Call it before anything imports torchvision or transformers.

    Raises:
        ImportError: torchvision is not installed; the message has the pip command.

    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError("torchvision is not installed: pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _keep_alive.append(library)
    return importlib.import_module("torchvision")


def import_transformers() -> ModuleType:
    """Return the module transformers, whose models want torchvision to be imported before.

    Raises:
        ImportError: transformers is not installed; the message has the pip command.

    """
    with suppress(ImportError):  # it does without torchvision, but not with one that fails to import
        import_torchvision()
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("models of sentences need transformers: pip install 'stiffkit[text]'") from None


def download(dataset: str, folder: Path) -> dict[str, np.ndarray]:
    """Download a class of `torchvision.datasets` into a folder, and return its images and labels.

    Returns:
        `x_train`, `x_test` (uint8), `y_train`, `y_test` (int64), in torchvision's order.

    Raises:
        ValueError: the download is truncated or corrupt: its MD5 is not the one that torchvision knows.
        ConnectionError: no network, or a server that does not answer.
        ImportError: torchvision is not installed.

    """
    with _one_at_a_time, _socket_timeout(_TIMEOUT):
        read = getattr(import_torchvision().datasets, dataset)
        try:
            parts = {part: read(folder, train=part == "train", download=True) for part in ("train", "test")}
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            if "corrupted" in reason:
                raise ValueError(
                    f"the download is truncated or corrupt, its MD5 is not the official one ({reason})"
                ) from error
            raise ConnectionError(reason) from error
    images = {f"x_{part}": np.asarray(data.data) for part, data in parts.items()}
    return images | {f"y_{part}": np.asarray(data.targets, dtype=np.int64) for part, data in parts.items()}


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout: torchvision sets none, and a network that swallows packets would hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
