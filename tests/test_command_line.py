"""The command line: what it prints, and its exit codes."""

import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import stiffkit
from stiffkit import data
from stiffkit.__main__ import app


@pytest.fixture
def run(data_folder):
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"stiffkit {stiffkit.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("data",), ("--help",), ("data", "--help")])
def test_help(run, arguments):
    assert "data" in run(*arguments).output


def test_list_says_what_is_here(run, data_folder):
    data_folder.mkdir()
    (data_folder / "cifar10.npz").write_bytes(bytes(3 * 2**20))
    folder, digits, mnist, _, cifar10 = run("data", "list").stdout.splitlines()
    assert folder == f"data folder: {data_folder}"
    assert digits.split() == ["digits", "embedded"]
    assert mnist.endswith("not here: stiffkit data fetch mnist")
    assert cifar10.split() == ["cifar10", "3.0", "MiB"]


def test_fetch_then_verify_made_up_data(run, data_folder, served_mnist):
    fetched = run("data", "fetch", "digits", "mnist")
    assert fetched.exit_code == 0
    assert fetched.stdout == f"digits: embedded, nothing to fetch\nmnist: {data_folder / 'mnist.npz'}\n"
    verified = run("data", "verify")  # all that are here: digits is official, this mnist is not
    assert verified.exit_code == 1
    assert verified.stdout == f"digits: official data, SHA-256 {data.load('digits').checksum}\n"
    assert "does not hold the official data" in verified.stderr


def test_verify_without_files(run):
    assert run("data", "verify").exit_code == 0
    missing = run("data", "verify", "mnist", "digits")
    assert missing.exit_code == 1
    assert "stiffkit data fetch mnist" in missing.stderr
    assert missing.stdout.startswith("digits: official data")


def test_a_corrupt_download_is_one_message(run, data_folder, served_mnist, server):
    (server.folder / "train-labels-idx1-ubyte.gz").write_bytes(b"not this")
    result = run("data", "fetch", "mnist")
    assert result.exit_code == 1
    assert "Error: mnist: the download is truncated or corrupt" in result.stderr
    assert not list(data_folder.glob("*.npz"))


def test_a_wrong_file_is_one_message(run, data_folder):
    data_folder.mkdir()
    np.savez(data_folder / "mnist.npz", x_train=np.zeros((2, 3, 3), np.uint8))
    result = run("data", "verify", "mnist")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {data_folder / 'mnist.npz'}: no array x_test, y_train, y_test")


def test_a_typo_ends_with_one_line_and_no_traceback():
    command = [sys.executable, "-m", "stiffkit", "data", "fetch", "minst"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "Error: there is no data set 'minst'. Did you mean 'mnist'? Known are digits, mnist, fashion_mnist, cifar10.\n"
    )
