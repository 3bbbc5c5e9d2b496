"""The chapters on this machine: runs each with its quick parameters and derives the page book/live/NN_chapter.ipynb.

A page holds what was run, for how long and on what, and the figures: no prose and no verdicts, which speak of the
recorded runs, and no labels, which would take the cross-references away from the chapter's own figures.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setup

RUNS = setup.ROOT / "_build" / "live"
PAGES = setup.ROOT / "book" / "live"
QUICK = setup.ROOT / "book" / "parameters" / "quick"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run_chapters(env) -> list[str]:
    """Runs all chapters, writes a page for each, and returns the names of those that failed."""
    failed = []
    for folder in (RUNS, PAGES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for chapter in sorted(setup.ROOT.glob("book/[0-9]*.ipynb")):
        message = run(chapter, env)
        write_page(chapter, message)
        if message:
            failed.append(chapter.stem)
            print(f"live: {chapter.stem} failed:\n{message}", flush=True)
    return failed


def run(chapter, env) -> str:
    """Runs one chapter through papermill into _build/live; returns what went wrong, or an empty string."""
    import nbformat

    target, parameters = RUNS / chapter.name, quick(chapter)
    if not parameters.exists():
        return f"{parameters.relative_to(setup.ROOT).as_posix()} is missing"
    line = [sys.executable, "-m", "papermill", str(chapter), str(target), "-f", str(parameters), "-k", "python3"]
    line += ["--no-progress-bar", "--log-level", "ERROR", "--execution-timeout", "600"]
    done = subprocess.run(
        line, cwd=setup.ROOT, env={**env, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=False
    )
    if done.returncode == 0:
        print(f"live: {chapter.stem} in {seconds(nbformat.read(target, 4)):.0f} s", flush=True)
        return ""
    notebook = nbformat.read(target, 4) if target.exists() else None
    return traceback(notebook) or done.stderr.decode(errors="replace")


def traceback(notebook) -> str:
    """The traceback stored in an executed notebook, without colours."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])] if notebook else []
    lines = [line for output in outputs if output.output_type == "error" for line in output.traceback]
    return COLOURS.sub("", "\n".join(lines))


def write_page(chapter, message) -> None:
    """Writes the page of one chapter from its run: facts, figures, and the traceback where it failed."""
    import nbformat
    from nbformat import v4

    stored = nbformat.read(chapter, 4)
    executed = nbformat.read(RUNS / chapter.name, 4) if (RUNS / chapter.name).exists() else stored
    ran = executed is not stored
    cells = [v4.new_markdown_cell(facts(chapter, stored, seconds(executed) if ran else None))]
    cells += [figure(cell) for cell in executed.cells if ran and images(cell)]
    if message:
        cells.append(v4.new_markdown_cell(f"**This chapter failed here:**\n\n````text\n{message.strip()}\n````"))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), PAGES / chapter.name)


def facts(chapter, stored, duration) -> str:
    """The head of a page: title, what quick data cannot show, parameters, seconds, device, commit."""
    papermill = setup.command("papermill")
    parameters = [f"`{name}`: `{value}`" for name, value in values(quick(chapter)).items()]
    rows = {
        "Parameters": ", ".join(parameters) or "the chapter's own",
        "Time": "none" if duration is None else f"{duration:.1f} seconds, the start of Python included",
        "Device": device(),
        "Commit": commit(),
        "Again": f"`{papermill} book/{chapter.name} out.ipynb -f book/parameters/quick/{quick(chapter).name}`",
    }
    note = stored.metadata.get("stiffkit", {}).get("quick_note", "")
    lines = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    return f"# {title(stored)}, on this machine\n\n{note}\n\n{lines}"


def title(notebook) -> str:
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "A chapter")


def quick(chapter) -> Path:
    return QUICK / f"{chapter.stem[:2]}.yml"


def values(path) -> dict:
    import yaml

    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def seconds(notebook) -> float:
    return notebook.metadata.get("papermill", {}).get("duration") or 0.0


def images(cell) -> list:
    """The pictures that a figure cell displayed: outputs with an image, in cells with a caption."""
    if "figure" not in cell.metadata.get("mystnb", {}):
        return []
    return [output for output in cell.outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]


def figure(cell) -> dict:
    """A cell that shows the same figure: caption and alt text, without label and source.

    Cell metadata `stiffkit: {live: {caption, alt}}` replace a caption or an alt text that speaks of the recorded runs.
    """
    from nbformat import v4

    own, live = cell.metadata["mystnb"], cell.metadata.get("stiffkit", {}).get("live", {})
    caption = live.get("caption", own["figure"].get("caption", ""))
    image = {**own.get("image", {}), **({"alt": live["alt"]} if "alt" in live else {})}
    metadata = {"tags": ["remove-input"], "mystnb": {"figure": {"caption": caption}, "image": image}}
    return v4.new_code_cell(cell.source, metadata=metadata, outputs=images(cell), execution_count=cell.execution_count)


def device() -> str:
    """The processor by its name where the system tells it; quick runs do not use a GPU."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(iter(re.findall(r"model name\s*: (.+)", cpuinfo.read_text(errors="replace"))), name)
    return f"CPU: {name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    try:
        short = git("rev-parse", "--short", "HEAD")
        return f"`{short}`" + (" with uncommitted changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git here)"


def git(*arguments) -> str:
    return subprocess.check_output(["git", *arguments], cwd=setup.ROOT, stderr=subprocess.DEVNULL, text=True).strip()
