"""Runs every check: ruff, the tests, and the committed notebooks once more against their stored outputs (nbval).

python ci/test.py                       everything but what is marked long
python ci/test.py --all                 everything
python ci/test.py tests/test_data.py    ruff, and pytest with these arguments
"""

import subprocess
import sys

import setup

PARALLEL = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")  # a notebook's cells stay together


def main(arguments) -> int:
    notebooks = sorted(str(path.relative_to(setup.ROOT)) for path in setup.ROOT.glob("book/*.ipynb"))
    everything = [*PARALLEL, "tests", *notebooks]
    chosen = everything if arguments == ["--all"] else arguments or ["-m", "not long", *everything]
    steps = {
        "ruff check": ["ruff", "check", "--quiet", "."],
        "ruff format": ["ruff", "format", "--check", "--quiet", "."],
        "pytest": ["pytest", "--nbval", "--nbval-current-env", *chosen],
    }
    with setup.empty_cache() as env:
        failed = [name for name, line in steps.items() if run(line, env) != 0]
    if failed and failed != ["pytest"]:
        print("failed, see above: " + ", ".join(failed))
    return 1 if failed else 0


def run(line, env) -> int:
    return subprocess.call([sys.executable, "-m", *line], cwd=setup.ROOT, env=env)


if __name__ == "__main__":
    setup.ensure()
    sys.exit(main(sys.argv[1:]))
