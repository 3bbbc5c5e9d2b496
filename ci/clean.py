"""Removes what the other scripts made.

python ci/clean.py         the built site, the live pages and the tools' caches
python ci/clean.py --all   and the environment
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = ("_build", "book/live", ".pytest_cache", ".ruff_cache", ".hypothesis")

if __name__ == "__main__":
    for name in (*MADE, ".venv") if "--all" in sys.argv else MADE:
        shutil.rmtree(ROOT / name, ignore_errors=True)
