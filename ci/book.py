"""Runs every chapter with its quick parameters on this machine, and builds the site with warnings as errors.

python ci/book.py           the quick runs (book/live/), then the site (_build/html/)
python ci/book.py --site    the site alone, with the live pages that are there
"""

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import live
import setup

HTML = setup.ROOT / "_build" / "html"
BUILT = setup.ROOT / "_build" / "inputs.txt"


def main(arguments) -> None:
    if arguments not in ([], ["--site"]):
        raise SystemExit(__doc__)
    failed = []
    BUILT.unlink(missing_ok=True)
    if not arguments:
        with setup.empty_cache() as env:
            failed = live.run_chapters(env)
    if not build_site():
        sys.exit("book: the site was not built, see the warnings above.")
    print(f"book: open _build/html/index.html in a browser, or {(HTML / 'index.html').as_uri()}")
    if failed:
        sys.exit("book: failed on this machine, with the traceback on its live page: " + ", ".join(failed))
    if not arguments:
        BUILT.write_text(inputs(), encoding="utf-8")


def build_site() -> bool:
    """Builds all pages anew and says how long it took; True where there was no warning."""
    started = time.monotonic()
    for old in (HTML, HTML.with_name(".doctrees")):
        shutil.rmtree(old, ignore_errors=True)
    line = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "."]
    line += ["-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(line, cwd=setup.ROOT, env=setup.environment(), stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        print(done.stdout.decode(errors="replace"))
        return False
    print(f"book: site built in {time.monotonic() - started:.0f} s", flush=True)
    return True


def inputs() -> str:
    """A hash of every file that git does not ignore: the tests reuse a site that was built from the same."""
    listed = live.git("ls-files", "--cached", "--others", "--exclude-standard")
    digest = hashlib.sha256()
    for path in filter(Path.is_file, (setup.ROOT / name for name in sorted(listed.splitlines()))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    setup.ensure()
    main(sys.argv[1:])
