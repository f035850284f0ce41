"""What a running job is given, and how one attempt of it ends.

Loads nothing but the interpreter: job processes import it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from core4.errors import EnqueueRefused
from core4.results import unstorable

TRACEBACK_LIMIT = 128 * 1024  # characters of a traceback that are kept, from its end
MESSAGE_LIMIT = 16 * 1024  # characters of an exception's repr or a defer message


def _unheard(value: float, message: str) -> None:
    """Progress that nobody follows."""


def _unserved(name: str, args: Mapping[str, Any]) -> str:
    """An enqueue where there is no queue."""
    raise EnqueueRefused(f"no queue is at hand for [{name}]", reason="no_queue")


def _uncalled(name: str, args: Mapping[str, Any]) -> Future[Any]:
    """A call where there is no queue."""
    raise EnqueueRefused(f"no queue is at hand for [{name}]", reason="no_queue")


@dataclass(frozen=True)
class JobContext:
    """What a job knows of its execution and where it reports to.

    ``report`` gets a progress from 0.0 to 1.0 and its message. ``options`` are those stored with the job;
    they override what the class declares. ``enqueue`` gets a qual_name and arguments and returns an id,
    ``call`` the same and returns the future result of that job.
    """

    job_id: str
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[float, str], None] = _unheard
    enqueue: Callable[[str, Mapping[str, Any]], str] = _unserved
    call: Callable[[str, Mapping[str, Any]], Future[Any]] = _uncalled


# A context variable: on one event loop many jobs run, and the tasks of each inherit it.
_CURRENT: ContextVar[JobContext] = ContextVar("core4.context")


def current() -> JobContext | None:
    """The job whose code this is, None outside of jobs.

    Tasks made with ``asyncio.create_task`` and functions in ``asyncio.to_thread`` belong to the job that
    made them; a bare ``threading.Thread`` to none.
    """
    return _CURRENT.get(None)


@contextmanager
def running(context: JobContext) -> Iterator[None]:
    """In this block `current` is `context`."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Deferred(BaseException):
    """Raised by `CoreJob.defer`. Not an Exception: a job's own ``except Exception`` must not swallow it."""


@dataclass(frozen=True)
class Ended:
    """How one attempt ended: with a result, an exception (its repr and traceback) or a defer message."""

    kind: Literal["complete", "failed", "deferred"]
    result: Any = None
    message: str = ""
    traceback: tuple[str, ...] = ()

    @classmethod
    def failed(cls, error: BaseException, frames: TracebackType | None) -> Ended:
        """The attempt that `error` ended; `frames` is the part of its traceback to show."""
        return cls("failed", message=safe_repr(error), traceback=tuple(formatted(error, frames)))


def formatted(error: BaseException, frames: TracebackType | None) -> list[str]:
    """The traceback of `error` as a list of texts, from `frames` on, cut at its start if it is huge."""
    try:
        lines = traceback.format_exception(type(error), error, frames)
    except Exception:  # an exception's own __str__ may fail
        lines = [safe_repr(error)]
    kept: list[str] = []
    size = 0
    for line in reversed(lines):
        size += len(line)
        if size > TRACEBACK_LIMIT:
            kept.append(line[-1000:] if not kept else "...\n")
            break
        kept.append(line)
    return kept[::-1]


def safe_repr(error: BaseException) -> str:
    """The repr of an exception, bounded, whatever its own repr does."""
    try:
        return repr(error)[:MESSAGE_LIMIT]
    except Exception:
        return f"{type(error).__name__}(<repr failed>)"


def result_problem(result: Any, limit: int | None) -> str | None:
    """Why `result` cannot be stored as the result of a job, None if it can.

    It must be JSON with text keys, of which none begins with `$`, and no longer than `limit` bytes.
    """
    try:
        text = json.dumps(result, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"result is not JSON: {str(error)[:500]}"
    if why := unstorable(result):
        return f"result cannot be stored: {why}"
    size = len(text.encode("utf-8", "surrogatepass"))
    if limit is not None and size > limit:
        return f"result of {size} bytes is over the limit of {limit}"
    return None
