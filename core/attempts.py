"""One attempt of a job: its body is called, and whatever it does becomes an `Ended`.

A body is the ``execute`` of a job class, or a function; plain, or a coroutine function. Loads nothing but
the interpreter; asyncio only for a coroutine function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeGuard

from core4 import signatures
from core4.context import Deferred, Ended, JobContext, result_problem, running
from core4.tasks import CoreJob

_DEFER_TEXT = 16_384  # characters kept of a defer message

Runnable = type[CoreJob] | Callable[..., Any]


def is_async(found: Runnable) -> bool:
    """True if the body of `found` is a coroutine function: it needs an event loop."""
    function = found.execute if _is_class(found) else inspect.unwrap(found)
    return inspect.iscoroutinefunction(function)


def perform(
    found: Runnable, context: JobContext, *, result_limit: int | None = None, debug: bool = False
) -> Ended:
    """Run one attempt in this thread, a coroutine function on a loop of its own.

    Whatever the body raises is in what is returned, unless `debug`.
    """
    if is_async(found):
        import asyncio  # for the few that need it

        return asyncio.run(perform_async(found, context, result_limit=result_limit, debug=debug))
    with running(context):
        try:
            result = _call(found, context)
        except BaseException as error:
            return _raised(error, debug=debug)
    return _returned(result, result_limit)


async def perform_async(
    found: Runnable, context: JobContext, *, result_limit: int | None = None, debug: bool = False
) -> Ended:
    """Run one attempt of a coroutine function on the running loop; otherwise like `perform`."""
    with running(context):
        try:
            result = await _call(found, context)
        except BaseException as error:
            return _raised(error, debug=debug)
    return _returned(result, result_limit)


def _is_class(found: Runnable) -> TypeGuard[type[CoreJob]]:
    return isinstance(found, type) and issubclass(found, CoreJob)


def _call(found: Runnable, context: JobContext) -> Any:
    if _is_class(found):
        return found(context).execute(**context.args)
    function = inspect.unwrap(found)
    positional, named = signatures.call_args(function, context.args)
    return function(*positional, **named)


def _raised(error: BaseException, *, debug: bool) -> Ended:
    if isinstance(error, Deferred):
        return Ended("deferred", message=str(error)[:_DEFER_TEXT])
    if debug:
        raise error
    # The first frames are this module's and tell the author nothing.
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return Ended.failed(error, frames)


def _returned(result: Any, limit: int | None) -> Ended:
    problem = result_problem(result, limit)
    return Ended("failed", message=problem) if problem else Ended("complete", result=result)
