"""Finding job classes: in modules, packages and files, and by name.

A target is a dotted module, a package (all its modules count) or the path of a ``.py`` file. Nothing here
is ever called with a name that came over the network: workers load what their operator names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from core4 import signatures
from core4.attempts import Runnable
from core4.context import formatted, safe_repr
from core4.decorated import Task, entries
from core4.errors import JobInvalid, NotAClass, NotAJob, UnknownModule, UnknownName
from core4.options import OPTIONS, stored
from core4.tasks import CoreJob, is_abstract, require_runnable

BUILT_IN = ("core4.examples",)  # every worker runs these
_DOC_LIMIT = 10_000

# What an import may raise. SystemExit: a script that parses its arguments when imported.
_IMPORT_ERRORS = (Exception, SystemExit)


@dataclass(frozen=True)
class Problem:
    """Why a target, one of its modules or one of its classes cannot be used."""

    target: str
    error: str
    traceback: Sequence[str] = ()


@dataclass
class Found:
    """The job classes of some targets by qual_name, their catalogue entries, and what went wrong."""

    classes: dict[str, type[CoreJob]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def load(targets: Iterable[str]) -> Found:
    """Import all targets and describe the jobs they define. Never raises for what a target does."""
    found = Found()
    for target in targets:
        for module in modules(target, found.problems):
            for job_class in _defined_in(module):
                _add(found, target, job_class)
            for each in _tasks_of(module):
                _add_task(found, target, each)
    found.entries, clashes = without_clashes(found.entries)
    found.problems.extend(clashes)
    return found


def modules(target: str, problems: list[Problem]) -> Iterator[ModuleType]:
    """Import a target, a package with all that is below it; what fails is added to `problems`."""
    try:
        module = import_target(target)
    except _IMPORT_ERRORS as error:
        problems.append(problem(target, error))
        return
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}."):
        if not info.name.endswith(".__main__"):
            yield from modules(info.name, problems)


def import_target(target: str) -> ModuleType:
    """The module of a target.

    Raises: UnknownModule if it is not there; whatever its import raises.
    """
    if is_file(target):
        return _import_file(Path(target))
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name and (target == error.name or target.startswith(f"{error.name}.")):
            raise UnknownModule(f"module [{target}] not found: no module named {error.name}") from None
        raise


def see_working_folder() -> None:
    """Let modules of the working folder be found, behind all others: they must not stand in for a library."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def is_file(target: str) -> bool:
    """True if a target is a file and not the name of a module."""
    return target.endswith(".py") or os.sep in target


def problem(target: str, error: BaseException) -> Problem:
    """What went wrong with a target, with the traceback from the user's own code on."""
    if isinstance(error, UnknownModule):
        return Problem(target, error.detail)
    return Problem(target, safe_repr(error), formatted(error, users_frames(error.__traceback__)))


def describe(job_class: type[CoreJob]) -> dict[str, Any]:
    """The catalogue entry of a job class: plain JSON.

    Raises: AbstractJob, MissingAuthor, JobInvalid.
    """
    require_runnable(job_class)
    schema = signatures.schema(job_class.execute)
    schedule = _schedule(job_class, schema)
    return {
        "_id": job_class.qual_name,
        "namespace": job_class.namespace,
        "kind": "class",
        "runs": "inline" if job_class.inline else "process",
        "author": job_class.author,
        "doc": (inspect.getdoc(job_class) or "")[:_DOC_LIMIT] if job_class.__doc__ else "",
        "tag": list(job_class.tag) if job_class.tag is not None else None,
        "schedule": schedule,
        "schema": schema,
        "signature": signatures.digest(schema),
        "options": stored({name: getattr(job_class, name) for name in OPTIONS}),
        "unique": job_class.unique,
        "hidden": job_class.hidden,
        "module": job_class.__module__,
        "qualname": job_class.__qualname__,
        "file": file_of(job_class),
    }


def _schedule(job_class: type[CoreJob], schema: dict[str, Any]) -> str | dict[str, Any] | None:
    """What the class declares, in plain JSON.

    Raises: JobInvalid if it names arguments that `execute` does not take.
    """
    if job_class.schedule is None or isinstance(job_class.schedule, str):
        return job_class.schedule
    schedule: dict[str, Any] = json.loads(json.dumps(job_class.schedule, default=dict))
    # Left out they may be an operator's to give; then it is the scheduler that complains.
    errors = signatures.check(schema, schedule["args"]) if "args" in schedule else []
    if errors:
        first = f"{errors[0]['pointer']}: {errors[0]['message']}"
        raise JobInvalid(f"{job_class.qual_name}: the args of its schedule do not fit execute: {first}")
    return schedule


def resolve(name: str, targets: Iterable[str] = ()) -> type[CoreJob]:
    """The job class of a name: one that `targets` (or the package itself) publish, or ``module.Class``.

    Raises: UnknownModule, UnknownName, NotAClass, NotAJob, AbstractJob, MissingAuthor, JobInvalid; what is
    wrong with the module itself is raised as JobInvalid with its error as the cause.
    """
    found = load([*targets, *BUILT_IN])
    if name in found.classes:
        return found.classes[name]
    if any(entry["_id"] == name for entry in found.entries):
        raise _no_class(name)
    module_name, _, class_name = name.rpartition(".")
    if not module_name or ":" in name:
        hint = "; name its file with -m FILE.py" if ".py" in name else ""
        raise UnknownModule(f"[{name}] is not of the form MODULE.CLASS{hint}")
    try:
        module = import_target(module_name)
    except UnknownModule:
        raise
    except _IMPORT_ERRORS as error:
        raise JobInvalid(f"module [{module_name}] cannot be imported: {safe_repr(error)}") from error
    named = getattr(module, class_name, None)
    if named is None:
        raise UnknownName(f"module [{module_name}] has no [{class_name}]")
    if isinstance(named, Task):
        raise _no_class(name)
    if not isinstance(named, type):
        raise NotAClass(f"[{name}] is no class but {type(named).__name__}")
    if not issubclass(named, CoreJob):
        raise NotAJob(f"[{name}] does not derive from CoreJob")
    require_runnable(named)
    return named


def _no_class(name: str) -> NotAClass:
    return NotAClass(f"[{name}] is a task: call it in Python as the function that it is, or enqueue it")


def locate(entry: Mapping[str, Any]) -> Runnable:
    """The class or function a catalogue entry (with its ``target``) describes, imported if it is not yet.

    Raises: JobInvalid if it is not there any more; whatever the import raises.
    """
    module = sys.modules.get(entry["module"])
    if module is None:
        target = entry["target"]
        module = import_target(target if is_file(target) else entry["module"])
    found: Any = module
    for part in entry["qualname"].split("."):
        found = getattr(found, part, None)
    is_job = issubclass(found, CoreJob) if isinstance(found, type) else callable(found)
    if not is_job:
        raise JobInvalid(f"{entry['module']} does not define {entry['qualname']} any more")
    return found  # type: ignore[no-any-return]


def without_clashes(
    entries: Iterable[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The entries whose name is theirs alone, each once, and a problem for each name claimed twice."""
    by_name: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for entry in entries:
        first = by_name.setdefault(entry["_id"], dict(entry))
        if (first["file"], first["qualname"]) != (entry["file"], entry["qualname"]):
            both = " and ".join(f"{one['qualname']} in {one['file']}" for one in (first, entry))
            problems.append(Problem(entry["file"], f"two jobs are published as [{entry['_id']}]: {both}"))
    clashing = {row.error.split("[")[1].split("]")[0] for row in problems}
    return [entry for name, entry in by_name.items() if name not in clashing], problems


def file_of(found: type[CoreJob] | Task[..., Any]) -> str:
    """The file that defines a class or a task."""
    return getattr(sys.modules.get(found.__module__), "__file__", None) or found.__module__


def _add(found: Found, target: str, job_class: type[CoreJob]) -> None:
    try:
        entry = describe(job_class)
    except JobInvalid as error:
        found.problems.append(Problem(target, error.detail))
        return
    except Exception as error:  # a signature with objects that do odd things
        found.problems.append(problem(target, error))
        return
    found.classes[job_class.qual_name] = job_class
    found.entries.append({**entry, "target": target})


def _add_task(found: Found, target: str, each: Task[..., Any]) -> None:
    try:
        described = entries(each)
    except JobInvalid as error:
        found.problems.append(Problem(target, error.detail))
        return
    except Exception as error:  # a signature with objects that do odd things
        found.problems.append(problem(target, error))
        return
    found.entries += [{**entry, "file": file_of(each), "target": target} for entry in described]


def _tasks_of(module: ModuleType) -> Iterator[Task[..., Any]]:
    """The tasks a module defines itself, each once whatever its names."""
    own = [each for each in vars(module).values() if isinstance(each, Task)]
    yield from dict.fromkeys(each for each in own if each.__module__ == module.__name__)


def _defined_in(module: ModuleType) -> Iterator[type[CoreJob]]:
    """The job classes a module defines itself; imported ones belong to the module they come from."""
    for value in list(vars(module).values()):
        is_job = isinstance(value, type) and issubclass(value, CoreJob)
        if is_job and value.__module__ == module.__name__ and not is_abstract(value):
            yield value


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        raise UnknownModule(f"file [{path}] not found")
    name = path.stem
    if not name.isidentifier():
        raise JobInvalid(f"file [{path}]: {name} cannot be the name of a module; use letters, digits and _")
    known = sys.modules.get(name)
    if known is not None:
        if _same_file(getattr(known, "__file__", None), path):
            return known
        raise JobInvalid(f"file [{path}]: the name {name} is taken by {known!r}; rename the file")
    return _execute(name, path)


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise JobInvalid(f"file [{path}] is no Python module")
    # A script finds its neighbours; at the end, so that they hide nobody else's modules.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _same_file(known: str | None, path: Path) -> bool:
    try:
        return known is not None and os.path.samefile(known, path)
    except OSError:
        return False


def users_frames(frames: TracebackType | None) -> TracebackType | None:
    """The traceback behind our frames and those of the import machinery."""
    rest = frames
    while rest is not None:
        file = rest.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen importlib") and file != importlib.__file__:
            return rest
        rest = rest.tb_next
    return None
