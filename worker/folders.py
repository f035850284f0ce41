"""The folders that are functions' own: made, held while their worker lives, deleted whatever is in them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# An older worker, which holds none of its folders, calls them otherwise.
PREFIX = "core4-function-call-"

_ENTER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Folder:
    """One folder of a function. `close` deletes it; its worker's end makes it `sweep`'s."""

    path: Path
    held: int

    @classmethod
    def make(cls) -> Folder:
        """Raises: OSError."""
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX))
            # If not, somebody sweeps, and has seen it before it was held.
            with contextlib.suppress(FileNotFoundError):
                held = os.open(path, os.O_RDONLY | _ENTER)
                if _hold(held) is not False and _is(path, held):
                    return cls(path, held)
                os.close(held)

    def close(self) -> None:
        """Delete it with all that is in it."""
        try:
            if not delete(self.path):
                log.warning("function.folder_left", extra={"folder": str(self.path)})
        finally:
            os.close(self.held)


def sweep() -> int:
    """Delete what workers of this user have left behind that were killed; the number of folders."""
    swept = 0
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                swept += _sweep(path)
    if swept:
        log.info("function.folders_swept", extra={"folders": swept})
    return swept


def _sweep(path: Path) -> bool:
    """Raises: OSError."""
    found = path.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        return False
    held = _enter(str(path))
    try:
        # What cannot be held here is not known to be left.
        return _hold(held) is True and _is(path, held) and delete(path)
    finally:
        os.close(held)


def _hold(folder: int) -> bool | None:
    """True if it is held from now on, False if somebody else holds it; None where nobody can hold any."""
    try:
        # The kernel gives it back when the process ends, whatever ends it.
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(path: Path, folder: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(folder))
    except FileNotFoundError:
        return False


def delete(folder: Path) -> bool:
    """Delete a folder as far as possible, whatever a function has made of it; True if nothing is left.

    It may be deeper than a path may be long, and hold folders that nobody may enter.
    """
    try:
        top = _enter(str(folder))
        try:
            _empty(top)
        finally:
            os.close(top)
        folder.rmdir()
    except OSError:
        return not os.path.lexists(folder)
    return True


def _empty(top: int) -> None:
    """Without recursion, and with few open files: what is two levels down is moved up, so there are two."""
    names = (f"{secrets.token_hex(8)}-{number}" for number in itertools.count())
    going = True
    while going:
        going = False
        with os.scandir(top) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folder = _enter(entry.name, top)
                        try:
                            going |= _lift(folder, top, names)
                        finally:
                            os.close(folder)
                        os.rmdir(entry.name, dir_fd=top)
                    else:
                        os.unlink(entry.name, dir_fd=top)
                    going = True


def _lift(folder: int, top: int, names: Iterator[str]) -> bool:
    """Empty a folder: its files are deleted, its folders put into `top`. True if that did anything."""
    done = False
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    os.close(_enter(entry.name, folder))  # one that must not be written cannot be moved
                    os.rename(entry.name, next(names), src_dir_fd=folder, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=folder)
                done = True
    return done


def _enter(name: str, inside: int | None = None) -> int:
    """Open a folder that is ours, be it shut to us.

    Raises: OSError.
    """
    found = os.open(name, os.O_PATH | _ENTER, dir_fd=inside)
    try:
        path = f"/proc/self/fd/{found}"  # itself, whatever its name leads to meanwhile
        if os.fstat(found).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(path, stat.S_IRWXU)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(found)
