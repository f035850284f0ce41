"""The file of a task with ``subprocess=True`` as the body of a job, in the job's own fresh interpreter."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from core4 import scripts
from core4.attempts import Runnable
from core4.context import Ended

MAIN = "__main__"
_OURS = (__file__, scripts.__file__, "<frozen runpy>", runpy.__file__)


def attempt(path: str, perform: Callable[[Runnable], Ended]) -> Ended:
    """Run a file as a program; `perform` runs the function that it calls under `core4.subprocess`.

    The file's own end counts, too: an exception or an exit code other than 0 is a failure, whatever the
    function has returned.

    Raises: BadOption if the file is no longer where it was.
    """
    file = scripts.require(Path(path).parent, Path(path).stem)
    ended: list[Ended] = []

    def server(function: Callable[..., Any]) -> Any:
        if ended:
            raise RuntimeError("the file has run its job already: it is called once")
        ended.append(perform(function))
        if ended[0].kind != "complete":
            sys.exit(1)
        return ended[0].result

    scripts.serve(server)
    sys.argv = [str(file)]
    sys.path.append(str(file.parent))  # at the end: its neighbours hide nobody else's modules
    problem = _run(file)
    if ended and ended[0].kind != "complete":
        return ended[0]
    if problem is not None:
        return problem
    if not ended:
        return Ended("failed", message=_NOT_CALLED.format(file=file))
    return ended[0]


_NOT_CALLED = (
    "{file} has called no function under @subprocess: "
    'it ends with `if __name__ == "__main__":` and the call of that function, without arguments'
)


def _run(file: Path) -> Ended | None:
    """Run the file; what went wrong with it."""
    try:
        runpy.run_path(str(file), run_name=MAIN)
    except SystemExit as error:
        if error.code in (None, 0):
            return None
        return Ended("failed", message=f"{file} ended with exit code {error.code!r:.1000}")
    except BaseException as error:
        return Ended.failed(error, _from_file_on(error.__traceback__))
    return None


def _from_file_on(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_frame.f_code.co_filename in _OURS:
        frames = frames.tb_next
    return frames
