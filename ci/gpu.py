"""Runs on a CUDA device what needs one: the tests for it, the sweeps, and the chapters at the paper's scale.

python ci/gpu.py                       all three stages
python ci/gpu.py tests|sweeps|chapters

With the Python that calls it, such as .venv/bin/python; nothing is installed. A stage whose packages are missing is
named and skipped. What is finished is kept ($STIFFKIT_CACHE), so that the same command goes on after a stop; what the
book has recorded with the present versions of the code is not computed again. Left for a person to look at and commit:
new results in book/results, and the summary, book/results/gpu.json, from which the site takes the date. The notebooks
that were run, and the summary to read, are in _build/gpu.
"""

import importlib.util
import json
import subprocess
import sys
import time
from datetime import UTC, datetime

import live
import setup

OUT = setup.ROOT / "_build" / "gpu"
RECORD = setup.ROOT / "book" / "results" / "gpu.json"
RUNS = ("torch", "xarray", "h5netcdf", "pydantic", "typer", "yaml", "filelock", "platformdirs", "psutil", "sklearn")
PACKAGES = {
    "tests": (*RUNS, "pytest", "hypothesis", "mpmath"),
    "sweeps": RUNS,
    "chapters": (*RUNS, "papermill", "ipykernel", "matplotlib", "scipy"),
}


def main(arguments) -> None:
    if not set(arguments) <= set(PACKAGES):
        raise SystemExit(__doc__)
    about = device()
    OUT.mkdir(parents=True, exist_ok=True)
    env = setup.environment(STIFFKIT_DEVICE="cuda")
    summary = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    skipped = []
    for stage in arguments or PACKAGES:
        missing = [name for name in PACKAGES[stage] if importlib.util.find_spec(name) is None]
        if missing:
            skipped.append(f"{stage} skipped, missing here: {', '.join(missing)}")
            print(f"gpu: {skipped[-1]}", flush=True)
            continue
        summary[stage] = {**about, **run(stage, env)}
        RECORD.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (OUT / "summary.md").write_text(described(summary, skipped), encoding="utf-8")
    print(described(summary, skipped))
    ran = [stage for stage in arguments or PACKAGES if stage in summary]
    if skipped or any(step != "passed" for stage in ran for step in summary[stage]["steps"].values()):
        sys.exit("gpu: not everything ran and passed, see above.")


def device() -> dict:
    """The device, the software and the commit; without a device the reason why, and the end."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"gpu: {sys.executable} has no torch. After make book: {setup.command('python')} ci/gpu.py")
    import torch

    if not torch.cuda.is_available():
        why = "finds no CUDA device (does nvidia-smi?)" if torch.version.cuda else "is built without CUDA"
        sys.exit(f"gpu: there is no CUDA device: torch {torch.__version__} {why}. Nothing was run.")
    commit = live.commit().replace("`", "")
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "commit": commit}


def run(stage, env) -> dict:
    """Runs the steps of a stage: how each ended, the seconds it took, and how many runs were computed."""
    started, before, steps = time.monotonic(), cached(), {}
    for name, line in STEPS[stage]():
        print(f"gpu: {stage}, {name}", flush=True)
        code, last = step([sys.executable, *line], env)
        steps[name] = "passed" if code == 0 else f"failed with exit code {code}" + (f": {last}" if last else "")
    return {"steps": steps, "seconds": round(time.monotonic() - started), "computed": cached() - before}


def step(command, env) -> tuple[int, str]:
    """Runs a command and shows what it prints: its exit code and its last line, which of tests is their summary."""
    last = ""
    with subprocess.Popen(command, cwd=setup.ROOT, env=env, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return running.returncode, last


def cached() -> int:
    """How many runs the cache has."""
    from stiffkit import results

    return len(list(results.cache().glob("*.nc")))


def tests() -> list:
    """The files with tests for a device; the others need packages that a machine for computing may not have."""
    files = [f for f in sorted(setup.ROOT.glob("tests/test_*.py")) if "mark.cuda" in f.read_text(encoding="utf-8")]
    return [(f.stem, ["-m", "pytest", "-q", "-m", "cuda", str(f)]) for f in files]


def sweeps() -> list:
    """The sweeps, then the scripts that record what the chapters show."""
    files = sorted(setup.ROOT.glob("book/sweeps/*.yml"))
    scripts = sorted(setup.ROOT.glob("book/record/*.py"))
    return [(f.stem, ["-m", "stiffkit", "sweep", str(f)]) for f in files] + [(s.stem, [str(s)]) for s in scripts]


def chapters() -> list:
    """Each chapter with its own parameters, then with those of book/parameters/paper."""
    steps = []
    for chapter in sorted(setup.ROOT.glob("book/[0-9]*.ipynb")):
        number = chapter.stem[:2]
        files = sorted(setup.ROOT.glob(f"book/parameters/paper/{number}_*.yml"))
        for name, more in [(number, []), *((file.stem, ["-f", str(file)]) for file in files)]:
            line = ["-m", "stiffkit", "chapter", number, *more, "-p", "max_minutes", "100000"]
            steps.append((name, [*line, "-o", str(OUT / f"{name}.ipynb")]))
    return steps


STEPS = {"tests": tests, "sweeps": sweeps, "chapters": chapters}


def described(summary, skipped) -> str:
    """The summary to read: one line a step, and the results that changed."""
    lines = ["# On a GPU", "", *(f"- {line}" for line in skipped), ""]
    for stage, found in summary.items():
        lines += [
            f"## {stage}: {found['date']}, {found['device']}, torch {found['torch']}, commit {found['commit']}",
            "",
        ]
        lines += [f"- {name}: {result}" for name, result in found["steps"].items()]
        lines += [f"- {found['seconds']} seconds, {found['computed']} runs computed", ""]
    return "\n".join([*lines, "## Results that changed, to be looked at and committed", "", changed()])


def changed() -> str:
    """The results that differ from the committed ones."""
    try:
        return live.git("status", "--short", "--", "book/results", ":!book/results/gpu.json") or "none"
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git here)"


if __name__ == "__main__":
    main(sys.argv[1:])
