"""Full disks, read-only folders, two processes at one run: what is there stays whole, and one message says why."""

import ctypes
import errno
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import Counter
from functools import partial

import pytest
import xarray as xr
import yaml

from stiffkit import results, stopped, sweeps
from stiffkit.__main__ import app
from stiffkit.experiment import Experiment, compute

resource = pytest.importorskip("resource", reason="Windows has no limit of a process's files")
pytestmark = pytest.mark.slow
FORKS = multiprocessing.get_context("forkserver")
no_plain_user = pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="root may write anywhere, and gives that up on Linux alone"
)
CHECKPOINTS = [0, 32]
FIELDS = {"dataset": "digits", "model": "fc", "epochs": 1, "points": 20, "arithmetics": ["exact"]}
FIELDS["checkpoints"] = CHECKPOINTS
RUN = ["run", "digits", "fc", "--epochs", "1", "-s", "points=20", "-s", 'arithmetics=["exact"]']
RUN += ["-s", f"checkpoints={CHECKPOINTS}", "--seeds"]
RESULT, STATE, SECOND_STATE = 50_000, 500_000, 1_000_000  # too few bytes; states have 0.2 MB (cnn), 0.9, then 2.6 (fc)
TO_COMPUTE = r"\d to compute, about [\d.]+ minutes in one thread\n"


class Child:
    """A command in a process of its own, forked from one that has done the imports."""

    def __init__(self, function, *args, before=None):
        (out, its_out), (err, its_err) = (FORKS.Pipe(duplex=False) for _ in range(2))
        arguments = (function, args, before, dict(os.environ), its_out, its_err)
        self.process = FORKS.Process(target=_child, args=arguments)
        self.process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), encoding="utf-8") for end in (out, err))
        for end in (out, its_out, err, its_err):
            end.close()

    def finish(self):
        """Its exit code, and what it said on standard output and standard error."""
        self.process.join(300)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail("it hangs")
        with self.stdout, self.stderr:
            return self.process.exitcode, self.stdout.read(), self.stderr.read()


def _child(function, args, before, environment, stdout, stderr):
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    os.environ.update(environment)
    if before:
        before()
    function(*args)


def stiffkit(*line):
    return app(line, prog_name="stiffkit")


def full_beyond(size):
    """Refuse to write more bytes into a file, as a full disk does."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def be_a_plain_user():
    """Give up, in this process and those it starts, the right to write where the permissions do not allow it."""
    if os.geteuid() == 0:
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        libc.prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        libc.capget(header, sets)
        sets[0] &= ~2
        sets[1] &= ~2
        assert libc.capset(header, sets) == 0


def of(**fields):
    return Experiment.of(**FIELDS | fields)


ONE, TWO, THREE = (of(seed=seed) for seed in (1, 2, 3))


def lock(experiment):
    return results.cache() / f"{experiment.training.key}.lock"


def sweep_file(folder, **axes):
    (folder / "sweep.yml").write_text(yaml.safe_dump({"experiment": FIELDS, "axes": axes}), encoding="utf-8")
    return str(folder / "sweep.yml")


def states(said):
    """The state of each run in a sweep's report, by its key."""
    rows = [re.split(r"\s{2,}", row) for row in said.splitlines()[1:-1]]
    return {key: state for key, *_, state in rows}


def contents(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(path, number):
    return f"{path} cannot be written: {os.strerror(number)}. Files that are there stay whole"


def assert_refused(ended, path, number):
    code, _, stderr = ended
    assert code == 1
    assert re.fullmatch(TO_COMPUTE + re.escape(f"Error: {refusal(path, number)}\n"), stderr), stderr


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Of the process that the others are forked from; without bytecode, which a full disk would cut short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        imports = ["torch._dynamo", "sklearn.datasets", "dask.array", "distributed", "pytest", "yaml"]
        FORKS.set_forkserver_preload(["stiffkit.__main__", *imports])
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the runs of seeds 1 and 2, when nothing disturbs them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_BOOK", str(folder / "book"))
        patch.setenv("STIFFKIT_CACHE", str(folder / "cache"))
        code, said, _ = Child(stiffkit, *RUN, "1-2").finish()
    assert (code, said) == (0, f"{ONE.key}: computed now\n{TWO.key}: computed now\n")
    return folder / "cache" / "results"


@pytest.fixture
def folder(own_folders, undisturbed):
    """A cache that has the run of seed 1."""
    (own_folders / "book").mkdir()
    results.cache().mkdir(parents=True)
    shutil.copy(undisturbed / f"{ONE.key}.nc", results.cache())
    return results.cache()


@pytest.fixture
def read_only(folder):
    """Make it read-only, or another folder, until the test ends."""
    changed = []

    def protect(path=folder):
        path.chmod(0o555)
        changed.append(path)
        return path

    yield protect
    for path in changed:
        path.chmod(0o755)


def assert_undisturbed(experiment, undisturbed):
    """Bit for bit."""
    expected = results.load(undisturbed / f"{experiment.key}.nc")
    xr.testing.assert_identical(results.load(results.cached(experiment)).drop_attrs(), expected.drop_attrs())


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize(("size", "kept"), [(SECOND_STATE, 1), (RESULT, 2)], ids=["second checkpoint", "result"])
def test_a_run_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(size, kept, folder, undisturbed):
    state, result = stopped.path(TWO.training.key), results.cached(TWO)
    if size == RESULT:
        assert Child(compute, [TWO]).finish()[0] == 0  # it leaves the state of the last checkpoint
    before = contents(folder)
    ended = Child(stiffkit, *RUN, "1-2", before=full_beyond(size)).finish()
    assert_refused(ended, result if size == RESULT else state, errno.EFBIG)
    assert ended[1] == f"{ONE.key}: cached\n"
    assert contents(folder).items() >= before.items()
    assert contents(folder).keys() == {f"{ONE.key}.nc", state.name, lock(TWO).name}
    assert len(stopped.load(state).measured[TWO.identity]) == kept

    code, said, _ = Child(stiffkit, *RUN, "1-2").finish()
    assert (code, said) == (0, f"{ONE.key}: cached\n{TWO.key}: computed now\n")
    assert contents(folder).items() >= {f"{ONE.key}.nc": before[f"{ONE.key}.nc"]}.items()
    assert_undisturbed(TWO, undisturbed)


def test_a_sweep_that_fills_the_disk_keeps_what_is_done_and_says_why_the_rest_failed(folder, tmp_path, undisturbed):
    small = of(model="cnn", seed=2)
    line = ["sweep", sweep_file(tmp_path, model=["fc", "cnn"], seed=[2]), "--processes", "2"]
    before = contents(folder)
    code, said, stderr = Child(stiffkit, *line, before=full_beyond(STATE)).finish()
    assert code == 1
    assert re.fullmatch(TO_COMPUTE, stderr), stderr
    reason = refusal(stopped.path(TWO.training.key), errno.EFBIG)
    assert states(said) == {TWO.key: f"failed: {reason}", small.key: "done (cached)"}
    assert said.endswith("\n1 done, 1 failed, 0 missing\n")
    kept = contents(folder)
    assert kept.items() >= before.items()
    assert kept.keys() == {f"{ONE.key}.nc", f"{small.key}.nc", lock(TWO).name, lock(small).name, "id", "id.lock"}

    assert Child(stiffkit, *RUN, "2").finish()[:2] == (0, f"{TWO.key}: computed now\n")
    code, said, _ = Child(stiffkit, *line).finish()
    assert (code, states(said)) == (0, dict.fromkeys([TWO.key, small.key], "done (cached)"))
    assert contents(folder).items() >= kept.items()
    assert_undisturbed(TWO, undisturbed)


def test_a_sweep_that_cannot_begin_on_a_full_disk_leaves_no_file_cut_short(folder, tmp_path):
    before = contents(folder)
    ended = Child(stiffkit, "sweep", sweep_file(tmp_path, seed=[2]), before=full_beyond(10)).finish()
    assert_refused(ended, folder / "id", errno.EFBIG)
    assert {name: kept for name, kept in contents(folder).items() if not name.endswith(".lock")} == before


# ---------------------------------------------------------------------------------------------------- read-only folders


@no_plain_user
@pytest.mark.parametrize("there", [True, False], ids=["with a run", "without the folder of results"])
def test_a_folder_that_cannot_be_written_to_is_named_and_nothing_in_it_changes(there, folder, tmp_path, read_only):
    if not there:
        shutil.rmtree(folder)
    protected = read_only(folder if there else folder.parent)
    before = contents(protected)
    line = ["sweep", sweep_file(tmp_path, seed=[1, 2])]
    run, sweep = (Child(stiffkit, *one, before=be_a_plain_user) for one in ([*RUN, "2"], line))
    assert_refused(run.finish(), lock(TWO), errno.EACCES)
    assert_refused(sweep.finish(), folder / "id.lock", errno.EACCES)
    assert contents(protected) == before


@no_plain_user
def test_a_folder_that_was_written_to_before_is_named_too(folder, tmp_path, read_only):
    sweeps._folder()
    lock(TWO).touch()
    read_only()
    before = contents(folder)
    line = ["sweep", sweep_file(tmp_path, seed=[1, 3]), "--processes", "2"]
    run, sweep = (Child(stiffkit, *one, before=be_a_plain_user) for one in ([*RUN, "1-2"], line))
    ended = run.finish()
    assert_refused(ended, stopped.path(TWO.training.key), errno.EACCES)
    assert ended[1] == f"{ONE.key}: cached\n"
    code, said, stderr = sweep.finish()
    assert code == 1
    assert re.fullmatch(TO_COMPUTE, stderr), stderr
    assert states(said) == {ONE.key: "done (cached)", THREE.key: f"failed: {refusal(lock(THREE), errno.EACCES)}"}
    assert contents(folder) == before


@no_plain_user
def test_what_a_read_only_folder_has_is_found(folder, tmp_path, read_only):
    read_only()
    before = contents(folder)
    lines = [*RUN, "1"], ["sweep", sweep_file(tmp_path, seed=[1])], ["results", "verify"]
    run, sweep, verified = [Child(stiffkit, *line, before=be_a_plain_user) for line in lines]
    assert run.finish() == (0, f"{ONE.key}: cached\n", "")
    code, said, stderr = sweep.finish()
    assert (code, states(said), stderr) == (0, {ONE.key: "done (cached)"}, "")
    assert verified.finish() == (0, f"cached, {ONE.key}.nc: whole, 1 run(s)\n", "")
    assert contents(folder) == before


@no_plain_user
def test_a_damaged_file_in_a_read_only_folder_is_named_and_what_is_whole_is_found(folder, tmp_path, read_only):
    results.cached(TWO).write_bytes(b"damaged")
    read_only()
    before = contents(folder)
    line = ["sweep", sweep_file(tmp_path, seed=[1, 2]), "--dry-run"]
    code, said, stderr = Child(stiffkit, *line, before=be_a_plain_user).finish()
    assert (code, states(said)) == (0, {ONE.key: "done (cached)", TWO.key: "missing"})
    assert f"{TWO.key}.nc is damaged" in stderr
    assert "it cannot be set aside: Permission denied" in stderr
    assert contents(folder) == before


# --------------------------------------------------------------------------------------------------------- two at once


def assert_whole(*experiments):
    code, said, stderr = Child(stiffkit, "results", "verify").finish()
    assert (code, stderr) == (0, "")
    assert said.splitlines() == sorted(f"cached, {e.key}.nc: whole, 1 run(s)" for e in experiments)


def test_of_two_processes_at_one_run_one_computes_and_the_other_finds_it(folder, undisturbed):
    with results.reserved(TWO.training.key):
        both = [Child(stiffkit, *RUN, "2") for _ in range(2)]
        assert all(re.fullmatch(TO_COMPUTE, child.stderr.readline()) for child in both)
    ended = [child.finish() for child in both]
    assert sorted(ended) == [(0, f"{TWO.key}: cached\n", ""), (0, f"{TWO.key}: computed now\n", "")]
    assert_whole(ONE, TWO)
    assert_undisturbed(TWO, undisturbed)


NOTES = """
import os, sys
def note(event, args):
    if event == "os.rename":
        with open({log!r}, "a") as log:
            log.write(os.path.basename(os.fspath(args[1])) + "\\n")
sys.addaudithook(note)
"""


def test_of_two_sweeps_at_once_each_training_is_done_once(own_folders, monkeypatch, undisturbed):
    log = own_folders / "log"
    (own_folders / "sitecustomize.py").write_text(NOTES.format(log=str(log)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(own_folders))
    line = ["sweep", sweep_file(own_folders, seed=[1, 2]), "--processes", "1"]
    both = [Child(stiffkit, *line) for _ in range(2)]
    for child in both:
        code, said, stderr = child.finish()
        assert (code, states(said)) == (0, dict.fromkeys([ONE.key, TWO.key], "done (cached)"))
        assert re.fullmatch(TO_COMPUTE, stderr), stderr
    written = Counter(log.read_text(encoding="utf-8").split())
    for experiment in (ONE, TWO):
        assert written[f"{experiment.training.key}.stopped"] == len(CHECKPOINTS)
        assert written[f"{experiment.key}.nc"] == 1
        assert_undisturbed(experiment, undisturbed)
    assert_whole(ONE, TWO)


def slow_to_name():
    """Pause where a sweep gives its folder a name, as on a busy machine."""

    def uuid4():
        print("about to name", file=sys.stderr, flush=True)
        time.sleep(2)
        return really()

    really, sweeps.uuid4 = sweeps.uuid4, uuid4


def tell_name():
    print(sweeps._folder()["id"])


def test_two_sweeps_that_begin_at_once_know_their_folder_by_one_name(folder):
    first = Child(tell_name, before=slow_to_name)
    assert first.stderr.readline() == "about to name\n"
    second = Child(tell_name).finish()
    assert second == first.finish() == (0, (folder / "id").read_text() + "\n", "")
