"""Processes that compute for a sweep: one that dies takes nothing with it, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from stiffkit.engines import ATTEMPTS, Processes, cores


def die(folder, times):
    """Die, the way a process without memory does, a number of times; then say how often that was."""
    deaths = len(list(Path(folder).glob("died *")))
    if deaths < times:
        (Path(folder) / f"died {deaths}").touch()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return deaths


def who():
    return os.getpid(), torch.get_num_threads()


def refuse(message):
    raise ValueError(message)


def sleep(folder, seconds):
    (Path(folder) / f"asleep {os.getpid()}").touch()
    time.sleep(seconds)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_there_is_a_core():
    assert 1 <= cores() <= psutil.cpu_count()


@pytest.mark.slow
def test_calls_deaths_and_errors(tmp_path):
    """Results and errors come back; a death is made good, and the third is an error; others do not notice."""
    for folder in ("once", "always"):
        (tmp_path / folder).mkdir()
    with Processes(2) as engine:
        once = engine.submit(die, tmp_path / "once", 1)
        always = engine.submit(die, tmp_path / "always", 99)
        refused = engine.submit(refuse, "no")
        processes = [engine.submit(who) for _ in range(6)]
        assert once.result(120) == 1
        assert isinstance(refused.exception(120), ValueError)
        assert "died 3 times" in str(always.exception(120))
        assert len(list((tmp_path / "always").iterdir())) == ATTEMPTS
        found = {process.result(120) for process in processes}
    assert {threads for _, threads in found} == {1}
    assert not [process for process, _ in found if psutil.pid_exists(process)]


def test_what_is_cancelled_ends_at_once(tmp_path):
    engine = Processes(1)
    first, second = engine.submit(sleep, tmp_path, 600), engine.submit(sleep, tmp_path, 600)
    wait_for(lambda: list(tmp_path.iterdir()))
    start = time.monotonic()
    engine.shutdown(cancel_futures=True)
    assert time.monotonic() - start < 30
    assert second.cancelled()
    assert "stopped" in str(first.exception(1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_no_process_outlives_a_parent_that_was_killed(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        from test_engines import sleep
        from stiffkit.engines import Processes

        if __name__ == "__main__":
            with Processes(2) as engine:
                for _ in range(2):
                    engine.submit(sleep, sys.argv[1], 600)
        """
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path], env=environment)
    wait_for(lambda: len(list(tmp_path.glob("asleep *"))) == 2)
    children = [int(path.name.split()[1]) for path in tmp_path.glob("asleep *")]
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, children)))
