"""Every error the product raises, in one tree.

Core4Error
├── ConfigError                 a setting is wrong (exit code 2)
├── BadRequest                  400
│   ├── InvalidJson
│   ├── BadMessage
│   └── SourceRefused           the source of a function cannot be shipped
│       └── FreeName
├── Unauthenticated             401
├── Forbidden                   403
├── NotFound                    404
│   ├── JobNotFound
│   └── UnknownJob
├── Conflict                    409
│   └── JobExists
├── ResultGone                  410
├── TooLarge                    413
├── BadArguments                422
├── KeyReused                   422
├── TooManyRequests             429
├── Unavailable                 503
├── BrokerLost                  the connection to a message broker ended
├── LeaseLost                   a worker no longer holds the job
├── EnqueueRefused              a running job asked for one that cannot be enqueued
├── CallFailed                  a job that a running job waited for did not complete
├── UsageError                  a job's author assigns what is read-only
└── JobInvalid                  a job class cannot be used
    ├── UnknownOption
    ├── BadOption
    ├── MissingAuthor
    ├── AbstractJob
    ├── NotAJob
    ├── NotAClass
    ├── UnknownModule
    └── UnknownName

Loads nothing but the interpreter: job processes import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class Core4Error(Exception):
    """Base of all errors; `detail` is for people, `facts` for programs.

    ``status`` is the HTTP status the API answers with and ``code`` a stable word for scripts.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, detail: str = "", **facts: Any) -> None:
        self.detail = detail or (type(self).__doc__ or type(self).__name__).strip().split("\n")[0]
        self.facts = facts
        super().__init__(self.detail)


class ConfigError(Core4Error):
    """A setting is missing or has a value that is not accepted."""

    code = "config"


class BadRequest(Core4Error):
    """The request cannot be understood."""

    status, code = 400, "bad_request"


class InvalidJson(BadRequest):
    """A message is no JSON object."""

    code = "invalid_json"


class BadMessage(BadRequest):
    """A message lacks something, or says it in a wrong type."""

    code = "bad_message"


class SourceRefused(BadRequest):
    """The source of a function cannot be shipped."""

    code = "source_refused"


class FreeName(SourceRefused, NameError):
    """The function uses a name that is not defined inside of it."""

    code = "free_name"


class Unauthenticated(Core4Error):
    """Sign in with basic authentication or a bearer token."""

    status, code = 401, "unauthenticated"


class Forbidden(Core4Error):
    """The signed-in user has no right to do this."""

    status, code = 403, "forbidden"


class NotFound(Core4Error):
    """There is nothing at this place."""

    status, code = 404, "not_found"


class WorkerNotFound(NotFound):
    """No worker has this id, or it has ended long ago."""

    code = "worker_not_found"

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"worker [{worker_id:.100}] not found", worker_id=worker_id)


class JobNotFound(NotFound):
    """No job has this id, neither in the queue nor in the journal."""

    code = "job_not_found"

    def __init__(self, job_id: object, detail: str = "") -> None:
        super().__init__(detail or f"job [{job_id}] not found", job_id=str(job_id))


class UnknownJob(NotFound):
    """No worker has ever published a job of this name."""

    code = "unknown_job"

    def __init__(self, qual_name: str, similar: Sequence[str] = ()) -> None:
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        super().__init__(
            f"unknown job [{qual_name}]: no worker has published it; "
            f"start one with `core4 worker FILE` and look it up with `core4 job list`{hint}",
            qual_name=qual_name,
        )


class Conflict(Core4Error):
    """The job's state does not allow this."""

    status, code = 409, "conflict"


class JobExists(Conflict):
    """An open or stopped job has the same name and arguments."""

    code = "job_exists"

    def __init__(self, job_id: object, name: str) -> None:
        super().__init__(
            f"job [{name}] exists with the same arguments: [{job_id}]; follow, restart or remove that one",
            job_id=str(job_id),
        )
        self.job_id = job_id


class ResultGone(Core4Error):
    """The result has been pulled: it was handed out once and removed."""

    status, code = 410, "result_gone"


class TooLarge(Core4Error):
    """The payload is larger than the limit."""

    status, code = 413, "too_large"


class BadArguments(Core4Error):
    """The arguments do not fit the job's signature; ``errors`` point to each."""

    status, code = 422, "bad_arguments"

    def __init__(self, errors: Sequence[dict[str, str]], detail: str = "") -> None:
        text = "; ".join(f"{error['pointer'] or '/'}: {error['message']}" for error in errors[:5])
        super().__init__(detail or f"arguments not accepted: {text}", errors=list(errors))


class KeyReused(Core4Error):
    """The idempotency key belongs to another request."""

    status, code = 422, "idempotency_key_reused"


class TooManyRequests(Core4Error):
    """Too many attempts; wait and try again."""

    status, code = 429, "too_many_requests"

    def __init__(self, retry_after: float, detail: str = "") -> None:
        super().__init__(detail, retry_after=retry_after)
        self.retry_after = retry_after


class Unavailable(Core4Error):
    """The database does not answer; try again."""

    status, code = 503, "unavailable"


class BrokerLost(Core4Error):
    """The message broker does not answer, or has ended the connection."""

    status, code = 503, "broker_lost"


class LeaseLost(Core4Error):
    """The job is no longer held by this worker: end its processes, write nothing."""

    status, code = 409, "lease_lost"

    def __init__(self, job_id: object, lease_id: str | None) -> None:
        super().__init__(f"job [{job_id}] is no longer held under lease [{lease_id}]")
        self.job_id, self.lease_id = job_id, lease_id


class EnqueueRefused(Core4Error):
    """The job that a running job asked for cannot be enqueued; ``facts["reason"]`` is a stable word."""

    code = "enqueue_refused"


class CallFailed(Core4Error):
    """A job that a running job called, and waited for, did not complete.

    ``error_cat`` is ERROR, TIMEOUT, CRASH, HALTED or DEPENDENCY, None if it was killed or removed;
    ``message`` is what the job's own exception says.
    """

    code = "call_failed"

    def __init__(self, job_id: str, name: str, state: str, error_cat: str | None, message: str) -> None:
        kind = f" ({error_cat})" if error_cat else ""
        super().__init__(f"{name} [{job_id}] ended as {state}{kind}: {message}", job_id=job_id, name=name)
        self.job_id, self.name, self.state = job_id, name, state
        self.error_cat, self.message = error_cat, message


class UsageError(Core4Error):
    """A property of a running job is read-only."""

    code = "usage"


class JobInvalid(Core4Error):
    """The job class cannot be used."""

    status, code = 422, "job_invalid"


class UnknownOption(JobInvalid):
    """A job class sets an option that does not exist."""

    code = "unknown_option"


class BadOption(JobInvalid):
    """A job class, or a call, sets an option to a value that is not accepted."""

    code = "bad_option"


class MissingAuthor(JobInvalid):
    """A job class must name its author."""

    code = "missing_author"


class AbstractJob(JobInvalid):
    """An abstract job cannot be run."""

    code = "abstract_job"


class NotAJob(JobInvalid):
    """The class does not derive from CoreJob."""

    code = "not_a_job"


class NotAClass(JobInvalid):
    """The name is not that of a class."""

    code = "not_a_class"


class UnknownModule(JobInvalid):
    """The module cannot be found."""

    code = "unknown_module"


class UnknownName(JobInvalid):
    """The module has no such name."""

    code = "unknown_name"
