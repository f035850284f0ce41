"""Handlers of `/control`: pause and resume, and the end of all workers. For administrators."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from core4.api.envelope import reply
from core4.api.events import audited
from core4.api.keys import CATALOGUE, CONTROLS, QUEUE, USER, WORKERS
from core4.controls import view
from core4.errors import Conflict, Forbidden, WorkerNotFound
from core4.registry import LIVING

Args = dict[str, Any]


async def show(request: web.Request, args: Args) -> web.Response:
    """GET control: what is paused, by whom and why, and how many of its jobs run and are held."""
    _require_cop(request)
    running, waiting = await request.app[QUEUE].store.load()
    return reply(request, view(await request.app[CONTROLS].read(), running, waiting))


async def pause(request: web.Request, args: Args) -> web.Response:
    """PUT control/pause: start no more of these jobs; those that run go on."""
    user = _require_cop(request)
    scope, target, reason = args["scope"], args["target"], args["reason"]
    controls = request.app[CONTROLS]
    made = await audited(
        request,
        "control.pause",
        lambda: controls.pause(scope, target, by=user, reason=reason),
        scope=scope,
        target=target,
        reason=reason,
    )
    return reply(request, vars(made), flash=await _nobody(request, scope, target))


async def _nobody(request: web.Request, scope: str, target: str) -> list[str]:
    """A warning if there is nothing, just now, that the pause is for: it may be a slip of the pen."""
    if scope == "job":
        known = await request.app[CATALOGUE].get(target) is not None
        return [] if known else [f"no worker has published [{target:.200}]; the pause is kept all the same"]
    workers = await request.app[WORKERS].up()
    if scope == "worker":
        known = any(worker["name"] == target for worker in workers)
        return [] if known else [f"no worker [{target:.200}] is up; the pause is kept all the same"]
    if scope == "namespace":
        known = any(target in worker["namespaces"] for worker in workers)
        return [] if known else [f"no worker serves [{target:.200}]; the pause is kept all the same"]
    return []


async def resume(request: web.Request, args: Args) -> web.Response:
    """PUT control/resume: end a pause; true if there was one."""
    _require_cop(request)
    scope, target, controls = args["scope"], args["target"], request.app[CONTROLS]
    ended = await audited(
        request, "control.resume", lambda: controls.resume(scope, target), scope=scope, target=target
    )
    # Also if there was none: somebody may have died between these two.
    await request.app[QUEUE].claims.unpark(await request.app[CONTROLS].read())
    return reply(request, ended)


async def halt(request: web.Request, args: Args) -> web.Response:
    """PUT control/halt: end all workers that are up now, as a SIGTERM would."""
    user = _require_cop(request)
    reason, controls = args["reason"], request.app[CONTROLS]
    made = await audited(
        request, "control.halt", lambda: controls.halt(by=user, reason=reason), reason=reason
    )
    return reply(request, vars(made))


async def halt_worker(request: web.Request, args: Args) -> web.Response:
    """PUT control/halt/<_id>: one worker ends when what it runs has ended; with `hard` at once."""
    user, controls, worker = _require_cop(request), request.app[CONTROLS], request.match_info["_id"]
    found = (await request.app[WORKERS].named([worker])).get(worker)
    if found is None:
        raise WorkerNotFound(worker)
    if found["state"] not in LIVING:
        raise Conflict(f"worker [{worker}] has ended already")
    hard, reason = args["hard"], args["reason"]
    made = await audited(
        request,
        "control.stop",
        lambda: controls.stop(worker, by=user, hard=hard, reason=reason),
        worker=worker,
        hard=hard,
        reason=reason,
    )
    return reply(request, vars(made))


def _require_cop(request: web.Request) -> str:
    user = request[USER]
    if not user.may.cop:
        raise Forbidden(f"user [{user.name}] has no right to control the workers")
    return user.name
