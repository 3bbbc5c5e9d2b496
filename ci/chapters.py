"""Writes book/NN_chapter.ipynb from book/text/NN_chapter.md: the text is read, executed, and stored with its outputs.

python ci/chapters.py        every chapter
python ci/chapters.py 01     those whose names begin so

Nothing in a notebook depends on the moment: no times, cell ids from the index, no state of widgets. A notebook whose
cells were edited by hand is left alone, with the command that takes the edit over into the text.
"""

import base64
import hashlib
import sys

import setup

BOOK = setup.ROOT / "book"
BEGIN, END = "<!-- from the ledger: make chapters writes this -->", "<!-- end -->"


def main(prefixes) -> None:
    texts = [path for path in sorted(BOOK.glob("text/*.md")) if path.name.startswith(tuple(prefixes) or "")]
    if not texts:
        sys.exit("no text in book/text/ begins with " + ", ".join(prefixes))
    with setup.empty_cache() as env:
        failed = [text.stem for text in texts if not write(text, env)]
    write_fronts()
    if failed:
        sys.exit("not written: " + ", ".join(failed))


def write_fronts() -> None:
    """Puts the answer and the claims, from the ledger and the recorded runs, into the front page and the README."""
    from stiffkit import claims

    ledger = claims.read()
    judgements = claims.judge_all(ledger)
    for page, folder in ((BOOK / "index.md", ""), (setup.ROOT / "README.md", "book/")):
        if page.exists():
            text = page.read_text(encoding="utf-8")
            page.write_text(with_front(text, claims.front(judgements, ledger, folder)), encoding="utf-8")


def with_front(text, front) -> str:
    """A page with what stands between its two marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{front}\n{END}{rest.split(END)[1]}"


def write(text, env) -> bool:
    """Executes one chapter and stores it; says why and returns False where that does not work."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    target = BOOK / f"{text.stem}.ipynb"
    notebook = jupytext.read(text, fmt="md:myst")
    if target.exists() and edited(nbformat.read(target, 4), notebook):
        print(f"{name(target)} was edited by hand. To take the edit over into the text, then try again:")
        print(f"  {take_over(text.stem)}\nor delete the notebook to drop the edit.")
        return False
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
    client = NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.resources = {"metadata": {"path": str(BOOK)}}  # the working directory
    client.extra_arguments = ["--log-level=ERROR"]
    try:
        client.execute(env=env)
    except CellExecutionError as error:
        print(f"{name(text)}: {error}")
        return False
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.metadata["source_hash"] = fingerprint(notebook)
    nbformat.write(notebook, target)
    save_pictures(notebook)
    print(f"{name(target)} written")
    return True


def save_pictures(notebook) -> None:
    """Stores the figures that the README shows: of cells with metadata `stiffkit: {picture: path below book/}`."""
    for cell in notebook.cells:
        if target := cell.metadata.get("stiffkit", {}).get("picture"):
            (png,) = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
            (BOOK / target).write_bytes(base64.b64decode(png))


def edited(notebook, text) -> bool:
    """True where the cells are neither the ones that this script stored nor those of the text."""
    return fingerprint(notebook) not in (notebook.metadata.get("source_hash"), fingerprint(text))


def fingerprint(notebook) -> str:
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()[:16]


def take_over(chapter) -> str:
    """The command that takes an edited notebook over into its text, to be pasted at the repository's root."""
    return f"{setup.command('jupytext')} --to md:myst --output book/text/{chapter}.md book/{chapter}.ipynb"


def name(path) -> str:
    return path.relative_to(setup.ROOT).as_posix()


if __name__ == "__main__":
    setup.ensure()
    main(sys.argv[1:])
