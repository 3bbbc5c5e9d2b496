"""Files that are whole or not there, and that tell when they were changed: their last bytes are their SHA-256."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SET_ASIDE = ".set-aside"


class ResultsError(ValueError):
    """A file of results, or of a run that was stopped, is damaged or does not hold what it should."""


def write(path: Path, content: bytes) -> Path:
    """Write content and its checksum, whole, as `write_whole` does."""
    return write_whole(path, content + _checksum(content))


def write_whole(path: Path, content: bytes) -> Path:
    """Write content under a temporary name, then rename.

    Raises:
        OSError: naming the file, if the folder cannot be written to or the disk is full; what was there is kept.

    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error of the operating system which file it is about."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written: {reason}. Files that are there stay whole") from error


def read(path: Path) -> bytes:
    """Return the content without the checksum, which was verified.

    Raises:
        ResultsError: the file cannot be read, or the checksum does not match.

    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from None
    size = len(content) - len(_checksum(b""))
    if size < 0 or content[size:] != _checksum(content[:size]):
        raise ResultsError(f"{path} is damaged, cut short, or was not written by stiffkit: its checksum does not match")
    return content[:size]


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used; nothing that was set aside before is overwritten."""
    names = (path.with_name(path.name + SET_ASIDE + (f"-{k}" if k else "")) for k in range(10_000))
    free = next(name for name in names if not name.exists())
    os.replace(path, free)
    return free


@contextmanager
def setting_aside(path: Path) -> Iterator[None]:
    """Name a file that turns out to be damaged in a warning, rename it, and go on without it."""
    try:
        yield
    except ResultsError as error:
        try:
            done = f"set aside as {set_aside(path).name}"
        except OSError as reason:
            done = f"it cannot be set aside: {reason.strerror}"
        warnings.warn(f"{error}; {done}", stacklevel=5)


def _checksum(content: bytes) -> bytes:
    return b"\nstiffkit, SHA-256 " + hashlib.sha256(content).hexdigest().encode() + b"\n"
