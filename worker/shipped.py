"""In the job process: a function that came as source is made and called, behind closed doors.

Loads nothing but the interpreter.
"""

from __future__ import annotations

import linecache
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from core4.worker.confine import confine
from core4.worker.protocol import Message

CONTEXT = "process"  # the parameter that gets the context, as core4.sources has it
_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
)  # what a shipped function may know of the worker's


@dataclass(frozen=True)
class Called:
    """The job as its function sees it."""

    id: str
    name: str
    category: str
    kwargs: Mapping[str, Any]
    dependencies: tuple[str, ...]
    attempt: int


@dataclass(frozen=True)
class Process:
    """What a function gets that declares a parameter `process`: its job, and the results of those before."""

    job: Called
    results: Mapping[str, Any] = field(default_factory=dict)
    """Results of the dependencies by their ids, in the order in which they were given."""
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("core4.function"))


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Of the worker's environment what shipped functions get; nobody's secrets are in there."""
    return {name: value for name, value in environ.items() if name in _ENVIRONMENT}


def made(order: Message) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of an order and its arguments. From here on this process is confined.

    Raises: CannotConfine; whatever the definition of the function raises.
    """
    shipped = order["function"]
    folder = shipped["folder"]
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    confine([folder, *shipped["folders"]], shipped["ports"])
    function = _defined(shipped["method"], shipped["code"])
    return function, {**order["job"]["args"], **_context(order)}


def own_frames(frames: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is the function's own."""
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith("<function "):
        frames = frames.tb_next
    return frames


def _defined(method: str, code: str) -> Callable[..., Any]:
    file = f"<function {method}>"
    # So that a traceback shows the lines.
    linecache.cache[file] = (len(code), None, code.splitlines(True), file)
    scope: dict[str, Any] = {"__name__": f"core4.function.{method}"}
    exec(compile(code, file, "exec"), scope)
    function: Callable[..., Any] = scope[method]
    return function


def _context(order: Message) -> dict[str, Any]:
    shipped, job = order["function"], order["job"]
    if not shipped["context"]:
        return {}
    about = shipped["job"]
    called = Called(
        id=job["id"],
        name=about["name"],
        category=about["category"],
        kwargs=job["args"],
        dependencies=tuple(about["dependencies"]),
        attempt=job["attempt"],
    )
    return {CONTEXT: Process(called, shipped["results"], logging.getLogger(job["name"]))}
