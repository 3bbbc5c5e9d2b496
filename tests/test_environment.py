"""The environment and the commands: pins within ranges, environment.yml, make's targets, and messages that help."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "ci"))

import setup  # noqa: E402


def pins():
    """{name: requirements} of requirements.txt."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared():
    """Every requirement of pyproject.toml, extras included."""
    extras = project()["optional-dependencies"].values()
    return [Requirement(line) for line in chain(project()["dependencies"], *extras)]


def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_pins_are_exact_and_satisfy_the_ranges():
    known = pins()
    for requirement in declared():
        for pin in known[canonicalize_name(requirement.name)]:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version), f"{pin} against {requirement}"


@pytest.mark.parametrize("version", setup.KNOWN)
def test_every_python_gets_each_declared_package_once(version):
    environment = {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": "linux"}
    for name in {canonicalize_name(requirement.name) for requirement in declared()}:
        found = [pin for pin in pins()[name] if not pin.marker or pin.marker.evaluate(environment)]
        assert len(found) == 1, name


def test_no_pin_names_a_local_build():
    assert not [name for name, found in pins().items() if any("+" in str(pin.specifier) for pin in found)]


def test_environment_yml_has_python_pip_and_the_same_pins():
    python, pip, lines = conda()["dependencies"]
    assert Requirement(python).specifier == Requirement("python" + project()["requires-python"]).specifier
    assert pip == "pip"
    assert lines == {"pip": ["-r requirements.txt", "-e ."]}


def test_environment_yml_s_pip_lines_resolve():
    """What is installed counts, so that this needs no network where the environment was made by ci/setup.py."""
    lines = conda()["dependencies"][-1]["pip"]
    words = [word for line in lines for word in line.split()]
    assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", *words]
    if not has_setuptools():
        command = [word for word in command if word not in ("-e", ".", "--no-build-isolation")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install" not in done.stdout.replace(f"Would install stiffkit-{project()['version']}", "")


def has_setuptools():
    """Whether the backend that pyproject.toml asks for is here: Python 3.12 and later bring none."""
    wanted = Requirement(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"][0]
    )
    try:
        return wanted.specifier.contains(metadata.version(wanted.name))
    except metadata.PackageNotFoundError:
        return False


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert sorted(targets) == sorted(re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)[1].split())
    assert {"help", "book", "test", "test-all", "chapters", "benchmark", "clean"} <= set(targets)
    if not shutil.which("make"):
        pytest.skip("make is not installed here")
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == set(targets)


def test_the_scripts_that_make_calls_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all((ROOT / name).exists() for name in re.findall(r"ci/\w+\.py", makefile))


def test_second_set_up_installs_nothing(monkeypatch, tmp_path):
    stamp = tmp_path / "installed.txt"
    monkeypatch.setattr(setup, "STAMP", stamp)
    monkeypatch.setattr(setup, "PYTHON", Path(sys.executable))
    done = []
    monkeypatch.setattr(setup, "install", lambda: done.append("install"))
    setup.make()
    setup.make()
    assert done == ["install"]
    stamp.write_text(stamp.read_text(encoding="utf-8").replace("\n", "\n0", 2), encoding="utf-8")
    setup.make()
    assert done == ["install", "install"]


def test_a_python_without_venv_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"virtual environments.*\n.*apt-get install python3\.\d+-venv"):
        setup.create()


def test_an_unknown_python_is_told_which_will_do(monkeypatch):
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(setup.shutil, "which", lambda name: name if name == "python3.12" else None)
    with pytest.raises(SystemExit, match=r"3\.11 to 3\.13 is needed, this is 3\.9\. Try: make book PYTHON=python3\.12"):
        setup.create()


def test_no_network_is_said_clearly_after_uv_and_pip_were_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(setup, "pip", lambda *words: tried.append("pip") or int("uv" not in words))
    monkeypatch.setattr(setup, "uv", lambda *words: tried.append("uv") or 1)
    with pytest.raises(SystemExit, match=r"could not be installed.*network"):
        setup.install()
    assert tried == ["pip", "uv", "pip"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"PIP_FIND_LINKS": ""}, None),
        ({"PIP_FIND_LINKS": "a b"}, "a,b"),
        ({"PIP_FIND_LINKS": "a", "UV_FIND_LINKS": "c"}, "c"),
    ],
)
def test_uv_gets_pip_s_folders_of_wheels(monkeypatch, given, expected):
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = {}
    monkeypatch.setattr(setup.subprocess, "call", lambda line, cwd, env: seen.update(env))
    setup.uv("install")
    assert seen.get("UV_FIND_LINKS") == expected


def test_no_chromium_and_no_apt_get_is_said_clearly(monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="No Chromium found"):
        setup.system()


@pytest.mark.parametrize("script", ["setup", "book"])
def test_an_unknown_option_shows_how_the_script_is_called(script, monkeypatch):
    done = subprocess.run([sys.executable, f"ci/{script}.py", "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"python ci/{script}.py" in done.stderr


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_workflows_pass_zizmor():
    program = Path(sys.executable).with_name("zizmor")
    line = [program, "--offline", "--quiet", "--persona", "pedantic", *WORKFLOWS]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_code_of_strangers_stays_off_our_own_machines(path):
    text = path.read_text(encoding="utf-8")
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    assert not [action for action in actions if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", action)]
    workflow = yaml.safe_load(text)
    triggers = set(workflow[True])  # "on" is a truth value in YAML
    if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
        assert triggers <= {"workflow_dispatch", "push"}
        assert "branches" not in workflow[True]["push"]
