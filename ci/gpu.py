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
    for stage in arguments or PACKAGES:
        summary[stage] = {**about, **run(stage, env)}
        RECORD.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (OUT / "summary.md").write_text(described(summary), encoding="utf-8")
    print(described(summary))
    if any(step != "passed" for stage in arguments or PACKAGES for step in summary[stage]["steps"].values()):
        sys.exit("gpu: not everything passed, see above.")


def device() -> dict:
    """The device, the software and the commit; without a device the reason why, and the end."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"gpu: {sys.executable} has no torch. After make book: {setup.command('python')} ci/gpu.py")
    import torch

    if not torch.cuda.is_available():
        why = "finds no CUDA device (does nvidia-smi?)" if torch.version.cuda else "is built without CUDA"
        sys.exit(f"gpu: there is no CUDA device: torch {torch.__version__} {why}. Nothing was run.")
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, cwd=setup.ROOT, capture_output=True, text=True, check=False).stdout.strip()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "commit": commit}


def run(stage, env) -> dict:
    """Runs the steps of a stage; {step: passed, failed or skipped} and the seconds it took."""
    missing = [name for name in PACKAGES[stage] if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu: {stage} skipped, missing here: {', '.join(missing)}", flush=True)
        return {"steps": {stage: f"skipped, missing: {', '.join(missing)}"}, "seconds": 0}
    started, steps = time.monotonic(), {}
    for name, line in STEPS[stage]():
        print(f"gpu: {stage}, {name}", flush=True)
        code = subprocess.call([sys.executable, *line], cwd=setup.ROOT, env=env)
        steps[name] = "passed" if code == 0 else f"failed with exit code {code}"
    return {"steps": steps, "seconds": round(time.monotonic() - started)}


def tests() -> list:
    return [("cuda", ["-m", "pytest", "-q", "-m", "cuda", "tests"])]


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


def described(summary) -> str:
    """The summary to read: one line a step, and the results that changed."""
    lines = ["# On a GPU", ""]
    for stage, found in summary.items():
        lines += [
            f"## {stage}: {found['date']}, {found['device']}, torch {found['torch']}, commit {found['commit']}",
            "",
        ]
        lines += [f"- {name}: {result}" for name, result in found["steps"].items()]
        lines += [f"- {found['seconds']} seconds", ""]
    git = ["git", "status", "--short", "--", "book/results"]
    changed = subprocess.run(git, cwd=setup.ROOT, capture_output=True, text=True, check=False).stdout
    return "\n".join([*lines, "## Results that changed, to be looked at and committed", "", changed or "none"])


if __name__ == "__main__":
    main(sys.argv[1:])
