"""Makes .venv with the pinned packages and this project in it; a second call finds nothing to do.

python ci/setup.py            the environment
python ci/setup.py --system   and a Chromium for the browser tests, where none is found (Debian, Ubuntu)

Standard library only, and readable by older Pythons, so that they can say which ones will do.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "installed.txt"
INPUTS = ("requirements.txt", "pyproject.toml")
KNOWN = ("3.11", "3.12", "3.13")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def ensure() -> None:
    """Makes the environment and goes on in it: a script that calls this runs under .venv's Python afterwards."""
    make()
    if Path(sys.prefix).resolve() != VENV.resolve():
        raise SystemExit(subprocess.call([str(PYTHON), *sys.argv], env=environment()))


def make() -> None:
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted():
        return
    if not usable():
        create()
    install()
    STAMP.write_text(wanted(), encoding="utf-8")


def wanted() -> str:
    """What the stamp says once everything is installed: where, for which Python, and from which files."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return "\n".join([str(ROOT), version_of(PYTHON), digest.hexdigest(), ""])


def version_of(python) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip()


def usable() -> bool:
    """True where .venv is there, runs a known Python, and was not moved here from another folder."""
    if not PYTHON.exists() or version_of(PYTHON) not in KNOWN:
        return False
    return not STAMP.exists() or STAMP.read_text(encoding="utf-8").splitlines()[:1] == [str(ROOT)]


def create() -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    if version not in KNOWN:
        found = ["python" + known for known in KNOWN if shutil.which("python" + known)]
        advice = "make book PYTHON=" + found[-1] if found else "install one of them first"
        stop(f"Python {KNOWN[0]} to {KNOWN[-1]} is needed, this is {version}. Try: {advice}")
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        stop(
            "This Python cannot make virtual environments: its venv or ensurepip is missing.\n"
            f"On Debian and Ubuntu: sudo apt-get install python{version}-venv"
        )
    say(f"making .venv with Python {version}")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]) != 0:
        stop("python -m venv failed, see above.")


def install() -> None:
    """The pins, then the project: with uv where pip can install it, else with pip alone."""
    say("installing requirements.txt into .venv (the first time this takes minutes)")
    if pip("install", "--quiet", "uv") == 0 and packages(uv):
        return
    say("going on with pip alone")
    if not packages(pip):
        stop(
            "The packages could not be installed, see above. Is there a network?\n"
            "Without one, point PIP_FIND_LINKS to a folder of wheels. The next call carries on from here."
        )


def packages(tool) -> bool:
    return (
        tool("install", "--quiet", "-r", "requirements.txt") == 0
        and tool("install", "--quiet", "--no-deps", "-e", ".") == 0
    )


def pip(*arguments) -> int:
    return subprocess.call([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], cwd=str(ROOT))


def uv(command, *arguments) -> int:
    """Runs uv pip; uv does not look at pip's variable for folders of wheels by itself."""
    env = dict(os.environ)
    links = env.get("UV_FIND_LINKS") or env.get("PIP_FIND_LINKS", "")
    if links:
        env["UV_FIND_LINKS"] = ",".join(links.replace(",", " ").split())
    line = [str(PYTHON), "-m", "uv", "pip", command, "--python", str(PYTHON), *arguments]
    return subprocess.call(line, cwd=str(ROOT), env=env)


def environment(**more) -> dict:
    """The variables for programs of .venv: its commands first, its kernel and no other."""
    env = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1", **more)
    env["PATH"] = str(SCRIPTS) + os.pathsep + env.get("PATH", "")
    env.pop("JUPYTER_PATH", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of hundreds of processes compiles torch anew, for six seconds
    return env


@contextmanager
def empty_cache():  # noqa: ANN201
    """The same with an empty cache of results and no hub, so that nothing comes from earlier runs on this machine.

    One thread a process: what runs here is small, and threads that wait for each other on busy cores cost five times
    the work.
    """
    with tempfile.TemporaryDirectory(prefix="stiffkit-", ignore_cleanup_errors=True) as folder:
        yield environment(STIFFKIT_CACHE=folder, STIFFKIT_DEVICE="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def command(name) -> str:
    """How a program of .venv is called at the repository's root."""
    return str(SCRIPTS.relative_to(VENV.parent) / name)


def chromium():  # noqa: ANN201
    """The path of a Chromium or Chrome, or None; $CHROMIUM goes first."""
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM") or "chromium", *CHROMIUMS))), None)


def system() -> None:
    if chromium():
        return
    if not shutil.which("apt-get"):
        stop("No Chromium found and no apt-get to install it: install Chromium or Chrome, or set CHROMIUM to its path.")
    sudo = ["sudo"] if shutil.which("sudo") and os.geteuid() != 0 else []
    say("installing Chromium for the browser tests")
    subprocess.call([*sudo, "apt-get", "update", "-qq"])
    if subprocess.call([*sudo, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]) != 0:
        stop("apt-get could not install chromium, see above.")


def say(text) -> None:
    print("setup: " + text, flush=True)


def stop(text) -> None:
    raise SystemExit("setup: " + text)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--system"]):
        raise SystemExit(__doc__)
    if "--system" in sys.argv:
        system()
    make()
