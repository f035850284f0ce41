"""Tasks in files of their own: where the file of ``@task(subprocess=True)`` is, and what stands in it.

    # <task dir>/count_words.py
    from core4 import subprocess

    @subprocess
    def work(text: str) -> int:
        return len(text.split())

    if __name__ == "__main__":
        work()

Loads nothing but the interpreter; asyncio only for a coroutine function.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core4.errors import BadOption

FOLDER_VARIABLES = ("WORKER_TASK_DIR", "CORE4_WORKER_TASK_DIR")  # the first is that of easyjobs' documents
_server: Callable[[Callable[..., Any]], Any] | None = None


def find(name: str, environ: Mapping[str, str] | None = None) -> Path:
    """The file of the task `name`, in the folder that the environment names.

    Raises: BadOption if no folder is named, or there is no such file in it.
    """
    environ = os.environ if environ is None else environ
    folder = next((found for each in FOLDER_VARIABLES if (found := environ.get(each))), None)
    if folder is None:
        raise BadOption(
            f"subprocess=True needs the folder with {name}.py: set {' or '.join(FOLDER_VARIABLES)}"
        )
    return require(Path(folder).expanduser().absolute(), name)


def require(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, and nowhere else.

    Raises: BadOption.
    """
    file = folder / f"{name}.py"
    if not name.isidentifier():
        raise BadOption(f"subprocess=True: {name!r:.100} cannot be the name of a file in {folder}")
    if not file.is_file():
        raise BadOption(f"subprocess=True: there is no file {file}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BadOption(f"subprocess=True: {file} leads out of its folder")
    return file


def subprocess(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function the job of its file, which calls it without arguments under the main guard.

    It may be a coroutine function. In the process of a job a call without arguments has those of the job,
    and its result is the job's. Any other call is one of the function itself.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _server is not None and not args and not kwargs:
            return _server(function)
        called = function(*args, **kwargs)
        if not inspect.iscoroutine(called):
            return called
        import asyncio  # for the few that need it

        return asyncio.run(called)

    return call


def serve(server: Callable[[Callable[..., Any]], Any]) -> None:
    """From now on `server` runs what a file calls without arguments."""
    global _server
    _server = server
