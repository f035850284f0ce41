"""Every address of the API: method, path, handler, who may call it and what it may be told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from aiohttp import web
from marshmallow import Schema

from core4 import identifiers
from core4.api import (
    arguments,
    batch,
    bulk,
    control,
    docs,
    doctor,
    events,
    functions,
    jobs,
    metrics,
    results,
    returns,
    schedules,
    sessions,
    system,
    tasks,
)
from core4.api.auth import authenticate
from core4.api.browsers import require_own_page
from core4.api.keys import BASE, REQUESTS, TOKEN, TURNS, USER
from core4.errors import TooManyRequests
from core4.schemas import (
    BatchArguments,
    BulkArguments,
    DoctorArguments,
    EnqueueArguments,
    EventArguments,
    FindArguments,
    FollowedArguments,
    FunctionArguments,
    HaltArguments,
    HistoryArguments,
    JobListArguments,
    KillArguments,
    LogArguments,
    LoginArguments,
    LookArguments,
    NextArguments,
    NoArguments,
    PageOnlyArguments,
    PauseArguments,
    PauseTarget,
    PreviewArguments,
    PullArguments,
    PullQueueArguments,
    QueueArguments,
    ResetArguments,
    ResultArguments,
    ResultListArguments,
    RunningArguments,
    ScheduleArguments,
    SchedulesArguments,
    SearchArguments,
    StopArguments,
    StreamArguments,
    TaskArguments,
    WorkersArguments,
)
from core4.users import User

# open: everybody; user: who is signed in; stream: who is signed in, or brings a ticket.
Access = Literal["open", "user", "stream"]
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]

_JOB = f"{BASE}/job"
_SCHEDULE = f"{BASE}/schedule"
_RETURN = f"{BASE}/return"
_FUNCTION = f"{BASE}/function"
_NAME = "{name:.+}"  # names may contain slashes, see core4.timetable.check_name


@dataclass(frozen=True)
class Route:
    """One address. The rights on a job are checked where the job is known, in the handler."""

    method: str
    path: str
    handler: Handler
    access: Access = "user"
    takes: type[Schema] = NoArguments
    changes: bool = False  # a GET that changes something: nothing may send it by itself
    large: bool = False  # its answer may be megabytes: so many of a user's are made and sent at a time


ROUTES: tuple[Route, ...] = (
    Route("POST", _JOB, jobs.enqueue, takes=EnqueueArguments),
    Route("GET", _JOB, jobs.list_queue, takes=JobListArguments, large=True),
    Route("GET", f"{_JOB}/queue", jobs.list_queue, takes=JobListArguments, large=True),
    Route("POST", f"{_JOB}/queue", jobs.list_queue, takes=JobListArguments, large=True),
    Route("GET", f"{_JOB}/journal", jobs.list_journal, takes=JobListArguments, large=True),
    Route("POST", f"{_JOB}/journal", jobs.list_journal, takes=JobListArguments, large=True),
    Route("GET", f"{_JOB}/list", jobs.list_catalogue, takes=SearchArguments, large=True),
    Route("POST", f"{_JOB}/list", jobs.list_catalogue, takes=SearchArguments, large=True),
    Route("GET", f"{_JOB}/count", jobs.count),
    Route("POST", f"{_JOB}/batch", batch.enqueue_many, takes=BatchArguments),
    Route("POST", f"{_JOB}/bulk", bulk.bulk, takes=BulkArguments),
    Route("GET", f"{_JOB}/detail", jobs.missing_id),
    Route("GET", f"{_JOB}/detail/{{_id}}", jobs.detail, large=True),
    Route("GET", f"{_JOB}/follow/{{_id}}", jobs.follow, "stream", StreamArguments),
    Route("GET", f"{_JOB}/log/{{_id}}", jobs.log_lines, "stream", LogArguments, large=True),
    Route("PUT", f"{_JOB}/kill/{{_id}}", jobs.kill, takes=KillArguments),
    Route("PUT", f"{_JOB}/remove/{{_id}}", jobs.remove),
    Route("PUT", f"{_JOB}/restart/{{_id}}", jobs.restart, takes=FollowedArguments),
    Route("GET", f"{_JOB}/view/result", results.view_result, takes=ResultArguments),
    Route("POST", f"{_JOB}/view/result", results.view_result, takes=ResultArguments),
    Route("GET", f"{_JOB}/pull/result", results.pull_result, takes=PullArguments, changes=True),
    Route("POST", f"{_JOB}/pull/result", results.pull_result, takes=PullArguments),
    Route("GET", f"{_JOB}/view/results", results.list_results, takes=ResultListArguments, large=True),
    Route("POST", f"{_JOB}/view/results", results.list_results, takes=ResultListArguments, large=True),
    Route("GET", f"{_JOB}/view/queued", results.list_queued, takes=ResultListArguments, large=True),
    Route("POST", f"{_JOB}/view/queued", results.list_queued, takes=ResultListArguments, large=True),
    Route("GET", f"{_JOB}/view/running", results.list_running, takes=RunningArguments, large=True),
    Route("POST", f"{_JOB}/view/running", results.list_running, takes=RunningArguments, large=True),
    Route("GET", f"{_JOB}/{{_id}}", jobs.detail, large=True),
    Route("*", f"{_JOB}/{{action}}/{{_id}}", jobs.unknown_action),
    Route("GET", _SCHEDULE, schedules.list_schedules, takes=SchedulesArguments, large=True),
    Route("POST", _SCHEDULE, schedules.list_schedules, takes=SchedulesArguments, large=True),
    Route("GET", f"{_SCHEDULE}/next", schedules.preview, takes=PreviewArguments),
    Route("PUT", f"{_SCHEDULE}/pause/{_NAME}", schedules.pause),
    Route("PUT", f"{_SCHEDULE}/resume/{_NAME}", schedules.resume),
    Route("PUT", f"{_SCHEDULE}/trigger/{_NAME}", schedules.trigger),
    Route("PUT", f"{_SCHEDULE}/reset/{_NAME}", schedules.reset, takes=ResetArguments),
    Route("GET", f"{_SCHEDULE}/{_NAME}", schedules.show, takes=NextArguments),
    Route("PUT", f"{_SCHEDULE}/{_NAME}", schedules.change, takes=ScheduleArguments),
    Route("DELETE", f"{_SCHEDULE}/{_NAME}", schedules.delete),
    Route("GET", f"{_RETURN}/{{queue}}", returns.show, takes=QueueArguments, large=True),
    Route("POST", f"{_RETURN}/pull/{{queue}}", returns.pull, takes=PullQueueArguments),
    Route("PUT", f"{_RETURN}/reset/{{queue}}", returns.reset),
    Route("POST", _FUNCTION, functions.schedule, takes=FunctionArguments),
    Route("POST", f"{_FUNCTION}/job", functions.look, takes=LookArguments),
    Route("POST", f"{_FUNCTION}/find", functions.find_jobs, takes=FindArguments),
    Route("PUT", f"{_FUNCTION}/reset", functions.reset),
    Route("GET", f"{_FUNCTION}/action", functions.list_actions, takes=PageOnlyArguments, large=True),
    Route("GET", f"{_FUNCTION}/action/{{key}}", functions.show_action, large=True),
    Route("PUT", f"{_FUNCTION}/revoke/{{key}}", functions.revoke, takes=HaltArguments),
    Route("GET", f"{BASE}/worker", system.workers, takes=WorkersArguments, large=True),
    Route("GET", f"{BASE}/event", events.list_events, takes=EventArguments, large=True),
    Route("GET", f"{BASE}/queue/history", events.history, takes=HistoryArguments),
    Route("GET", f"{BASE}/control", control.show),
    Route("PUT", f"{BASE}/control/pause", control.pause, takes=PauseArguments),
    Route("PUT", f"{BASE}/control/resume", control.resume, takes=PauseTarget),
    Route("PUT", f"{BASE}/control/halt", control.halt, takes=HaltArguments),
    Route("PUT", f"{BASE}/control/halt/{{_id}}", control.halt_worker, takes=StopArguments),
    Route("GET", f"{BASE}/doctor", doctor.examine, takes=DoctorArguments, large=True),
    Route("POST", f"{BASE}/doctor", doctor.repair, takes=DoctorArguments),
    Route("GET", f"{BASE}/login", sessions.login, "open", LoginArguments, changes=True),
    Route("POST", f"{BASE}/login", sessions.login, "open", LoginArguments),
    Route("GET", f"{BASE}/logout", sessions.logout),
    Route("POST", f"{BASE}/logout", sessions.logout),
    Route("GET", f"{BASE}/profile", sessions.profile),
    Route("POST", f"{BASE}/ticket", sessions.ticket),
    Route("POST", tasks.PATH, tasks.run, takes=TaskArguments),
    Route("GET", f"{BASE}/openapi.json", docs.description, large=True),
    Route("GET", "/docs", docs.page),
    Route("GET", "/metrics", metrics.show),
    Route("GET", "/livez", system.alive, "open"),
    Route("GET", "/readyz", system.ready, "open"),
    Route("GET", "/version", system.show_version, "open"),
    Route("GET", "/", system.home, "open"),
    Route("GET", "/static/{name:.+}", system.static, "open"),
)


def add_routes(app: web.Application) -> None:
    """Register all routes."""
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _endpoint(route))
        if route.method == "GET" and route.access != "stream" and not route.changes:
            app.router.add_route("HEAD", route.path, _endpoint(route))


def _endpoint(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Who is calling, then what he says, then what is done."""

    async def endpoint(request: web.Request) -> web.StreamResponse:
        if route.changes:
            require_own_page(request)
        if route.access != "open":
            user = await authenticate(request, ticket=route.access == "stream", cookie=not route.changes)
            request[USER] = user
            identifiers.bind(_who(user.name))
            _count(request, user)
        args = await arguments.parse(route.takes, request)
        if not route.large or args.get("follow"):
            return await answered(request, args)
        async with request.app[TURNS].of(request[USER].name):
            response = await answered(request, args)
            await _sent(request, response)
            return response

    async def answered(request: web.Request, args: dict[str, Any]) -> web.StreamResponse:
        response = await route.handler(request, args)
        if TOKEN in request and route.handler is not sessions.logout and not response.prepared:
            await sessions.refresh(request, response)
        return response

    return endpoint


async def _sent(request: web.Request, response: web.StreamResponse) -> None:
    """Send it here and now: who does not read it keeps his turn, and gets no more to hold."""
    with suppress(ConnectionError):  # aiohttp finds out again, and ends the connection
        await response.prepare(request)
        await response.write_eof()


@lru_cache(maxsize=1000)
def _who(name: str) -> Mapping[str, str]:
    """One for all requests of a user: each of thousands of streams holds it."""
    return {"user": name}


def _count(request: web.Request, user: User) -> None:
    """One more request of its user. Raises: TooManyRequests."""
    asked = request.app.get(REQUESTS)
    if asked is not None and (wait := asked.take(user.name)):
        raise TooManyRequests(wait, "too many requests of this user, see the setting requests_per_user")
