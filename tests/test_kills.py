"""Sweeps killed at random moments: nothing that was finished is lost or done again, and no number changes."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import psutil
import pytest
import xarray as xr

from stiffkit import results
from stiffkit.sweeps import Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows"),
]
FILE = """
experiment: {dataset: digits, model: fc, epochs: 3, points: 40, arithmetics: [exact]}
axes: {seed: 1-3}
"""
VICTIMS = ("worker", "parent", "Dask worker")
MOMENTS = [pytest.param(k, marks=[pytest.mark.long] if k >= len(VICTIMS) else []) for k in range(20)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The sweep's file, and its arrays when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "sweep.yml").write_text(FILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_BOOK", str(folder / "book"))
        patch.setenv("STIFFKIT_CACHE", str(folder / "cache"))
        experiments = Sweep.read(folder / "sweep.yml").experiments
        return folder / "sweep.yml", {e: e.run(progress=False) for e in experiments}


@contextmanager
def dask_cluster(folder, environment):
    """The address of a scheduler with two workers of one thread each, all started from the command line."""
    place = folder / "scheduler.json"
    line = [sys.executable, "-m", "distributed.cli.dask_{}", "--scheduler-file", str(place)]
    options = {"env": environment, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        for name in ("scheduler", "worker", "worker"):
            own = ["--port", "0", "--no-dashboard"] if name == "scheduler" else ["--nthreads", "1", "--no-dashboard"]
            started = subprocess.Popen([part.format(name) for part in line] + own, **options)
            stack.callback(end, started)
            wait_for(place.exists)
        yield json.loads(place.read_text())["address"]


def end(process):
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


def wait_for(condition, seconds=120):
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "it took too long"
        time.sleep(0.02)


def workers(process):
    """The processes below one that compute: its leaves that have used the processor most."""
    below = [child for child in process.children(recursive=True) if not child.children()]
    return sorted(below, key=lambda child: sum(child.cpu_times()[:2]))[-2:]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_loses_nothing_doubles_nothing_and_changes_no_number(moment, undisturbed, own_folders):
    file, expected = undisturbed
    chance, victim = random.Random(moment), VICTIMS[moment % 3]
    cache = own_folders / "cache" / "results"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "stiffkit", "sweep", str(file), "--processes", "2"]
    with ExitStack() as stack:
        if victim == "Dask worker":
            pytest.importorskip("distributed")
            line += ["--scheduler", stack.enter_context(dask_cluster(own_folders, environment))]
        sweep = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        stack.callback(lambda: sweep.poll() is None and end(sweep))
        wait_for(lambda: list(cache.glob("*.stopped")))  # the first checkpoint of the first runs
        time.sleep(chance.uniform(0, 2.5))
        finished = {path: path.read_bytes() for path in cache.glob("*.nc")}
        below = psutil.Process(sweep.pid)
        if victim == "parent":
            children = below.children(recursive=True)
            sweep.kill()
            sweep.communicate()
            psutil.wait_procs(children, timeout=60)
            assert not any(child.is_running() for child in children)
            sweep = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
        else:
            group = below if victim == "worker" else psutil.Process()
            chosen = [p for p in workers(group) if p.pid != sweep.pid]
            chance.choice(chosen).kill()
        said = sweep.communicate(timeout=300)[0]
    assert said.endswith("3 done, 0 failed, 0 missing\n"), said
    assert {path: path.read_bytes() for path in finished} == finished
    for experiment, run in expected.items():
        xr.testing.assert_identical(results.find(experiment).drop_attrs(), run.drop_attrs())
    assert not list(cache.glob("*.stopped"))
