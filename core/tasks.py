"""The job author's side: derive from `CoreJob`, set ``author``, write ``execute``.

    class Report(CoreJob):
        author = "me"
        attempts = 3

        def execute(self, month: str, top: int = 10) -> dict[str, int]:
            self.progress(0.5, "half of %s", month)
            ...

What a class declares is checked where it is written. Loads nothing but the interpreter.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Mapping
from inspect import iscoroutinefunction
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from core4 import options
from core4.context import Deferred, JobContext
from core4.errors import AbstractJob, BadOption, JobInvalid, MissingAuthor, UnknownOption, UsageError
from core4.options import OPTIONS, Option

NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,100}")
QUAL_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def _is_text(value: Any, limit: int) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= limit


def _is_tag(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list | tuple) and len(value) <= 50 and all(_is_text(item, 100) for item in value)


# What a class may declare beside the options that are stored with each job.
DECLARATIONS: Mapping[str, Option] = MappingProxyType(
    {
        "author": Option(None, "a text", lambda v: v is None or _is_text(v, 200)),
        "schedule": Option(
            None,
            "a cron expression, a mapping with one, or null",
            lambda v: v is None or isinstance(v, str | Mapping),
        ),
        "tag": Option(None, "a list of texts, or null", _is_tag),
        "qual_name": Option(
            None,
            "a dotted name like package.module.Class",
            lambda v: _is_text(v, 200) and bool(QUAL_NAME.fullmatch(v)),
        ),
        "namespace": Option(
            "DEFAULT",
            "1 to 100 of A-Z a-z 0-9 _ -",
            lambda v: isinstance(v, str) and bool(NAMESPACE.fullmatch(v)),
        ),
        "unique": Option(True, "true or false", lambda v: isinstance(v, bool)),
        "hidden": Option(False, "true or false", lambda v: isinstance(v, bool)),
        "inline": Option(False, "true or false", lambda v: isinstance(v, bool)),
    }
)
ATTRIBUTES = MappingProxyType({**OPTIONS, **DECLARATIONS})
# They belong to one class: a subclass is another job, by another author, at another time.
NOT_INHERITED = ("author", "schedule", "tag")
READ_ONLY = frozenset({*ATTRIBUTES, "job_id", "name", "args", "attempt", "logger"})


class CoreAbstractMixin:
    """As a direct base: the class is a base for jobs and no job itself."""


class CoreJob:
    """Base of all job classes.

    Class attributes (all optional but ``author``; times in seconds):

    ========================  =======================================================================
    ``author``                who answers for the job; set on each class, not inherited
    ``attempts``              executions before the job ends as error (1)
    ``error_time``            wait after a failure, 0 for none (600)
    ``backoff``               factor by which that wait grows with each failure (1)
    ``error_time_max``        most that it grows to (86400)
    ``jitter``                share of the wait, 0 to 1, that is taken off at random (0)
    ``max_crashes``           crashes after which the job ends as error; 1: it runs at most once (None)
    ``defer_time``            wait after `defer` (300)
    ``defer_max``             window for deferring, from the first start; then inactive (3600)
    ``timeout``               run time after which an attempt is ended as failed, None for never (None)
    ``memory_limit``          memory of the job's processes, in bytes or like "512MB", None for any (None)
    ``progress_interval``     least time between two progress reports (5)
    ``zombie_time``           silence after which a running job is flagged (1800)
    ``zombie_action``         "flag", or "kill" to end such an attempt as failed ("flag")
    ``wall_time``             run time after which a job is flagged, None for never (None)
    ``wall_action``           "flag", or "kill" to end such an attempt as failed ("flag")
    ``max_parallel``          jobs of this class that one worker runs at a time, None for any (15)
    ``max_running``           jobs of this class that all workers together run at a time, None for any (None)
    ``max_running_key``       what ``max_running`` counts together instead of the class's name (None)
    ``rate_limit``            starts of jobs of this class by all workers, like "10/60s", None for any (None)
    ``priority``              -1000 to 1000, higher first (0)
    ``force``                 before all others, whatever their priority (False)
    ``worker``                run only on this worker, like ``worker@host`` (None)
    ``return_queues``         names of queues that its end is put into, see :doc:`/howto/returns` (None)
    ``schedule``              cron expression or mapping (:doc:`/howto/schedules`), not inherited (None)
    ``tag``                   list of texts for the catalogue, not inherited (None)
    ``namespace``             queue that the job goes to unless enqueued elsewhere ("DEFAULT")
    ``qual_name``             published name, not inherited (module and class name)
    ``unique``                refuse a second open job with the same arguments (True)
    ``hidden``                keep the class out of listings (False)
    ``inline``                run on a loop shared with other jobs; for ``async def execute`` (False)
    ========================  =======================================================================

    Raises at declaration: UnknownOption for a public data attribute that is none of these (names in upper
    case or with a leading underscore are the author's own); BadOption for a value that is not accepted.
    """

    author: ClassVar[str | None] = None
    schedule: ClassVar[str | Mapping[str, Any] | None] = None
    tag: ClassVar[list[str] | None] = None
    namespace: ClassVar[str] = "DEFAULT"
    qual_name: ClassVar[str] = "core4.tasks.CoreJob"
    unique: ClassVar[bool] = True
    hidden: ClassVar[bool] = False
    inline: ClassVar[bool] = False

    attempts: int = OPTIONS["attempts"].default
    error_time: float = OPTIONS["error_time"].default
    backoff: float = OPTIONS["backoff"].default
    error_time_max: float = OPTIONS["error_time_max"].default
    jitter: float = OPTIONS["jitter"].default
    max_crashes: int | None = OPTIONS["max_crashes"].default
    defer_time: float = OPTIONS["defer_time"].default
    defer_max: float = OPTIONS["defer_max"].default
    zombie_time: float = OPTIONS["zombie_time"].default
    wall_time: float | None = OPTIONS["wall_time"].default
    zombie_action: str = OPTIONS["zombie_action"].default
    wall_action: str = OPTIONS["wall_action"].default
    timeout: float | None = OPTIONS["timeout"].default
    memory_limit: int | str | None = OPTIONS["memory_limit"].default
    progress_interval: float = OPTIONS["progress_interval"].default
    max_parallel: int | None = OPTIONS["max_parallel"].default
    max_running: int | None = OPTIONS["max_running"].default
    max_running_key: str | None = OPTIONS["max_running_key"].default
    rate_limit: str | None = OPTIONS["rate_limit"].default
    priority: int = OPTIONS["priority"].default
    force: bool = OPTIONS["force"].default
    worker: str | None = OPTIONS["worker"].default
    return_queues: str | list[str] | None = OPTIONS["return_queues"].default

    _context: JobContext
    _reported_at: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        for name in NOT_INHERITED:
            if name not in own:
                setattr(cls, name, None)
        if "qual_name" not in own:
            cls.qual_name = f"{cls.__module__}.{cls.__qualname__}"
        elif not DECLARATIONS["qual_name"].check(own["qual_name"]):
            raise BadOption(_complaint(cls, "qual_name", own["qual_name"]))
        _check_declaration(cls)

    def __init__(self, context: JobContext) -> None:
        object.__setattr__(self, "_context", context)
        object.__setattr__(self, "_reported_at", float("-inf"))
        for name, value in context.options.items():
            if name in OPTIONS:
                object.__setattr__(self, name, value)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """The work; to be written by the job's author, ``def`` or ``async def``. Gets the arguments by name.

        What it returns (JSON) is the job's result; any exception makes the attempt a failure.
        """
        raise AbstractJob(f"{type(self).qual_name} defines no execute")

    @property
    def job_id(self) -> str:
        """The job's id; together with `attempt` a key for side effects that must happen once."""
        return self._context.job_id

    @property
    def name(self) -> str:
        """The qual_name under which the job was enqueued."""
        return self._context.name

    @property
    def args(self) -> Mapping[str, Any]:
        """The arguments, read-only."""
        return MappingProxyType(dict(self._context.args))

    @property
    def attempt(self) -> int:
        """Number of this execution, from 1."""
        return self._context.attempt

    @property
    def logger(self) -> logging.Logger:
        """Logger of the job; what it writes, DEBUG included, becomes the job's log."""
        return logging.getLogger(self.qual_name)

    def progress(self, p: float, message: str = "", *args: Any, force: bool = False) -> None:
        """Report how far the job is, at most once per ``progress_interval`` unless `force`.

        Args:
            p: from 0.0 to 1.0; what lies outside counts as the nearer end.
            message: what is being done; `args` are filled in as by logging.
        """
        now = time.monotonic()
        if not force and now - self._reported_at < self.progress_interval:
            return
        object.__setattr__(self, "_reported_at", now)
        value = 0.0 if p != p else min(max(float(p), 0.0), 1.0)  # NaN is no JSON
        text = message % args if args else message
        self.logger.debug("progress [%.0f%%] - %s", value * 100, text)
        self._context.report(value, text)

    def enqueue(self, job: type[CoreJob] | str, /, **args: Any) -> str:
        """Enqueue another job, in the name of who enqueued this one; returns its id and waits for nothing.

        An attempt that is repeated gets the jobs of the attempt before, not new ones: its n-th job of one
        name with one set of arguments always has the same id.

        Args:
            job: the class or its qual_name.
            args: arguments; the names of options that are no parameters of the job are its options.

        Raises: EnqueueRefused if no worker has published it, its arguments do not fit, or it exists.
        """
        return self._context.enqueue(job if isinstance(job, str) else job.qual_name, args)

    async def enqueue_async(self, job: type[CoreJob] | str, /, **args: Any) -> str:
        """`enqueue` for ``async def execute``: the loop goes on meanwhile.

        Raises: EnqueueRefused, as `enqueue`.
        """
        import asyncio  # whoever calls this has it

        return await asyncio.to_thread(self.enqueue, job, **args)

    def defer(self, message: str = "", *args: Any) -> NoReturn:
        """End this attempt; the job runs again after ``defer_time``. Does not count as a failure."""
        raise Deferred(message % args if args else message)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_ONLY:
            raise UsageError(f"{type(self).qual_name}: {name} is read-only while the job runs")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in READ_ONLY:
            raise UsageError(f"{type(self).qual_name}: {name} is read-only while the job runs")
        object.__delattr__(self, name)


def is_abstract(job_class: type[CoreJob]) -> bool:
    """True if the class is only a base for jobs."""
    return job_class is CoreJob or CoreAbstractMixin in job_class.__bases__


def require_runnable(job_class: type[CoreJob]) -> None:
    """Check what a declaration may leave open and a job may not.

    Raises: AbstractJob, MissingAuthor, JobInvalid.
    """
    name = job_class.qual_name
    if is_abstract(job_class):
        raise AbstractJob(f"{name} is abstract: derive a job from it")
    if job_class.author is None:
        raise MissingAuthor(f'{name} names no author: set `author = "..."` on the class, it is not inherited')
    if job_class.execute is CoreJob.execute:
        raise JobInvalid(f"{name} defines no execute")


def _check_declaration(cls: type[CoreJob]) -> None:
    for name, value in vars(cls).items():
        if name in ATTRIBUTES or name.startswith("_") or name.isupper():
            continue
        if not callable(value) and not hasattr(value, "__get__"):
            raise UnknownOption(f"{_where(cls)}: {name} is not an option of a job{_did_you_mean(name)}")
    # The effective values, not only the own ones: a mixin that is no job may bring some.
    for name in ATTRIBUTES.keys() - {"qual_name"}:
        value = getattr(cls, name)
        if not ATTRIBUTES[name].check(value):
            raise BadOption(_complaint(cls, name, value))
    if cls.inline:
        _check_inline(cls)
    if cls.schedule is not None:
        from core4 import timetable  # croniter is for the few that need it

        try:
            timetable.declaration(cls.schedule)
        except JobInvalid as error:
            raise type(error)(f"{_where(cls)}: schedule is {cls.schedule!r:.200}, {error.detail}") from None


def _check_inline(cls: type[CoreJob]) -> None:
    if cls.execute is not CoreJob.execute and not iscoroutinefunction(cls.execute):
        raise BadOption(f"{_where(cls)}: inline is for `async def execute`; a plain one runs in a process")
    if cls.memory_limit is not None:
        raise BadOption(f"{_where(cls)}: memory_limit needs a process of its own; leave it or inline out")


def _complaint(cls: type[CoreJob], name: str, value: Any) -> str:
    if name in OPTIONS:
        return f"{_where(cls)}: {options.problem(name, value)}"
    return f"{_where(cls)}: {name} is {value!r:.100}, expected {DECLARATIONS[name].accepts}"


def _where(cls: type[CoreJob]) -> str:
    return f"class {cls.__module__}.{cls.__qualname__}"


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ATTRIBUTES, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    return hint + " (constants of your own: in UPPER_CASE or with a leading underscore)"
