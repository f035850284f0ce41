"""Run a job in this process, without database and worker: for a user's own tests and ``core4 run``.

def test_report():
    outcome = run_job(Report, month="2025-01")
    assert outcome.state == "complete"
    assert outcome.result["total"] == 12
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from core4 import signatures
from core4.attempts import is_async, perform
from core4.context import Ended, JobContext
from core4.errors import BadArguments
from core4.options import OPTIONS
from core4.states import State
from core4.tasks import CoreJob, require_runnable

RESULT_LIMIT = 1024 * 1024  # bytes; the default of the setting `result_cap`


@dataclass(frozen=True)
class Result:
    """What one attempt came to.

    ``state`` is complete, deferred, failed (attempts are left) or error; ``error`` the repr of the exception
    or the defer message, ``traceback`` its lines; ``logs`` the records of the job's logger and those below
    the root, ``progress`` each (value, message) that was reported, ``enqueued`` each (name, args) of a job
    that it asked for, which are not run.
    """

    state: State
    result: Any
    error: str | None
    traceback: tuple[str, ...]
    logs: tuple[logging.LogRecord, ...]
    progress: tuple[tuple[float, str], ...]
    enqueued: tuple[tuple[str, Mapping[str, Any]], ...]

    @property
    def messages(self) -> list[str]:
        """The texts of all log records."""
        return [record.getMessage() for record in self.logs]


def run_job(
    job: type[CoreJob],
    args: Mapping[str, Any] | None = None,
    /,
    *,
    attempt: int = 1,
    debug: bool = False,
    on_log: Callable[[logging.LogRecord], None] | None = None,
    on_progress: Callable[[float, str], None] | None = None,
    **more: Any,
) -> Result:
    """Run one attempt of `job` with `args` and `more` as its arguments, checked as an enqueue is.

    Args:
        attempt: what the job sees as its attempt; with the class's ``attempts`` it decides failed or error.
        debug: let the job's exception through, for a debugger.
        on_log: called with each record as it comes.
        on_progress: called with each progress report as it comes.

    Raises: BadArguments; MissingAuthor, AbstractJob and JobInvalid for a class that cannot run.
    """
    require_runnable(job)
    given = {**(args or {}), **more}
    problems = signatures.check(signatures.schema(job.execute), given)
    if problems:
        raise BadArguments(problems)
    progress: list[tuple[float, str]] = []

    def report(value: float, message: str) -> None:
        progress.append((value, message))
        if on_progress is not None:
            on_progress(value, message)

    enqueued: list[tuple[str, Mapping[str, Any]]] = []

    def enqueue(name: str, child_args: Mapping[str, Any]) -> str:
        enqueued.append((name, child_args))
        return f"{len(enqueued):024x}"

    context = JobContext(
        job_id="0" * 24,
        name=job.qual_name,
        args=given,
        attempt=attempt,
        options={name: getattr(job, name) for name in OPTIONS},
        report=report,
        enqueue=enqueue,
    )
    with _Recorder(job, on_log) as recorder:
        ended = _perform(job, context, debug=debug)
    failed = ended.kind != "complete"
    return Result(
        state=_state(ended, job.attempts - attempt),
        result=ended.result,
        error=ended.message if failed else None,
        traceback=ended.traceback,
        logs=tuple(recorder.records),
        progress=tuple(progress),
        enqueued=tuple(enqueued),
    )


def _perform(job: type[CoreJob], context: JobContext, *, debug: bool) -> Ended:
    if not is_async(job) or not _on_a_loop():
        return perform(job, context, result_limit=RESULT_LIMIT, debug=debug)
    # The caller is a coroutine, an asynchronous test for one: there is one loop a thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(perform, job, context, result_limit=RESULT_LIMIT, debug=debug).result()


def _on_a_loop() -> bool:
    import asyncio  # only asynchronous jobs need it

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _state(ended: Ended, attempts_left: int) -> State:
    if ended.kind == "failed":
        return State.FAILED if attempts_left > 0 else State.ERROR
    return State.COMPLETE if ended.kind == "complete" else State.DEFERRED


class _Recorder(logging.Handler):
    """Keeps the records that would become the job's log, as long as it is entered."""

    def __init__(self, job: type[CoreJob], on_log: Callable[[logging.LogRecord], None] | None) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._loggers = [logging.getLogger(name) for name in {job.qual_name, job.__module__}]
        self._levels = [logger.level for logger in self._loggers]
        self._on_log = on_log

    def __enter__(self) -> _Recorder:
        logging.getLogger().addHandler(self)
        for logger in self._loggers:
            logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger().removeHandler(self)
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if self._on_log is not None:
            self._on_log(record)
