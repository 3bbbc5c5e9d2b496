"""Times the Gram matrix against its peers: installs these into .venv where they are missing, then runs the benchmark.

python ci/benchmark.py [arguments of benchmarks/gram.py]
"""

import importlib.util
import subprocess
import sys

import setup

PEERS = {"opacus": "opacus==1.6.0", "backpack": "backpack-for-pytorch==1.7.1"}


def main(arguments) -> int:
    missing = [pin for name, pin in PEERS.items() if importlib.util.find_spec(name) is None]
    if missing and setup.pip("install", "--quiet", *missing) != 0:
        print("benchmark: " + ", ".join(missing) + " could not be installed, see above; going on without")
    return subprocess.call([sys.executable, "benchmarks/gram.py", *arguments], cwd=setup.ROOT, env=setup.environment())


if __name__ == "__main__":
    setup.ensure()
    sys.exit(main(sys.argv[1:]))
