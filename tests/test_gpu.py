"""ci/gpu.py: what it says without a device, what it runs, skips and writes down; and what pages say of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from docutils import nodes
from docutils.core import publish_doctree

from stiffkit import results

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "ci"), str(ROOT / "book" / "_ext")]

import gpu  # noqa: E402
import recorded  # noqa: E402

ABOUT = {"date": "2026-01-02", "device": "a GPU", "torch": "2", "commit": "abc"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder for what is written, a device, and steps that pass or fail at once."""
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "device", lambda: ABOUT)
    steps = {
        "tests": [("good", ["-c", ""])],
        "sweeps": [("a", ["-c", ""]), ("b", ["-c", "print('2 failed'); raise SystemExit(3)"])],
    }
    monkeypatch.setattr(gpu, "STEPS", {name: lambda chosen=lines: chosen for name, lines in steps.items()})
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_runs_nothing():
    done = subprocess.run([sys.executable, "ci/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stderr
    assert done.stdout == ""


def test_an_unknown_stage_is_refused():
    with pytest.raises(SystemExit, match=r"tests\|sweeps\|chapters"):
        gpu.main(["test"])


def test_stages_are_written_down_as_they_pass_and_fail(folders, capsys):
    gpu.main(["tests"])
    with pytest.raises(SystemExit, match="not everything ran and passed"):
        gpu.main(["sweeps"])
    stages = json.loads((folders / "gpu.json").read_text(encoding="utf-8"))
    assert stages["tests"] | {"seconds": 0} == {
        **ABOUT,
        "steps": {"good": "passed"},
        "seconds": 0,
        "computed": 0,
    }
    assert stages["sweeps"]["steps"] == {"a": "passed", "b": "failed with exit code 3: 2 failed"}
    assert "- b: failed with exit code 3: 2 failed" in (folders / "out/summary.md").read_text(encoding="utf-8")
    said = recorded.last_gpu_run(folders / "gpu.json")
    about = "2026-01-02 (a GPU, 0 runs computed)"
    assert said == f"tests {about}: passed; sweeps {about}: b failed with exit code 3: 2 failed"


def test_a_stage_whose_packages_are_missing_is_named_and_skipped_and_what_was_known_stays(folders, monkeypatch, capsys):
    gpu.main(["tests"])
    before = (folders / "gpu.json").read_text(encoding="utf-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydantic" else name)
    with pytest.raises(SystemExit, match="not everything ran and passed"):
        gpu.main(["tests"])
    assert "tests skipped, missing here: pydantic" in capsys.readouterr().out
    assert "tests skipped, missing here: pydantic" in (folders / "out/summary.md").read_text(encoding="utf-8")
    assert (folders / "gpu.json").read_text(encoding="utf-8") == before


def test_the_tests_for_a_device_are_found():
    assert "test_gradients" in dict(gpu.tests())


def test_all_sweeps_scripts_and_chapters_are_steps():
    ran = [word for _, line in [*gpu.sweeps(), *gpu.chapters()] for word in line]
    files = [*ROOT.glob("book/sweeps/*.yml"), *ROOT.glob("book/record/*.py"), *ROOT.glob("book/parameters/paper/*.yml")]
    assert files
    assert {str(file) for file in files} <= set(ran)
    assert {name for name, _ in gpu.chapters()} >= {path.stem[:2] for path in ROOT.glob("book/[0-9]*.ipynb")}


def test_pages_say_when_there_was_none(tmp_path):
    assert recorded.last_gpu_run(tmp_path / "gpu.json") == "none so far"


def test_a_page_of_stale_results_says_so_and_the_others_do_not(monkeypatch):
    def page(name):
        doctree = publish_doctree("A chapter\n=========\n\nText.\n", settings_overrides={"doctitle_xform": False})
        recorded.warn_of_stale(SimpleNamespace(env=SimpleNamespace(docname=f"book/{name}")), doctree)
        return [node.astext().split(" ")[0] for node in doctree.findall(nodes.warning)]

    chapters = ["02_class_matrices", "03_random_labels", "04_superclasses", "05_learning_rate", "06_critical_length"]
    chapters += ["08_network_or_arithmetic"]
    pages = ["01_definition", *chapters, "verdicts", "index", "api", "live/02_class_matrices"]
    assert not any(map(page, pages))
    monkeypatch.setattr("stiffkit.training.TRAINING_VERSION", 99)
    of_chapters = [len(results.described(ROOT / f"book/results/{name}.nc")) for name in chapters]
    everything = sum(of_chapters)
    of_chapters[4] += of_chapters[3]  # the critical length is measured on the runs of the learning rate
    expected = [1, *of_chapters, everything, everything]
    assert [page(name) for name in pages] == [*[[str(n)] for n in expected], [], []]
