"""Sweeps: what they consist of, that nothing is computed twice, and that engines do not matter."""

import io
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import xarray as xr

from stiffkit import results, stopped, sweeps
from stiffkit.experiment import Experiment
from stiffkit.sweeps import Sweep, numbers, sweep

ROOT = Path(__file__).resolve().parent.parent
TINY = {"dataset": "digits", "model": "fc", "epochs": 0.1, "points": 20, "arithmetics": ("exact",)}
AXES = {"learning_rate": [1e-3, 1e-2], "seed": [1, 2]}
CHECKPOINTS = (0, 32, 96)


@pytest.fixture(autouse=True)
def folder(own_folders):
    return own_folders / "cache" / "results"


def tiny(**fields):
    return Experiment.of(**(TINY | {"seed": 1, "checkpoints": CHECKPOINTS} | fields))


def same_numbers(one, other):
    """Bit for bit."""
    xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())


@pytest.fixture
def trainings(monkeypatch):
    """The trainings that were done, by key and measurements; nothing is really computed."""
    done = []

    def compute(experiments, **_):
        done.append((experiments[0].training.key, len(experiments)))
        versions = {"training_version": 1, "measurement_version": 1}
        values = {"within": ("images", [0.5, float(experiments[0].training.seed)])}
        return [xr.Dataset(values, {"images": [0, 32]}, versions) for _ in experiments]

    monkeypatch.setattr("stiffkit.experiment.compute", compute)
    return done


# ------------------------------------------------------------------------------------------------ what it is made of


def test_a_product_of_axes():
    chosen = Sweep.of(TINY, AXES | {"dataset": ["digits"]})
    fields = [(e.training.learning_rate, e.training.seed) for e in chosen.experiments]
    assert fields == [(1e-3, 1), (1e-3, 2), (1e-2, 1), (1e-2, 2)]
    assert {e.measurement.points for e in chosen.experiments} == {20}


def test_an_experiment_that_is_there_twice_is_one():
    assert len(Sweep.of(TINY, {"seed": [1, 1, 2]}).experiments) == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"seed": []}, "axis 'seed' = []: a list"),
        ({"dataset": "digits"}, "axis 'dataset' = 'digits': a list"),
        ({"seed": [1], "learning_rates": [1e-3]}, "unknown field 'learning_rates'"),
        ({"seed": [1], "model": ["fc", "vgg"]}, "'model' = 'vgg': allowed are"),
    ],
)
def test_wrong_axes_are_refused(axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sweep.of(TINY, axes)


def test_a_file(tmp_path):
    (tmp_path / "a.yml").write_text(
        "experiment: {dataset: digits, model: fc, epochs: 0.1, points: 20, arithmetics: [exact]}\n"
        "axes:\n  learning_rate: [1e-3, 1e-2]\n  seed: 1-2\n",
        encoding="utf-8",
    )
    assert Sweep.read(tmp_path / "a.yml").experiments == Sweep.of(TINY, AXES).experiments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: {}\n", "'experiment' and 'axes' are wanted"),
        ("- 1\n", "'experiment' and 'axes' are wanted"),
        ("experiment: digits\naxes: {}\n", "'experiment' must be a mapping"),
        ("experiment: {}\naxes: {seed: 3}\n", "axis 'seed' = 3: a list"),
        ("experiment: {}\naxes: {seed: 3-1}\n", "'3-1': a number, a range or a list"),
        ("experiment: {model: fc}\naxes: {seed: [1]}\n", "'dataset' is missing"),
        ("experiment: {\n", "a.yml: while parsing"),
    ],
)
def test_a_wrong_file_is_refused_and_named(tmp_path, text, message):
    (tmp_path / "a.yml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Sweep.read(tmp_path / "a.yml")
    assert str(tmp_path / "a.yml") in str(caught.value)


def test_numbers():
    assert numbers("3") == [3]
    assert numbers("1-3, 7") == [1, 2, 3, 7]
    for wrong in ("", "1-", "-1", "a", "1,,2", "3-1", "1.5"):
        with pytest.raises(ValueError, match="such as"):
            numbers(wrong)


# --------------------------------------------------------------------------------------------------------- computing


def test_each_training_once_and_what_is_there_never(trainings):
    tiny(seed=2).run()
    assert len(trainings) == 1
    with ThreadPoolExecutor(2) as pool:
        found = sweep(tiny(), executor=pool, seed=[1, 2], points=[20, 30], progress=False)
        assert sorted(trainings[1:]) == sorted([(tiny().training.key, 2), (tiny(seed=2).training.key, 1)])
        again = sweep(tiny(), executor=pool, seed=[1, 2], points=[20, 30], progress=False)
    assert len(trainings) == 3
    assert list(again.table.state) == ["done (cached)"] * 4
    assert found.runs.within.dims == ("images", "seed", "points")
    assert found.runs.within.sel(seed=2, points=30).values.tolist() == [0.5, 2]


def test_recorded_runs_count_as_there(folder):
    tiny().run(progress=False)
    results.pack("02_tiny", ["*"])
    for path in folder.glob("*.nc"):
        path.unlink()
    found = sweep(tiny(), executor=None, seed=[1], progress=False)
    assert list(found.table.state) == ["done (recorded, 02_tiny.nc)"]
    assert not list(folder.glob("*.nc"))


def test_a_run_that_fails_is_named_with_the_reason_and_the_others_are_done(trainings, monkeypatch):
    from stiffkit import experiment

    really = experiment.compute

    def compute(experiments, **options):
        if experiments[0].training.seed == 2:
            raise OSError("no space left on device\nand more")
        return really(experiments, **options)

    monkeypatch.setattr(experiment, "compute", compute)
    with ThreadPoolExecutor(1) as pool:
        found = sweep(tiny(), executor=pool, seed=[1, 2, 3], progress=False)
    assert list(found.table.state) == ["done (cached)", "failed: no space left on device", "done (cached)"]
    assert found.report.endswith("2 done, 1 failed, 0 missing")
    assert found.missing == [tiny(seed=2)]
    assert found.runs.seed.values.tolist() == [1, 3]
    monkeypatch.setattr(experiment, "compute", really)
    with ThreadPoolExecutor(1) as pool:
        assert found.run(pool, progress=False).report.endswith("3 done, 0 failed, 0 missing")


def test_a_worker_that_does_not_see_the_folder_says_so(trainings, folder):
    own = sweeps._folder()
    (folder / "id").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not see .*STIFFKIT_CACHE"):
        sweeps._compute([tiny().model_dump_json()], own, "cpu")
    assert sweeps._folder() != own
    with pytest.raises(FileNotFoundError, match=r"does not see .*STIFFKIT_CACHE"):
        sweeps._compute([tiny().model_dump_json()], own, "cpu")
    assert trainings == []


def test_an_interrupt_keeps_what_is_finished(trainings, monkeypatch):
    def interrupted(*given):
        if len(trainings) >= 2:
            raise KeyboardInterrupt
        return really(*given)

    really = sweeps.wait
    monkeypatch.setattr(sweeps, "wait", interrupted)
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        sweep(tiny(), executor=pool, seed=[1, 2, 3, 4], progress=False)
    assert 2 <= len(trainings) < 4
    assert len(Sweep.of(TINY | {"checkpoints": CHECKPOINTS}, {"seed": [1, 2, 3, 4]}).missing) == 4 - len(trainings)


def test_the_bar_shows_how_far_trainings_are_and_how_many_failed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    one, other = (Experiment.of(**TINY, seed=seed).training for seed in (1, 2))
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with sweeps._Progress([one, other], True) as bar:
        total = one.images(1_201)[-1]
        assert (bar._bar.n, bar._bar.total) == (0, 2 * total)
        stopped.save(one.key, stopped.Stopped({}, {}, {"images": 96}))
        bar.show({one, other}, 0)
        assert bar._bar.n == 96
        bar.show({one}, 1)
        assert bar._bar.n == 96 + total
    assert "1 of 2 trainings, 1 failed" in terminal.getvalue()
    assert re.search(r"<\d\d:\d\d,.*images/s", terminal.getvalue()), "time left and rate"


POOLS = {
    "processes": None,
    "threads": lambda: ThreadPoolExecutor(2),
    "a pool of processes": lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_every_engine_gives_the_same_arrays(name, monkeypatch, tmp_path):
    here = {seed: tiny(seed=seed).run(progress=False) for seed in (1, 2)}
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / name))
    executor = POOLS[name]() if POOLS[name] else None
    found = sweep(tiny(), executor=executor, processes=2, seed=[1, 2], progress=False)
    assert found.report.endswith("2 done, 0 failed, 0 missing")
    for seed, run in here.items():
        same_numbers(results.find(tiny(seed=seed)), run)
    if executor:
        executor.shutdown()


@pytest.mark.slow
def test_on_a_dask_cluster_the_arrays_are_the_same_and_a_worker_may_die(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    here = {seed: tiny(seed=seed).run(progress=False) for seed in (1, 2, 3)}
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / "shared"))
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        victim = next(iter(cluster.workers.values())).pid
        os.kill(victim, 9)
        found = sweep(tiny(), executor=client.get_executor(), seed=[1, 2, 3], progress=False)
    assert found.report.endswith("3 done, 0 failed, 0 missing")
    for seed, run in here.items():
        same_numbers(results.find(tiny(seed=seed)), run)


PAGE = (ROOT / "book/many_runs.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_files_and_scripts_on_the_page_of_many_runs_are_right(tmp_path):
    (written,) = blocks("yaml")
    (tmp_path / "FILE.yml").write_text(written, encoding="utf-8")
    assert len(Sweep.read(tmp_path / "FILE.yml").experiments) == 2 * 2 * 8
    for script in blocks("python"):
        compile(script, "book/many_runs.md", "exec")


@pytest.mark.slow
def test_the_script_on_the_page_of_many_runs_works(tmp_path):
    script, times = re.subn(r"epochs=3|range\(1, 9\)", small_part, blocks("python")[0])
    assert times == 2
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 done, 0 failed, 0 missing" in done.stdout
    assert "(images: 3, learning_rate: 2)" in done.stdout


def small_part(match):
    return {"epochs=3": "epochs=0.1, points=20", "range(1, 9)": "[1]"}[match[0]]
