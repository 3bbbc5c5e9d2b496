"""The files of the data sets: order, layout, files that are missing or broken, and real downloads."""

import hashlib
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import traceback

import numpy as np
import pytest
from conftest import made_up, same, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiffkit import _torchvision, archives, data

# Order and layout, on made-up files


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# What is wrong is said, with file, rule and remedy


@pytest.mark.parametrize(
    ("name", "near"), [("minst", "mnist"), ("MNIST", "mnist"), ("cifar", "cifar10"), ("../mnist", "mnist")]
)
@pytest.mark.parametrize("call", [data.load, archives.fetch, archives.verify])
def test_a_typo_is_answered_with_the_known_names(data_folder, call, name, near):
    with pytest.raises(ValueError, match=f"Did you mean '{near}'.*Known are digits, mnist, fashion_mnist, cifar10"):
        call(name)


def assert_one_exception_is_shown(error):
    assert "".join(traceback.format_exception(error)).count("Traceback") == 1


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
    assert_one_exception_is_shown(error.value)


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
    with pytest.raises(ValueError, match=r"mnist\.npz: not a sound \.npz file.*Delete it") as error:
        data.load("mnist")
    assert_one_exception_is_shown(error.value)


def test_other_data_load_but_are_not_official(data_folder):
    write(data_folder, made_up())
    checksum = data.load("mnist").checksum
    with pytest.raises(ValueError, match=f"does not hold the official data: its checksum is {checksum}"):
        archives.verify("mnist")
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz is not there\. Run `stiffkit data fetch cifar10`"):
        archives.verify("cifar10")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(OSError, match=r"cannot be written.*Set STIFFKIT_DATA") as error:
        data.load("mnist")
    assert_one_exception_is_shown(error.value)


def test_the_default_folder_is_the_users_cache(monkeypatch):
    from platformdirs import user_cache_path

    monkeypatch.delenv("STIFFKIT_DATA", raising=False)
    assert archives.location("mnist").is_relative_to(user_cache_path())
    assert archives.location("digits") is None
    monkeypatch.setenv("STIFFKIT_DATA", "~/sets")
    assert "~" not in str(archives.data_folder())


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
    assert archives.fetch("mnist") == data_folder / "mnist.npz"
    assert (data_folder / "mnist.npz").read_bytes() == before
    assert server.requests == []


@pytest.mark.parametrize("damage", [flip_a_pixel, lambda packed: packed[:-5]], ids=["flipped", "truncated"])
def test_a_corrupt_download_leaves_nothing_behind(data_folder, served_mnist, server, damage):
    images = server.folder / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(damage(images.read_bytes()))
    with pytest.raises(ValueError, match=r"mnist: the download is truncated or corrupt.*MD5.*copy mnist\.npz") as error:
        data.load("mnist")
    assert_one_exception_is_shown(error.value)
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
    assert_one_exception_is_shown(error.value)
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
from stiffkit import archives, data

assert not {{"sklearn", "torchvision"}} & set(sys.modules)  # both are imported when they are used

def download(dataset, folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(dataset + "\\n")
    time.sleep(0.5)
    arrays = dict(np.load({str(tmp_path / "source.npz")!r}))
    del arrays["classes"]
    return arrays

archives.download = download
print(data.load("mnist").checksum)
"""
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    checksums = {process.communicate()[0] for process in running}
    assert checksums == {data.load("mnist").checksum + "\n"}
    assert (tmp_path / "log").read_text() == "MNIST\n"
