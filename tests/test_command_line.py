"""The command line: what it prints, and its exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import stiffkit
from stiffkit import claims, data
from stiffkit.__main__ import app
from stiffkit.chapters import ClassMatrices

ROOT = Path(__file__).resolve().parent.parent


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
    folder, digits, mnist, _, cifar10, _, hierarchy = run("data", "list").stdout.splitlines()
    assert folder == f"data folder: {data_folder}"
    assert (digits.split(), hierarchy.split()) == (["digits", "embedded"], ["hierarchy", "embedded"])
    assert mnist.endswith("not here: stiffkit data fetch mnist")
    assert cifar10.split() == ["cifar10", "3.0", "MiB"]


def test_fetch_then_verify_made_up_data(run, data_folder, served_mnist):
    fetched = run("data", "fetch", "digits", "mnist")
    assert fetched.exit_code == 0
    assert fetched.stdout == f"digits: embedded, nothing to fetch\nmnist: {data_folder / 'mnist.npz'}\n"
    verified = run("data", "verify")  # all that are here: the embedded ones are official, this mnist is not
    assert verified.exit_code == 1
    embedded = ("digits", "hierarchy")
    assert verified.stdout == "".join(f"{n}: official data, SHA-256 {data.load(n).checksum}\n" for n in embedded)
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
        "Error: there is no data set 'minst'. Did you mean 'mnist'? Known are digits, mnist, fashion_mnist, cifar10, "
        "cifar100, hierarchy.\n"
    )


TINY = ("run", "digits", "fc", "--epochs", "0.1", "-s", "points=20", "-s", 'arithmetics=["exact"]')


@pytest.fixture
def tiny(run, no_runs):
    """Two runs in the cache."""
    result = run(*TINY, "--seeds", "1-2")
    assert result.exit_code == 0, result.output
    return result


def test_runs_are_computed_once_listed_shown_and_verified(run, tiny, no_runs):
    assert "2 to compute, about" in tiny.stderr
    keys = [line.split(":")[0] for line in tiny.stdout.splitlines()]
    assert [key.startswith(f"digits-fc-0.1ep-s{seed}-") for seed, key in enumerate(keys, 1)] == [True, True]
    assert tiny.stdout.count("computed now") == 2

    again = run(*TINY, "--seeds", "1,2")
    assert (again.stdout.count(": cached"), again.stderr) == (2, "")
    listed = run("results", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == keys
    shown = run("results", "show", keys[0]).stdout
    assert '"seed": 1' in shown
    assert "within, train-val, sign:" in shown
    assert "test accuracy:" in shown
    verified = run("results", "verify")
    assert (verified.exit_code, verified.stdout.count("whole, 1 run(s)")) == (0, 2)


SWEEP = """
experiment: {dataset: digits, model: fc, epochs: 0.1, points: 20, arithmetics: [exact]}
axes: {learning_rate: [1e-3, 1e-2], seed: 1-2}
"""


@pytest.mark.slow
def test_a_sweep_resumes_and_tells_what_is_done_failed_and_missing(run, tiny, no_runs):
    (no_runs / "a.yml").write_text(SWEEP, encoding="utf-8")
    before = run("sweep", str(no_runs / "a.yml"), "--dry-run")
    assert before.exit_code == 0
    assert before.stdout.endswith("2 done, 0 failed, 2 missing\n")
    after = run("sweep", str(no_runs / "a.yml"), "--processes", "1")
    assert "2 to compute" in after.stderr
    assert (after.exit_code, after.stdout.splitlines()[-1]) == (0, "4 done, 0 failed, 0 missing")
    again = run("sweep", str(no_runs / "a.yml"))
    assert (again.exit_code, again.stdout, again.stderr) == (0, after.stdout, "")


def test_a_sweep_that_cannot_be_is_one_message(run, no_runs):
    assert "there is no file" in run("sweep", str(no_runs / "none.yml")).stderr
    (no_runs / "a.yml").write_text(SWEEP.replace("digits", "digitz"), encoding="utf-8")
    wrong = run("sweep", str(no_runs / "a.yml"))
    assert wrong.exit_code == 1
    assert "a.yml: 'dataset' = 'digitz': allowed are" in wrong.stderr


def test_a_run_of_digits_is_the_one_that_chapter_2_looks_for(run, no_runs, monkeypatch):
    computed = []
    monkeypatch.setattr(
        "stiffkit.experiment.Experiment.run", lambda e, **_: computed.append(e) or xr.Dataset(attrs={"source": ""})
    )
    assert run("run", "digits", "fc", "--epochs", "12", "--seeds", "1-2").exit_code == 0
    assert computed == ClassMatrices(dataset="digits").experiments


def test_packed_runs_are_recorded_and_found_first(run, tiny, no_runs):
    packed = run("results", "pack", "99_tiny", "digits-fc-0.1ep-*")
    assert packed.exit_code == 0
    assert "99_tiny.nc: 2 run(s)" in packed.stdout
    assert run(*TINY, "--seeds", "1-2").stdout.count(": recorded, 99_tiny.nc") == 2
    assert "recorded, 99_tiny.nc: whole, 2 run(s)" in run("results", "verify").stdout
    nothing = run("results", "pack", "99_tiny", "no-such-*")
    assert nothing.exit_code == 1
    assert "stiffkit results list shows the keys" in nothing.stderr


def test_a_damaged_run_is_named_set_aside_and_computed_again(run, tiny, no_runs):
    first, second = sorted((no_runs / "cache/results").glob("*.nc"))
    damaged = first.read_bytes()[:-1000]
    first.write_bytes(damaged)
    verified = run("results", "verify")
    assert verified.exit_code == 1
    assert first.name in verified.stderr
    assert first.read_bytes() == damaged, "verify changes nothing"

    with pytest.warns(UserWarning, match="set aside"):
        again = run(*TINY, "--seeds", "1-2")
    assert "computed now" in again.stdout
    aside = first.with_name(first.name + ".set-aside")
    assert aside.read_bytes() == damaged
    assert aside.name in run("results", "list").stdout

    cleaned = run("results", "clean")
    assert f"removed {aside.name}" in cleaned.stdout
    assert (first.exists(), second.exists(), aside.exists()) == (True, True, False)
    assert run("results", "clean", "--all").exit_code == 0
    assert not list((no_runs / "cache/results").glob("*.nc"))


def test_unknown_keys_fields_and_seeds_are_one_message(run, no_runs):
    for arguments, words in [
        (("results", "show", "mnist"), "no run 'mnist'"),
        (("run", "digits", "cnn_v1", "--epochs", "1"), "16 x 16 pixels"),
        (("run", "minst", "fc", "--epochs", "1"), "allowed are digits, mnist"),
        ((*TINY, "-s", "rate=1"), "unknown field 'rate'; known are"),
        ((*TINY, "-s", "points"), "FIELD=VALUE is wanted"),
        ((*TINY, "--seeds", "8-1"), "a number, a range or a list is wanted"),
        ((*TINY, "--seeds", "one"), "--seeds 'one': a number, a range or a list is wanted"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr, arguments
        assert "Traceback" not in result.output


def test_claims_without_runs_are_not_run_and_those_of_the_book_have_verdicts(run, no_runs, monkeypatch):
    nothing = run("claims").stdout
    assert nothing.count(": not run") == len(claims.read().claims)
    assert "not settled yet" in nothing
    monkeypatch.delenv("STIFFKIT_BOOK")
    ledger = claims.read()
    judgements = claims.judge_all(ledger)
    for chapter in {claim.chapter for claim in ledger.claims}:
        judged = run("claims", "--chapter", str(chapter)).stdout
        for judgement in judgements:
            said = re.search(rf"(?<!-){judgement.claim.id}: {judgement.verdict}", judged)
            assert bool(said) is (judgement.claim.chapter == chapter)
        assert claims.answer(ledger, judgements) in judged
    assert "criterion" not in run("claims", "--chapter", "77").stdout
