"""Fixtures that several test files share, and made-up data sets."""

import gzip
import hashlib
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items):
    """Files with slow tests go first, so that processes side by side end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def made_up(seed=0, classes=10, train=3, test=4, size=(3, 5), colour=False):
    """The arrays of a file: `train` and `test` random images of each class, shuffled."""
    random = np.random.default_rng(seed)
    arrays = {}
    for part, each in (("train", train), ("test", test)):
        y = random.permutation(np.repeat(np.arange(classes), each))
        arrays[f"x_{part}"] = random.integers(0, 256, (len(y), *size, *([3] if colour else [])), dtype=np.uint8)
        arrays[f"y_{part}"] = y
    return arrays | {"classes": np.array([f"class {k}" for k in range(classes)])}


def write(folder, arrays, name="mnist"):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)


def same(first, second):
    parts = ("train", "validation", "test")
    return first.checksum == second.checksum and all(
        torch.equal(a, b) for part in parts for a, b in zip(getattr(first, part), getattr(second, part), strict=True)
    )


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty folder in place of the user's data."""
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """A folder with `book` and `cache`, neither of them there yet, in place of the checkout's and the user's."""
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path / "book"))
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        self.server.requests.append(self.path)


@pytest.fixture(scope="session", autouse=True)
def _not_the_users_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_runs(own_folders):
    """An empty cache, and a book with the ledger alone."""
    (own_folders / "book").mkdir()
    shutil.copy(Path(__file__).parent.parent / "book/claims.yml", own_folders / "book/claims.yml")
    return own_folders


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server on this machine: what lies in `server.folder` is at `server.url`; `server.requests` is its log."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=folder)) as running:
        running.folder, running.requests = folder, []
        running.url = f"http://127.0.0.1:{running.server_port}/"
        threading.Thread(target=running.serve_forever, args=(0.02,)).start()
        yield running
        running.shutdown()


@pytest.fixture
def served_mnist(server, monkeypatch):
    """A made-up MNIST of 40 + 40 images, 3 x 4 pixels, that torchvision downloads from `server` with real MD5s."""
    from stiffkit._torchvision import import_torchvision

    random = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = random.integers(0, 256, (40, 3, 4), dtype=np.uint8)
        arrays[f"y_{part}"] = random.permutation(np.arange(40) % 10).astype(np.uint8)
    resources = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in (("images-idx3", arrays[f"x_{part}"]), ("labels-idx1", arrays[f"y_{part}"])):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            packed = gzip.compress(header + array.tobytes())
            (server.folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(packed)
            resources.append((f"{prefix}-{kind}-ubyte.gz", hashlib.md5(packed).hexdigest()))
    mnist = import_torchvision().datasets.MNIST
    monkeypatch.setattr(mnist, "mirrors", [server.url])
    monkeypatch.setattr(mnist, "resources", resources)
    return arrays


@pytest.fixture(scope="module")
def one_thread():
    """Small matrices are slower in two threads, by far on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
