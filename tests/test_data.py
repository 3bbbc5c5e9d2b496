"""Data sets: canonical order, preprocessing, splits, files that are missing or broken, and real downloads."""

import hashlib
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiffkit import _torchvision, data

reuses_folder = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
    assert data.verify("digits") == digits.checksum
    assert same(digits, data.load("digits"))


def test_repr_is_one_line():
    assert repr(data.load("digits")) == (
        "<Dataset digits: 10 classes, images (1, 8, 8), 1,201 train, 296 validation, 300 test>"
    )


# Preprocessing, order and splits, on made-up files


@reuses_folder
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


@reuses_folder
@given(seed=st.integers(0, 2**16), colour=st.booleans())
def test_order_and_label_type_of_the_file_do_not_matter(data_folder, seed, colour):
    arrays = made_up(1, classes=10, train=5, colour=colour)
    write(data_folder, arrays)
    first = data.load("mnist")
    random = np.random.default_rng(seed)
    for part in ("train", "test"):
        order = random.permutation(len(arrays[f"y_{part}"]))
        arrays[f"x_{part}"] = np.asfortranarray(arrays[f"x_{part}"][order])
        arrays[f"y_{part}"] = arrays[f"y_{part}"][order].astype(random.choice(["u1", ">i2", "<i4", "u8"]))
    write(data_folder, arrays)
    assert same(first, data.load("mnist"))


def test_one_changed_pixel_changes_the_checksum(data_folder):
    arrays = made_up()
    write(data_folder, arrays)
    before = data.load("mnist").checksum
    arrays["x_test"][0, 0, 0] ^= 1
    write(data_folder, arrays)
    assert data.load("mnist").checksum != before


def test_keras_layout_has_small_labels_and_no_classes(data_folder):
    arrays = made_up()
    del arrays["classes"]
    for part in ("train", "test"):
        arrays[f"y_{part}"] = arrays[f"y_{part}"].astype(np.uint8)
    data_folder.mkdir()
    np.savez_compressed(data_folder / "fashion_mnist.npz", **arrays)
    assert data.load("fashion_mnist").classes[:2] == ("T-shirt/top", "Trouser")


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


# What is wrong is said, with file, rule and remedy


@pytest.mark.parametrize(
    ("name", "near"), [("minst", "mnist"), ("MNIST", "mnist"), ("cifar", "cifar10"), ("../mnist", "mnist")]
)
@pytest.mark.parametrize("call", [data.load, data.fetch, data.verify])
def test_a_typo_is_answered_with_the_known_names(data_folder, call, name, near):
    with pytest.raises(ValueError, match=f"Did you mean '{near}'.*Known are digits, mnist, fashion_mnist, cifar10"):
        call(name)


def broken(**changes):
    return lambda arrays: arrays | {key: change(arrays[key]) for key, change in changes.items()}


def without(*keys):
    return lambda arrays: {key: array for key, array in arrays.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("y_test"), r"no array y_test in it \(found: x_train"),
        (without("x_train", "y_train"), "no array x_train, y_train"),
        (broken(x_train=lambda x: x / 255), "x_train must be uint8 images.*float64"),
        (broken(x_test=lambda x: x.reshape(len(x), -1)), r"x_test must be uint8 images.*shape \(40, 15\)"),
        (broken(x_train=lambda x: np.stack([x] * 4, axis=3)), r"\(n, h, w, 3\): got uint8, shape \(30, 3, 5, 4\)"),
        (broken(x_test=lambda x: x[:, :0]), r"shape \(40, 0, 5\)"),
        (broken(x_test=lambda x: x[:, :2]), r"differ in size: \(3, 5, 1\) and \(2, 5, 1\)"),
        (broken(x_test=lambda x: np.stack([x] * 3, axis=3)), "differ in size"),
        (broken(y_train=lambda y: y.astype(float)), "y_train must be integers.*float64"),
        (broken(y_train=lambda y: y[:, None]), r"y_train must be integers.*shape \(30, 1\)"),
        (broken(y_test=lambda y: y[1:]), r"one for each image, shape \(40,\): got int64, shape \(39,\)"),
        (broken(y_train=lambda y: y + 1), "labels in y_train run from 1 to 10, must be 0 to 9"),
        (broken(y_test=lambda y: y - 1), "labels in y_test run from -1 to 8"),
        (broken(y_train=lambda y: y.astype("u8") + 2**63), "must be 0 to 9"),
        (broken(y_train=lambda y: np.where(y == 4, 5, y)), "class 4 has 0 points in y_train, at least 1"),
        (broken(y_test=lambda y: np.where(y == 4, 5, y)), "class 4 has 0 points in y_test, at least 2"),
        (broken(classes=lambda c: c[:, None]), "classes must be at least 2 different names"),
        (broken(classes=lambda c: np.array(["same"] * 10)), "classes must be at least 2 different names"),
        (broken(classes=lambda c: c[:4]), "must be 0 to 3"),
        (broken(classes=lambda c: c.astype(object)), "allow_pickle=False"),
        (broken(x_train=lambda x: x.astype(object)), "allow_pickle=False"),
    ],
)
def test_a_wrong_file_is_refused(data_folder, change, message):
    write(data_folder, change(made_up()))
    with pytest.raises(ValueError, match=message) as error:
        data.load("mnist")
    assert str(data_folder / "mnist.npz") in str(error.value)
    assert "stiffkit data fetch mnist" in str(error.value)


def flip_a_pixel(packed):
    middle = len(packed) // 4
    return packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :]


def npy(packed):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-1],
        flip_a_pixel,
        npy,
        lambda packed: b"",
        lambda packed: b"<html>not found</html>",
        lambda packed: pickle.dumps({"x_train": 1}),
    ],
    ids=["half", "one byte short", "flipped", "npy", "empty", "html", "pickle"],
)
def test_a_damaged_file_is_refused(data_folder, damage):
    write(data_folder, made_up(train=50))
    path = data_folder / "mnist.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"mnist\.npz: not a sound \.npz file.*Delete it"):
        data.load("mnist")


def test_other_data_load_but_are_not_official(data_folder):
    write(data_folder, made_up())
    checksum = data.load("mnist").checksum
    with pytest.raises(ValueError, match=f"does not hold the official data: its checksum is {checksum}"):
        data.verify("mnist")
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz is not there\. Run `stiffkit data fetch cifar10`"):
        data.verify("cifar10")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(OSError, match=r"cannot be written.*Set STIFFKIT_DATA"):
        data.load("mnist")


def test_the_default_folder_is_the_users_cache(monkeypatch):
    from platformdirs import user_cache_path

    monkeypatch.delenv("STIFFKIT_DATA", raising=False)
    assert data.location("mnist").is_relative_to(user_cache_path())
    assert data.location("digits") is None
    monkeypatch.setenv("STIFFKIT_DATA", "~/sets")
    assert "~" not in str(data.data_folder())


@pytest.mark.parametrize(("module", "name"), [("sklearn.datasets", "digits"), ("torchvision", "mnist")])
def test_a_missing_package_is_named_with_the_pip_command(data_folder, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install (scikit-learn|torchvision)"):
        data.load(name)
    assert not list(data_folder.glob("*.npz"))


# Downloads, from a server on this machine


def test_fetched_mnist_is_the_served_one(data_folder, served_mnist):
    fetched = data.load("mnist")
    assert sorted(path.name for path in data_folder.iterdir() if path.suffix != ".lock") == ["mnist.npz"]
    assert fetched.classes == tuple("0123456789")
    write(data_folder, served_mnist)
    assert same(fetched, data.load("mnist"))


def test_a_file_that_is_there_is_left_alone(data_folder, served_mnist, server):
    write(data_folder, made_up())
    before = (data_folder / "mnist.npz").read_bytes()
    assert data.fetch("mnist") == data_folder / "mnist.npz"
    assert (data_folder / "mnist.npz").read_bytes() == before
    assert server.requests == []


@pytest.mark.parametrize("damage", [flip_a_pixel, lambda packed: packed[:-5]], ids=["flipped", "truncated"])
def test_a_corrupt_download_leaves_nothing_behind(data_folder, served_mnist, server, damage):
    images = server.folder / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(damage(images.read_bytes()))
    with pytest.raises(ValueError, match=r"mnist: the download is truncated or corrupt.*MD5.*copy mnist\.npz"):
        data.load("mnist")
    assert not [path for path in data_folder.iterdir() if path.suffix != ".lock"]


def test_what_a_killed_fetch_left_does_not_matter(data_folder, served_mnist):
    left = data_folder / ".mnist.part" / "MNIST" / "raw"
    left.mkdir(parents=True)
    (left / "train-images-idx3-ubyte").write_bytes(b"half of it")
    assert len(data.load("mnist").train[1]) == 40
    assert not left.exists()


def check_that_no_network_is_explained(data_folder):
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist")
    for remedy in (
        "could not be fetched",
        "stiffkit data fetch mnist",
        f"into {data_folder}",
        "embedded data set digits",
    ):
        assert remedy in str(error.value)
    assert not list(data_folder.glob("*.npz"))


def test_no_network_is_explained(data_folder, served_mnist, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    datasets = _torchvision.import_torchvision().datasets
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"] * 2)
    check_that_no_network_is_explained(data_folder)


def test_a_server_that_never_answers_is_given_up(data_folder, served_mnist, monkeypatch):
    monkeypatch.setattr(_torchvision, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        datasets = _torchvision.import_torchvision().datasets
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        check_that_no_network_is_explained(data_folder)
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def served_cifar10(server, monkeypatch):
    """A made-up CIFAR-10 in the official form: a tar of pickled batches."""
    arrays = made_up(test=2, size=(32, 32), colour=True)
    cifar = _torchvision.import_torchvision().datasets.CIFAR10
    batches = {"batches.meta": {"label_names": [f"class {k}" for k in range(10)]}}
    for part, name in (("train", "data_batch_1"), ("test", "test_batch")):
        flat = arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        batches[name] = {"data": flat, "labels": arrays[f"y_{part}"].tolist()}
    md5 = {}
    with tarfile.open(server.folder / cifar.filename, "w:gz") as tar:
        for name, content in batches.items():
            packed = pickle.dumps(content)
            member = tarfile.TarInfo(f"{cifar.base_folder}/{name}")
            member.size = len(packed)
            tar.addfile(member, io.BytesIO(packed))
            md5[name] = hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(cifar, "url", server.url + cifar.filename)
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5((server.folder / cifar.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["batches.meta"]})
    return arrays


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # torchvision's tar.extractall
def test_fetched_cifar10_is_the_served_one(data_folder, served_cifar10):
    fetched = data.load("cifar10")
    assert fetched.classes[:2] == ("airplane", "automobile")
    write(data_folder, served_cifar10, "cifar10")
    assert same(fetched, data.load("cifar10"))


def test_threads_that_fetch_at_once_download_once(data_folder, served_mnist, server):
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(data.load("mnist"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 4
    assert all(same(loaded[0], other) for other in loaded)
    assert len(server.requests) == 2 * len(list(server.folder.iterdir()))  # torchvision asks for redirects first


def test_processes_that_fetch_at_once_download_once(data_folder, tmp_path):
    write(tmp_path, made_up(), "source")
    code = f"""
import sys, time
import numpy as np
from stiffkit import data

assert not {{"sklearn", "torchvision"}} & set(sys.modules)  # both are imported when they are used

def download(dataset, folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(dataset + "\\n")
    time.sleep(0.5)
    arrays = dict(np.load({str(tmp_path / "source.npz")!r}))
    del arrays["classes"]
    return arrays

data.download = download
print(data.load("mnist").checksum)
"""
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    checksums = {process.communicate()[0] for process in running}
    assert checksums == {data.load("mnist").checksum + "\n"}
    assert (tmp_path / "log").read_text() == "MNIST\n"


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
    path = data.location(name)
    if not path.exists():
        pytest.skip(f"{path} is not there (stiffkit data fetch {name})")
    loaded = data.load(name, sphere=False)
    assert loaded.checksum == data._source(name).checksum
    assert tuple(len(y) for _, y in (loaded.train, loaded.validation, loaded.test)) == sizes
    darkest = loaded.train[0].amin(dim=(0, 2, 3))  # a black pixel is -mean / std, the numbers known from the literature
    torch.testing.assert_close(darkest, -torch.tensor(mean) / torch.tensor(std), rtol=1e-3, atol=0)
    variance, means = torch.var_mean(loaded.train[0].double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-6, atol=0)
    assert means.abs().max() < 1e-7
