"""Functions as jobs: write ``@task()`` above one, and workers publish it.

    @task(namespace="ETL", run_after=["load"], retry_policy="never")
    async def extract(url: str) -> dict[str, object]:
        ...

What a task declares is checked where it is written. Loads nothing but the interpreter.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

from core4 import options, scripts, signatures
from core4.context import current
from core4.errors import BadOption, JobInvalid, UnknownOption, UsageError
from core4.options import OPTIONS
from core4.tasks import DECLARATIONS

if TYPE_CHECKING:
    from concurrent.futures import Future

P = ParamSpec("P")
T = TypeVar("T")

# What each policy makes of the options; a name of its own may not be combined with these options.
POLICIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "retry_once": {"attempts": 2, "error_time": 0},
        "never": {"attempts": 1, "max_crashes": 1},
        "retry_always": {"attempts": 10_000, "error_time": 1, "backoff": 2, "error_time_max": 60},
    }
)
_ALIASES = {"always": "retry_always", "once": "retry_once"}  # easyjobs' documents use both
_CLASS_ONLY = ("qual_name", "inline", "schedule", "namespace")
_DECLARED = tuple(name for name in DECLARATIONS if name not in _CLASS_ONLY)  # author, tag, unique, hidden
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Declaration:
    """What one ``@task`` says: a function in two namespaces has two."""

    namespace: str
    options: Mapping[str, Any]
    declared: Mapping[str, Any]
    retry_policy: str
    run_before: tuple[str, ...]
    run_after: tuple[str, ...]
    on_failure: str | None
    schedule: str | Mapping[str, Any] | None
    default_args: Mapping[str, Any] | None
    script: str | None = None


class Home(Protocol):
    """The manager of the application that a task is in."""

    @property
    def is_here(self) -> bool:
        """False in a fork of the application."""

    def begin(self, name: str, args: Mapping[str, Any]) -> Future[str]:
        """Enqueue a job; its id."""

    def call(self, name: str, args: Mapping[str, Any]) -> Future[Any]:
        """Enqueue a job and wait for its end; its result."""


class Task(Generic[P, T]):
    """A function that workers run as a job; outside of jobs it stays callable as the function it is.

    Inside a job, and in the application of the manager that it is a task of, what is awaited is a job of its
    own: ``await other(...)`` gives its result. ``function`` is the function itself, wherever.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.declarations: dict[str, Declaration] = {}
        self.home: Home | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        in_place = current() is not None or self._manager() is not None
        if in_place and (inspect.iscoroutinefunction(self.function) or _on_a_loop()):
            return self.call_async(*args, **kwargs)  # type: ignore[return-value]  # who calls this awaits it
        return self.function(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Inside a job that is no coroutine: enqueue it, wait for its end and return its result.

        Meanwhile the job has no slot, another one runs in it. Outside of jobs it just calls the function, but
        for the application of its manager, where it does the same as inside.

        Raises: CallFailed if the job did not complete, Core4Error in an application; EnqueueRefused;
        UsageError for arguments that the function does not take, and in a coroutine function, which says
        ``await`` instead.
        """
        if _on_a_loop():
            name = self.function.__name__
            raise UsageError(f"this would stop the loop for all jobs on it: use `await {name}(...)`")
        context = current() or self._manager()
        if context is None:
            found = self.function(*args, **kwargs)
            return _run(found) if inspect.iscoroutine(found) else found
        return context.call(*self._order(args, kwargs)).result()

    async def call_async(self, *args: Any, **kwargs: Any) -> Any:
        """`call` for coroutine functions, as awaiting the task itself; a job that cancels it ends it."""
        context = current() or self._manager()
        if context is None:
            found = self.function(*args, **kwargs)
            return await found if inspect.isawaitable(found) else found
        import asyncio  # whoever awaits this has it

        return await asyncio.wrap_future(context.call(*self._order(args, kwargs)))

    def qual_name(self, namespace: str | None = None) -> str:
        """The name under which it is published, ``namespace:function``.

        Raises: UsageError if it is in several namespaces and none is named, or not in this one.
        """
        if namespace is None and len(self.declarations) > 1:
            raise UsageError(
                f"{self.function.__name__} is a task of {', '.join(self.declarations)}: say namespace="
            )
        chosen = next(iter(self.declarations)) if namespace is None else namespace
        if chosen not in self.declarations:
            raise UsageError(f"{self.function.__name__} is no task of the namespace {chosen}")
        return f"{chosen}:{self.function.__name__}"

    def submit(self, *args: Any, **kwargs: Any) -> str:
        """Enqueue it and return the id of the job: inside a job through the worker, in the application of its
        manager through that, else through the API.

        The arguments are those of the function; ``namespace`` says which task is meant if it is several and
        the function has no such parameter.

        Raises: UsageError for arguments that the function does not take; EnqueueRefused inside a job; what
        `core4.client.Client.enqueue` raises outside.
        """
        name, bound = self._order(args, kwargs)
        context = current()
        if context is not None:
            return context.enqueue(name, bound)
        manager = self._manager()
        if manager is not None:
            if _on_a_loop():
                raise UsageError(
                    f"this would stop the loop: use `await {self.function.__name__}.submit_async(...)`"
                )
            return manager.begin(name, bound).result()
        from core4 import Client  # loaded here: it needs requests, which a job does not

        with Client() as client:
            return client.enqueue(name, bound)

    async def submit_async(self, *args: Any, **kwargs: Any) -> str:
        """`submit` for coroutine functions: the loop goes on meanwhile."""
        import asyncio  # whoever calls this has it

        return await asyncio.to_thread(self.submit, *args, **kwargs)

    def _manager(self) -> Home | None:
        return self.home if self.home is not None and self.home.is_here else None

    def _order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        own = "namespace" in inspect.signature(self.function).parameters
        namespace = None if own else kwargs.pop("namespace", None)
        try:
            return self.qual_name(namespace), signatures.named_args(self.function, args, kwargs)
        except TypeError as error:
            raise UsageError(f"{self.function.__name__}: {error}") from None


def task(
    *,
    namespace: str = "DEFAULT",
    on_failure: str | None = None,
    retry_policy: str | None = None,
    run_before: str | list[str] | None = None,
    run_after: str | list[str] | None = None,
    subprocess: bool = False,
    schedule: str | Mapping[str, Any] | None = None,
    default_args: Mapping[str, Any] | None = None,
    **more: Any,
) -> Callable[[Callable[P, T] | Task[P, T]], Task[P, T]]:
    """Make a job of a function: a plain one runs in a process, a coroutine function inline.

    Args:
        namespace: queue that it is published in; a function may be in several, by several ``@task``.
        on_failure: task of the same namespace that is started when the attempts are used up.
        retry_policy: ``retry_once`` (the default unless `attempts` is given), ``never`` or ``retry_always``.
        run_before: tasks of the same namespace that complete before it starts.
        run_after: tasks of the same namespace that are started with its result when it has completed.
        subprocess: run the file of its name in the task folder instead, in a fresh interpreter; the body of
            the function is never run, see `core4.scripts`.
        schedule: cron expression, or a mapping as job classes have it.
        default_args: ``{"args": [...], "kwargs": {...}}`` for jobs that nobody gives arguments.
        more: any option of a job class, see `core4.tasks.CoreJob`; and author, tag, unique, hidden.

    Raises: UnknownOption for an option that there is not; BadOption for a value that is not accepted.
    """

    def decorate(function: Callable[P, T] | Task[P, T]) -> Task[P, T]:
        found = function if isinstance(function, Task) else Task(function)
        where = f"task {found.function.__module__}.{found.function.__qualname__}"
        if namespace in found.declarations:
            raise BadOption(f"{where}: it is a task of the namespace {namespace!r} already")
        policy, effective = _policy(where, retry_policy, more)
        declaration = Declaration(
            namespace=_checked(where, "namespace", namespace),
            options=effective,
            declared={name: _checked(where, name, more[name]) for name in _DECLARED if name in more},
            retry_policy=policy,
            run_before=_names(where, "run_before", run_before),
            run_after=_names(where, "run_after", run_after),
            on_failure=next(iter(_names(where, "on_failure", on_failure)), None),
            schedule=_schedule(where, schedule),
            default_args=_default_args(where, found.function, default_args),
            script=_script(where, found.function, subprocess),
        )
        if declaration.schedule is not None:
            _check_arguments(where, found.function, declaration.default_args or {})
        found.declarations[namespace] = declaration
        return found

    return decorate


def entries(found: Task[Any, Any], *, here: bool = False) -> list[dict[str, Any]]:
    """The catalogue entries of a task, one per namespace: plain JSON.

    Args:
        here: it runs in this process, or in a fork of it, so that nobody else has to find it.

    Raises: JobInvalid.
    """
    if not here and "<locals>" in found.function.__qualname__:
        raise JobInvalid(f"the task {found.function.__qualname__} is not at the top level of its module")
    return [_entry(found, declaration) for declaration in found.declarations.values()]


def _entry(found: Task[Any, Any], said: Declaration) -> dict[str, Any]:
    function = found.function
    schema = signatures.schema(function, positional=True)
    hooks: dict[str, Any] = {
        "run_before": [f"{said.namespace}:{name}" for name in said.run_before],
        "run_after": [f"{said.namespace}:{name}" for name in said.run_after],
        "on_failure": f"{said.namespace}:{said.on_failure}" if said.on_failure else None,
    }
    return {
        "_id": f"{said.namespace}:{function.__name__}",
        "namespace": said.namespace,
        "kind": "task",
        "runs": _place(function, said),
        "author": said.declared.get("author"),
        "doc": (inspect.getdoc(function) or "")[:10_000],
        "tag": list(said.declared["tag"]) if said.declared.get("tag") else None,
        "schedule": _published(said),
        "schema": schema,
        "signature": signatures.digest(schema),
        "options": options.stored(said.options),
        "unique": said.declared.get("unique", False),
        "hidden": said.declared.get("hidden", False),
        "module": function.__module__,
        "qualname": function.__qualname__,
        "retry_policy": said.retry_policy,
        "default_args": dict(said.default_args) if said.default_args is not None else None,
        **hooks,
        **({"script": said.script} if said.script else {}),
    }


def _place(function: Callable[..., Any], said: Declaration) -> str:
    if said.script is not None:
        return "script"
    inline = inspect.iscoroutinefunction(function) and said.options.get("memory_limit") is None
    return "inline" if inline else "process"


def _published(said: Declaration) -> str | dict[str, Any] | None:
    if said.schedule is None:
        return None
    fields = {"expression": said.schedule} if isinstance(said.schedule, str) else dict(said.schedule)
    found: dict[str, Any] = json.loads(json.dumps(fields, default=dict))
    return {"args": dict(said.default_args or {}), **found}


# ---------------------------------------------------------------------- checks


def _policy(where: str, policy: Any, more: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The policy's canonical name, "" for options alone, and the effective options."""
    for name, value in more.items():
        if name in OPTIONS:
            if complaint := options.problem(name, value):
                raise BadOption(f"{where}: {complaint}")
        elif name not in _DECLARED:
            raise UnknownOption(f"{where}: {name} is not an option of a task{_did_you_mean(name)}")
    given = {name: value for name, value in more.items() if name in OPTIONS}
    if policy is None:
        return ("", given) if "attempts" in given else ("retry_once", {**POLICIES["retry_once"], **given})
    policy = _ALIASES.get(policy, policy) if isinstance(policy, str) else policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise BadOption(f"{where}: retry_policy is {policy!r:.100}, expected one of {', '.join(POLICIES)}")
    fixed = {"attempts", "max_crashes"} & set(given) if policy != "retry_always" else set()
    if fixed:
        raise BadOption(
            f"{where}: retry_policy {policy} says {', '.join(sorted(fixed))}: give one or the other"
        )
    return policy, {**POLICIES[policy], **given}


def _checked(where: str, name: str, value: Any) -> Any:
    if not DECLARATIONS[name].check(value):
        raise BadOption(f"{where}: {name} is {value!r:.100}, expected {DECLARATIONS[name].accepts}")
    return value


def _names(where: str, option: str, value: Any) -> tuple[str, ...]:
    """The names of a hook: one, or a list."""
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or (option == "on_failure" and len(names) != 1):
        raise BadOption(f"{where}: {option} is {value!r:.100}, expected the name of a task")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadOption(f"{where}: {option} names {name!r:.100}, expected the name of a task's function")
    return tuple(names)


def _script(where: str, function: Callable[..., Any], wanted: Any) -> str | None:
    """The file to run instead of the function."""
    if not isinstance(wanted, bool):
        raise BadOption(f"{where}: subprocess is {wanted!r:.100}, expected True or False")
    if not wanted:
        return None
    try:
        return str(scripts.find(function.__name__))
    except BadOption as error:
        raise BadOption(f"{where}: {error.detail}") from None


def _schedule(where: str, schedule: Any) -> Any:
    if schedule is None:
        return None
    from core4 import timetable  # croniter is for the few that need it

    try:
        timetable.declaration(schedule)
    except (JobInvalid, TypeError, ValueError) as error:
        detail = error.detail if isinstance(error, JobInvalid) else str(error)
        raise BadOption(f"{where}: schedule is {schedule!r:.200}, {detail}") from None
    return schedule


def _default_args(where: str, function: Callable[..., Any], value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    shape = isinstance(value, Mapping) and set(value) <= {"args", "kwargs"}
    args, kwargs = (value.get("args") or (), value.get("kwargs") or {}) if shape else (None, None)
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        accepted = '{"args": [...], "kwargs": {...}}'
        raise BadOption(f"{where}: default_args is {value!r:.100}, expected {accepted}")
    try:
        found = signatures.named_args(function, tuple(args), dict(kwargs))
        named: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BadOption(f"{where}: default_args do not fit: {error}") from None
    return named


def _check_arguments(where: str, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
    missing = [name for name in signatures.schema(function, positional=True)["required"] if name not in args]
    if missing:
        raise BadOption(f"{where}: a scheduled task needs default_args for {', '.join(missing)}")


def _on_a_loop() -> bool:
    """True if this thread runs an event loop: then nothing may wait here."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _run(coroutine: Any) -> Any:
    import asyncio  # for the few that need it

    return asyncio.run(coroutine)


def _did_you_mean(name: str) -> str:
    hooks = task.__kwdefaults__ or {}
    close = difflib.get_close_matches(name.lower(), [*OPTIONS, *_DECLARED, *hooks], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
