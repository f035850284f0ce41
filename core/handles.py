"""What is known of a job of a function, and the requests by which more is found out. No input or output.

Each operation is a generator that yields requests and is sent their answers, so that the blocking and the
asyncio client do the same: `core4.callers` and `core4.callers_async` carry the requests.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar
from urllib.parse import quote

from core4 import sources
from core4.client import FIRST_RETRY, MOST_RECORDS, ApiError, ClientError, QueueTimeout, Unreachable
from core4.errors import BadArguments, BadOption, SourceRefused
from core4.options import QUEUE_NAME, shown
from core4.sources import Source

T = TypeVar("T")
Document = dict[str, Any]

POLL = 20.0  # seconds that one request waits for jobs to end; clients wait longer for an answer
TOGETHER = 200  # jobs that one request asks for
ENDED = frozenset({"OK", "ERROR", "DONE"})
DEFAULT_WAIT = 100.0  # seconds that waits for several jobs last, as in myjobs
OPTIONS = (  # of `schedule`; all else are arguments of the function
    *("name", "category", "timeout", "dependencies", "wait", "die", "args_replace"),
    *("return_queues", "return_queues_reset", "kwargs"),
)
ALIKE = 0.75  # how near a name must be to another to be taken for a slip


@dataclass(frozen=True)
class Request:
    """One request: `path` is below the API's base."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pause:
    """Nothing is asked for so many seconds; the answer is empty."""

    seconds: float


Steps = Generator[Request | Pause, Document, T]


class RemoteTraceback(Exception):
    """Where a function failed, in the words of the process that ran it; the cause of `JobFailed`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


class JobFailed(ClientError):
    """A job ended in ERROR. `job` is its handle, `error` what is known: message, traceback and more.

    `jobs` are all that were waited for, in their order, as they are now: those that ended well have results.
    """

    def __init__(self, job: Record, jobs: Sequence[Record] = ()) -> None:
        which = f"{job.method} [{job.name}] ({job.id})"
        super().__init__(f"job {which} {_how(job)}: {job.error.get('message', '')}")
        self.job = job
        self.jobs = list(jobs) or [job]
        self.error = job.error
        self.__cause__ = RemoteTraceback(self.error["traceback"]) if self.error.get("traceback") else None


class WaitTimeout(ClientError, TimeoutError):
    """The limit of a wait has passed; the jobs go on. `jobs` are those waited for, as they are now."""

    def __init__(self, seconds: float, jobs: Sequence[Record]) -> None:
        open_ = [job for job in jobs if not job.ended]
        first = ", ".join(f"{job.method} [{job.name}] is {job.state}" for job in open_[:3])
        debug = "; a debug job is run by `core4 worker --debug` only" if _wait_for_debug(open_) else ""
        super().__init__(
            f"{len(open_)} of {len(jobs)} jobs have not ended within {seconds:g} s: {first}{debug}"
        )
        self.jobs = list(jobs)


def _wait_for_debug(jobs: Iterable[Record]) -> bool:
    return any(job.debug and job.state == "NEW" for job in jobs)


def _how(job: Record) -> str:
    words = {"TIMEOUT": "took too long", "CRASH": "crashed", "HALTED": "was stopped"}
    return words.get(job.error_cat, "failed")


class Record:
    """A job in myjobs' words, as it was when it was last looked at; nothing here asks anybody."""

    def __init__(self, row: Document) -> None:
        self._row = row

    def __repr__(self) -> str:
        own = "" if self.name == f"j{self.id}" else f" [{self.name}]"
        return f"<job {self.method}{own} {self.state} {self.id}>"

    def update(self, row: Document) -> None:
        """Take over what a new look has told."""
        self._row = row

    @property
    def row(self) -> Document:
        """All of it, as the API tells it."""
        return self._row

    @property
    def id(self) -> str:
        """The job's id, 24 hexadecimal digits."""
        return str(self._row["id"])

    @property
    def name(self) -> str:
        """The name that its caller gave, or one made of its id."""
        return str(self._row["name"])

    @property
    def method(self) -> str:
        """The name of its function."""
        return str(self._row["qual_name"]).rpartition(".")[2]

    @property
    def category(self) -> str:
        """Its caller's label, perhaps empty."""
        return str(self._row["category"])

    @property
    def state(self) -> str:
        """NEW, RUNNING, OK, ERROR, or DONE for OK with the result collected."""
        return str(self._row["state"])

    @property
    def error_cat(self) -> str:
        """ERROR, TIMEOUT, CRASH or HALTED, which is why it is in ERROR; NA if it is not."""
        return str(self._row["error_cat"])

    @property
    def error(self) -> Document:
        """Empty, or `message`, `traceback` and what else is known, such as `dependency_failure`."""
        return dict(self._row["error"])

    @property
    def result(self) -> Any:
        """What the function returned; None before that."""
        return self._row["result"]

    @property
    def time_created(self) -> float:
        """When it was scheduled, in seconds since 1970."""
        return float(self._row["time_created"])

    @property
    def time_start(self) -> float:
        """When it began; 0 before that."""
        return float(self._row["time_start"])

    @property
    def time_stop(self) -> float:
        """When it ended; 0 before that."""
        return float(self._row["time_stop"])

    @property
    def timeout(self) -> float:
        """Seconds it may run; 0 for any time."""
        return float(self._row["timeout"])

    @property
    def action_id(self) -> str:
        """SHA-256 of its source."""
        return str(self._row["action_id"])

    @property
    def kwargs(self) -> Document:
        """Its arguments."""
        return dict(self._row["kwargs"])

    @property
    def die(self) -> bool:
        """Whether waits for it raise if it fails, unless they say else."""
        return bool(self._row["die"])

    @property
    def debug(self) -> bool:
        """Whether its function calls a debugger; only a worker started for such jobs runs it then."""
        return bool(self._row.get("debug"))

    @property
    def dependencies(self) -> list[str]:
        """The ids of the jobs that had to end well before."""
        return [str(each) for each in self._row["dependencies"]]

    @property
    def return_queues(self) -> list[str]:
        """The queues that are told of its end."""
        return [str(each) for each in self._row["return_queues"]]

    @property
    def ended(self) -> bool:
        """True if nothing more will come of it, as far as is known here."""
        return self.state in ENDED

    @property
    def running(self) -> bool:
        """True if a worker was at it."""
        return self.state == "RUNNING"


# ---------------------------------------------------------------------- what is sent


@dataclass(frozen=True)
class Key:
    """What signs sources: `name` tells workers whose it is, `secret` is known to them."""

    name: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> Key:
        """A key written as NAME:SECRET.

        Raises: SourceRefused.
        """
        name, colon, secret = text.partition(":")
        if not (name and colon and secret):
            raise SourceRefused("a key is written as NAME:SECRET; `core4 function key NAME` makes one")
        return cls(name, secret)

    @classmethod
    def given(cls, text: str | None) -> Key | None:
        """The key in `text`, else in the variable CORE4_FUNCTION_KEY; None without. Raises: as `parse`."""
        text = text or os.environ.get("CORE4_FUNCTION_KEY")
        return cls.parse(text) if text else None


def captured(function: Callable[..., Any], values: Mapping[str, Any] | None = None) -> Source:
    """The source of a function that is defined in a file, checked.

    Args:
        values: fill what texts of it name in braces.

    Raises: SourceRefused, FreeName, BadOption.
    """
    bare = getattr(function, "__func__", function)
    if not inspect.isfunction(bare):
        raise SourceRefused(
            f"{type(function).__name__} {function!r:.80} is no function written in Python with `def`"
        )
    if bare.__name__ == "<lambda>":
        raise SourceRefused("a lambda has no name and no source of its own: write it with `def`")
    try:
        text = inspect.getsource(bare)
    except (OSError, TypeError):
        raise SourceRefused(
            f"the source of {bare.__name__} cannot be read: it must be defined in a file, not in a shell"
        ) from None
    found = sources.read(
        text, _fitting(values, sources.placeholders(text), bare.__name__) if values else None
    )
    if found.method != bare.__name__:
        raise SourceRefused(f"the source of {bare.__name__} was found to be that of {found.method}")
    return found


def _fitting(values: Mapping[str, Any], names: Collection[str], method: str) -> dict[str, Any]:
    """Those of `values` that texts of a function name: who passes ``locals()`` passes more.

    Raises: BadOption if it names none of them, or one that is nearly the same.
    """
    if not isinstance(values, Mapping):
        raise BadOption(f"args_replace is {shown(values)}, expected a mapping of names to values")
    empty = set(names) - set(values)
    for each in set(values) - set(names):
        if near := difflib.get_close_matches(str(each), empty, n=1, cutoff=ALIKE):
            raise BadOption(
                f"args_replace has [{each}], no text of {method} names it; did you mean [{near[0]}]?"
            )
    found = sources.wanted(values, names)
    if not found:
        few = ", ".join(f"{{{each}}}" for each in list(values)[:5])
        raise BadOption(f"args_replace would fill nothing: no text of {method} has {few} in it")
    return found


def schedule(
    function: Callable[..., Any],
    key: Key | None,
    *,
    name: str | None,
    category: str,
    timeout: float,
    dependencies: Record | str | Iterable[Record | str] | None,
    die: bool,
    args_replace: Mapping[str, Any] | None,
    return_queues: Iterable[str] | None,
    return_queues_reset: Iterable[str] | None,
    kwargs: Mapping[str, Any],
) -> Steps[Document]:
    """The job of one call.

    Raises: SourceRefused, FreeName; BadArguments for arguments that do not fit or are no JSON; BadOption.
    """
    queues = queue_names("return_queues", return_queues)
    emptied = queue_names("return_queues_reset", return_queues_reset)
    if key is None:
        raise SourceRefused(
            "no key to sign the function with: set CORE4_FUNCTION_KEY, or pass key=; "
            "`core4 function key NAME` makes one, workers know it by CORE4_FUNCTION_KEYS"
        )
    source = captured(function, args_replace)
    for each, value in kwargs.items():
        if complaint := sources.json_complaint(value):
            raise SourceRefused(f"the argument [{each}] is not JSON: {complaint}")
    _check_call(source, kwargs)
    for option, given in (("name", name), ("category", category)):
        if not isinstance(given, str | None):
            raise BadOption(f"{option} is {shown(given)}, expected a text; {_BY_NAME}")
    body = {
        "code": source.code,
        "signer": key.name,
        "signature": sources.sign(key.secret, source.code),
        "actorname": getattr(function, "__module__", None) or "",
        "kwargs": dict(kwargs),
        "name": name,
        "category": category,
        "timeout": timeout or 0,
        "dependencies": ids_of(dependencies or ()),
        "die": die,
        "return_queues": queues,
    }
    for queue in emptied:
        yield Request("PUT", f"return/reset/{quote(queue, safe='')}")
    reply = yield Request("POST", "function", body)
    return dict(reply["data"])


_BY_NAME = "arguments of the function are passed by name, as in schedule(f, a=1)"


def _check_call(source: Source, kwargs: Mapping[str, Any]) -> None:
    """As `Source.check_call`, with what may have been meant.

    Raises: BadArguments.
    """
    try:
        source.check_call(kwargs)
    except BadArguments as error:
        told = [
            {**each, "message": each["message"] + _meant(each["pointer"].removeprefix("/"), source, kwargs)}
            for each in error.facts["errors"]
        ]
        raise BadArguments(told) from None


def _meant(name: str, source: Source, kwargs: Mapping[str, Any]) -> str:
    if name not in kwargs:
        return f"; {_BY_NAME}"
    free = [each for each in source.parameters if each not in kwargs]
    near = difflib.get_close_matches(name, [*free, *OPTIONS], n=1, cutoff=ALIKE)
    if not near:
        return ""
    return f"; did you mean [{near[0]}]?" if near[0] in free else f"; did you mean the option `{near[0]}`?"


def queue_names(option: str, given: Iterable[str] | None) -> list[str]:
    """The names of return queues, of which one may be given as it is.

    Raises: BadOption.
    """
    names = [] if given is None else listed(given)
    if all(isinstance(each, str) and QUEUE_NAME.fullmatch(each) for each in names):
        return names
    raise BadOption(
        f"{option} is {shown(given)}, expected the name of a return queue or a list of names, "
        "each 1 to 100 of A-Z a-z 0-9 _ . : -"
    )


def listed(given: Any) -> list[Any]:
    """What is given as one or as several: a text or a job is one."""
    if isinstance(given, str | Record) or not isinstance(given, Iterable):
        return [given]
    return list(given)


# ---------------------------------------------------------------------- looking and waiting


def ids_of(jobs: Record | str | Iterable[Record | str]) -> list[str]:
    """The ids of jobs or ids, each once, in their order."""
    return list(dict.fromkeys(each.id if isinstance(each, Record) else str(each) for each in listed(jobs)))


def looked_at(ids: Sequence[str], timeout: float = 0.0) -> Steps[list[Document]]:
    """What is known of these jobs, when all have ended or `timeout` seconds have passed."""
    rows: list[Document] = []
    deadline = time.monotonic() + timeout
    while len(rows) < len(ids):
        left = min(max(deadline - time.monotonic(), 0.0), POLL)
        some = ids[len(rows) : len(rows) + TOGETHER]
        try:
            reply = yield Request("POST", "function/job", {"job_ids": some, "timeout": left})
        except ApiError as error:
            if error.retry_after is None or not left:
                raise
            # As many of this user's requests wait as may. Who only looks, as at last, needs no place.
            yield Pause(min(error.retry_after, left))
            continue
        is_last_look = time.monotonic() >= deadline
        # Those behind one that has not ended are asked for with it again.
        rows += reply["data"] if is_last_look else takewhile(_has_ended, reply["data"])
    return rows


def _has_ended(row: Document) -> bool:
    return row["state"] in ENDED


def pulled(queues: Iterable[str], size: int, timeout: float | None) -> Steps[list[str]]:
    """The ids of the jobs in the last of these return queues, when each has had `size`; taken out of all.

    Raises: QueueTimeout; BadOption.
    """
    deadline = time.monotonic() + limit(timeout)
    records: list[Document] = []
    for queue in queue_names("queue_names", queues):
        records = yield from _records(queue, size, deadline)
    return [str(record["job_id"]) for record in records]


def _records(queue: str, size: int, deadline: float) -> Steps[list[Document]]:
    found: list[Document] = []
    token = uuid.uuid4().hex  # with it an answer that got lost is given again
    while len(found) < size:
        left = max(deadline - time.monotonic(), 0.0)
        want = min(size - len(found), MOST_RECORDS)
        body = {"size": want, "least": want, "timeout": min(left, POLL), "token": token}
        try:
            reply = yield Request("POST", f"return/pull/{quote(queue, safe='')}", body)
        except (ApiError, Unreachable) as error:
            pause = error.retry_after if isinstance(error, ApiError) else FIRST_RETRY
            if pause is None or not left:
                raise
            yield Pause(min(pause, left))
            continue
        if reply["data"]:
            found, token = [*found, *reply["data"]], uuid.uuid4().hex
        elif not left:
            raise QueueTimeout(queue, size, found)
    return found


def found(query: Mapping[str, Any]) -> Steps[list[str]]:
    """The ids of all jobs behind a query, newest first."""
    ids: list[str] = []
    while True:
        body = {**query, "before": ids[-1] if ids else ""}
        reply = yield Request("POST", "function/find", body)
        some = [str(each) for each in reply["data"]]
        ids += some
        if not some:
            return ids


def query(*, name: str, category: str | None, state: str | Sequence[str], method: str) -> Document:
    """What to find, as a request has it."""
    words = [state] if isinstance(state, str) else list(state)
    return {"name": name, "category": category, "state": words, "method": method}


def exists(job_id: str) -> Steps[bool]:
    """Whether there is a job of this id."""
    try:
        yield Request("POST", "function/job", {"job_ids": [job_id], "timeout": 0})
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return True


def reset() -> Steps[None]:
    """Delete all jobs of functions and their sources."""
    while True:
        reply = yield Request("PUT", "function/reset")
        if not reply["data"]["left"]:
            return


def actions(page: int, per_page: int) -> Steps[list[Document]]:
    """The sources that were sent, without their text."""
    reply = yield Request("GET", f"function/action?page={page}&per_page={per_page}")
    return list(reply["data"])


def action(key: str) -> Steps[Document]:
    """One of them."""
    reply = yield Request("GET", f"function/action/{quote(key, safe='')}")
    return dict(reply["data"])


def revoke(key: str, reason: str | None) -> Steps[Document]:
    """Let one of them run no more."""
    reply = yield Request("PUT", f"function/revoke/{quote(key, safe='')}", {"reason": reason})
    return dict(reply["data"])


# ---------------------------------------------------------------------- what a wait comes to


def limit(timeout: float | None) -> float:
    """Seconds to wait; None is for ever.

    Raises: BadOption.
    """
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise BadOption(f"timeout is {shown(timeout)}, expected a number of seconds, or None")
    return math.inf if timeout is None else timeout


def wanted(ids: Iterable[Record | str]) -> list[str]:
    """The ids to wait for.

    Raises: ValueError if there are none.
    """
    found = ids_of(ids)
    if not found:
        raise ValueError("there is no job to wait for")
    return found


def refresh(given: Iterable[Record | str], jobs: Sequence[Record]) -> None:
    """What was found out of `jobs`, told to the handles that were `given`."""
    rows = {job.id: job.row for job in jobs}
    for each in given:
        if isinstance(each, Record):
            each.update(rows[each.id])


def together(kwargs: Mapping[str, Any] | None, more: Mapping[str, Any]) -> Document:
    """The arguments of a call, those of a mapping and those by name.

    Raises: TypeError for one that is given twice; BadOption.
    """
    if not isinstance(kwargs, Mapping | None):
        raise BadOption(f"kwargs is {shown(kwargs)}, expected a mapping of the function's arguments")
    if twice := sorted(set(kwargs or ()) & set(more)):
        raise TypeError(f"argument {twice[0]} is given in kwargs and by name")
    return {**(kwargs or {}), **more}


def judge(jobs: Sequence[Record], *, timeout: float | None, die: bool | None) -> bool:
    """What a wait comes to: True if all have ended.

    Raises: JobFailed for the first that failed, WaitTimeout if one has not ended; neither without `die`.
        Without a word (None) each job's own `die` counts, and a limit that passes raises.
    """
    for job in jobs:
        if job.state == "ERROR" and (job.die if die is None else die):
            raise JobFailed(job, jobs)
    ended = all(job.ended for job in jobs)
    if not ended and die is not False:
        raise WaitTimeout(timeout or 0.0, jobs)
    return ended
